"""Modules of half precision: differentiated in single precision, rounded when written back."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError, RemovalError
from lightning_muter.lightning.flavour import pl, rank_zero_info
from lightning_muter.models import ModelView

__all__ = ["check_precision", "check_provable", "rounding_of"]

_SHARE = 0.1  # of an update that rounding may take away without a word
_DROWNED = 0.5  # from here on it is refused: the model would hardly be nearer to ω^u than before


def check_precision(trainer: pl.Trainer, view: ModelView) -> None:
    """Say what becomes of a module of half precision; refuse where it cannot be.

    Raises:
        ConfigurationError: a strategy holds on to how the parameters are kept.
    """
    if view.kept_as == view.dtype:
        return
    if isinstance(trainer.strategy, pl.strategies.DDPStrategy):
        raise ConfigurationError(
            f"precision={trainer.precision!r} with a distributed strategy: Newton's steps and "
            "Stage I need the weights in single precision for a while, which the strategy's hooks "
            "on them do not survive; use precision='bf16-mixed', or one process"
        )
    rank_zero_info(
        f"the weights are kept in {_name(view)}: maximisers, Newton's steps, Stage I and requests "
        "are computed in float32, and weights are rounded when they are written back"
    )


def check_provable(view: ModelView, proves: bool) -> None:
    """Refuse to prove something of weights that are rounded afterwards.

    Raises:
        ConfigurationError: with the way out.
    """
    if proves and view.kept_as != view.dtype:
        raise ConfigurationError(
            f"bound and certificate are of weights that are not rounded, and these are kept in "
            f"{_name(view)}: train with precision='bf16-mixed', which keeps them in float32"
        )


def rounding_of(omega: Tensor, view: ModelView, update: float) -> tuple[str, ...]:
    """What rounding takes away of an update to ω (p,), where it is much.

    Args:
        omega: the weights that are to be written.
        view: of the module that they are written to.
        update: the update's length.

    Raises:
        RemovalError: rounding would take away half of the update or more.
    """
    if view.kept_as == view.dtype or update == 0.0:
        return ()
    moved = float(torch.linalg.vector_norm(omega.to(view.kept_as).double() - omega))
    if moved >= _DROWNED * update:
        raise RemovalError(
            f"the update is {update:.3g} long, and rounding its weights to {_name(view)} would "
            f"move them by {moved:.3g}: most of it would be lost; nothing was changed; ask for "
            "more points at once, or train with precision='bf16-mixed', which keeps the weights in "
            "float32"
        )
    if moved < _SHARE * update:
        rank_zero_info(f"rounding to {_name(view)} moves the weights by {moved:.3g}")
        return ()
    return (
        f"the weights are kept in {_name(view)}: rounding moved them by {moved:.3g}, "
        f"{moved / update:.0%} of the update's length; precision='bf16-mixed' keeps all of it",
    )


def _name(view: ModelView) -> str:
    return str(view.kept_as).removeprefix("torch.")
