"""Callbacks that put averaged weights into the module when training ends."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.flavour import pl

__all__ = ["check_order"]

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
