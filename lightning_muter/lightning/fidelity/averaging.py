"""Callbacks that change the weights when training ends, as averaging does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.flavour import pl
from lightning_muter.models import ModelView

__all__ = ["check_order", "check_unmoved"]

#: WeightAveraging and its subclasses came with Lightning 2.6
_AVERAGING: tuple[type[pl.Callback], ...] = tuple(
    getattr(pl.callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(pl.callbacks, name)
)


def check_order(callbacks: Sequence[pl.Callback], own: pl.Callback) -> None:
    """Refuse weight averaging that would change the model after its memory was built.

    Raises:
        ConfigurationError: with the callback to list before ``own``.
    """
    after = [c for c in callbacks[list(callbacks).index(own) :] if isinstance(c, _AVERAGING)]
    if after:
        name = type(after[0]).__name__
        raise ConfigurationError(
            f"{name} is listed after MUterCallback: it would put averaged weights into the model "
            f"after the memory of the last ones was built; list {name} before MUterCallback"
        )


def check_unmoved(omega: Tensor, view: ModelView) -> None:
    """Refuse parameters that moved after their memory was built.

    Args:
        omega: the memory's ω (p,).
        view: of the module.

    Raises:
        ConfigurationError: with how far they moved.
    """
    now = view.get()
    kept = omega.to(now.device).to(view.kept_as).double()
    if not torch.allclose(now, kept, rtol=1e-6, atol=1e-8):
        raise ConfigurationError(
            "a callback listed after MUterCallback changed the trained parameters by "
            f"{float(torch.linalg.vector_norm(now - kept)):.3g} when training ended, after their "
            "memory was built: list it before MUterCallback"
        )
