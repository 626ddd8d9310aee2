"""Which targets a loss can take: checked before training, so that no label is misread."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.objectives.losses import PointLoss, TargetKind

__all__ = ["check_targets"]


def _shown(values: Tensor) -> str:
    """A few of the distinct values, for a person."""
    distinct = sorted(set(values.reshape(-1).tolist()))
    shown = ", ".join(f"{v:g}" for v in distinct[:5])
    return shown + (", ..." if len(distinct) > 5 else "")


def _classes(name: str, targets: Tensor, width: int) -> None:
    bad = targets[(targets < 0) | (targets >= width) | (targets != targets.floor())]
    if bad.numel():
        raise ConfigurationError(
            f"loss={name!r} with {width} outputs needs integer classes 0 to {width - 1}, "
            f"{bad.numel()} targets are others: {_shown(bad)}; relabel them, or take points "
            "without a class (as -100) out of the training data set"
        )


def _zero_or_one(name: str, targets: Tensor, width: int) -> None:
    bad = targets[(targets != 0) & (targets != 1)]
    if bad.numel():
        raise ConfigurationError(
            f"loss={name!r} needs targets 0 or 1, {bad.numel()} targets are others: "
            f"{_shown(bad)}; labels -1 and +1 become 0 and 1 by (y + 1) / 2 in the data set, with "
            "torch's binary_cross_entropy_with_logits in training_step"
        )


def _shares(name: str, targets: Tensor, width: int) -> None:
    bad = targets[(targets < 0) | (targets > 1)]
    if bad.numel():
        raise ConfigurationError(
            f"loss={name!r} needs targets in [0, 1], {bad.numel()} targets are others: "
            f"{_shown(bad)}; mend the labels in the data set"
        )


def _any_number(name: str, targets: Tensor, width: int) -> None:
    """Every finite number is a target."""


_CHECKS: dict[TargetKind, Callable[[str, Tensor, int], None]] = {
    "classes": _classes,
    "binary": _zero_or_one,
    "shares": _shares,
    "numbers": _any_number,
}


def check_targets(loss: PointLoss, targets: Tensor, width: int) -> None:
    """Refuse targets that ``loss`` would misread.

    Args:
        loss: the loss a point; one of the user's own takes every finite target.
        targets: of some points (n, ...).
        width: outputs a point.

    Raises:
        ConfigurationError: NaN, infinite, or values that the loss has no meaning for.

    Example:
        >>> from lightning_muter.objectives.losses import LOSSES
        >>> check_targets(LOSSES["logistic"], torch.tensor([0.0, 1.0]), 1)
    """
    if targets.is_floating_point() and not bool(torch.isfinite(targets).all()):
        raise ConfigurationError("training targets are NaN or infinite: mend the data set")
    if loss.ignored is not None and bool((targets == loss.ignored).any()):
        raise ConfigurationError(
            f"the loss has ignore_index={loss.ignored}, and {int((targets == loss.ignored).sum())} "
            "training points are of that class: its mean is over the other points of a batch, "
            "which is no sum over points; leave them out of the training data set"
        )
    _CHECKS[loss.target_kind](loss.name, targets, width)
