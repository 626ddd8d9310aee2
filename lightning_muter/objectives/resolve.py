"""The loss that a user names: by a name, a module of torch's, or a function of one's own."""

from __future__ import annotations

from typing import Any, Union

from torch import nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.objectives.base import Objective
from lightning_muter.objectives.losses import LOSSES, LossFunction, PointLoss
from lightning_muter.objectives.refused import way_out_of
from lightning_muter.objectives.standard import Standard
from lightning_muter.objectives.torch_losses import TorchLoss
from lightning_muter.objectives.trades import TRADES

__all__ = ["AnyLoss", "as_value", "resolve_loss", "resolve_objective"]

#: what a user can give as ``loss=``
AnyLoss = Union[str, LossFunction, nn.Module, TorchLoss]  # noqa: UP007 - read by jsonargparse


def as_value(loss: Any) -> Any:
    """A loss module of torch's as the value that it is, anything else as it comes.

    One with ``reduction="none"`` gives the losses of the points itself, as a function does.
    """
    own = isinstance(loss, nn.Module) and type(loss).__module__.startswith("torch.nn.")
    reduced = own and getattr(loss, "reduction", None) != "none"
    return TorchLoss.of(loss) if reduced else loss


def resolve_loss(loss: AnyLoss | PointLoss) -> PointLoss:
    """The `PointLoss` of a name, of a loss module of torch's, or of a callable.

    A callable of one's own maps (outputs, targets) to per-point losses (n,).

    Raises:
        ConfigurationError: the name is unknown, the module is no mean over points, or the value is
            not callable.
    """
    value = as_value(loss)
    if isinstance(value, PointLoss):
        return value
    if isinstance(value, TorchLoss):
        return value.point_loss
    if isinstance(value, str):
        if value not in LOSSES:
            if instead := way_out_of(value):
                raise ConfigurationError(f"loss={value!r} is no loss of a point: {instead}")
            raise ConfigurationError(
                f"loss={value!r} is unknown; expected one of {sorted(LOSSES)}, a loss module such "
                "as nn.CrossEntropyLoss(label_smoothing=0.1), or a callable (outputs, targets) -> "
                "per-point losses"
            )
        return LOSSES[value]
    if isinstance(value, type):
        raise ConfigurationError(
            f"loss={value.__name__} is a class: give one of its objects, loss={value.__name__}()"
        )
    if not callable(value):
        raise ConfigurationError(f"loss={value!r} is neither a name nor a callable")
    return PointLoss(getattr(value, "__name__", type(value).__name__), value)


def resolve_objective(objective: TRADES | None, loss: AnyLoss | PointLoss) -> Objective:
    """What training minimises: adversarial training's loss, or the objective with it.

    Raises:
        ConfigurationError: there is no such objective or loss.
    """
    point_loss = resolve_loss(loss)
    if objective is None:
        return Standard(point_loss)
    if not isinstance(objective, TRADES):
        named = objective if isinstance(objective, str) else type(objective).__name__
        instead = way_out_of(named)
        raise ConfigurationError(
            f"objective={objective!r} must be TRADES(beta=...), or None for adversarial training"
            f"{'; ' * bool(instead)}{instead}"
        )
    return objective.of(point_loss)
