"""Torch's own loss modules as losses of a point, by their own arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.objectives.losses import LOSSES, PointLoss
from lightning_muter.objectives.output_curvature import Diagonal, OutputCurvature

__all__ = ["TorchLoss"]


@dataclass(frozen=True)
class TorchLoss:
    """A loss module of ``torch.nn`` that is a mean over the points of a batch, or their sum.

    Attributes:
        name: of its class in ``torch.nn``.
        options: its arguments that are not the default's, as plain data.

    Example:
        >>> loss = TorchLoss.of(nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> loss.to_dict()
        {'torch': 'CrossEntropyLoss', 'label_smoothing': 0.1}
        >>> TorchLoss.from_dict(loss.to_dict()) == loss
        True
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> TorchLoss:
        """The value of a module.

        Raises:
            ConfigurationError: its class is not known, or it is no mean over points.
        """
        name = type(module).__name__
        if getattr(nn, name, None) is not type(module) or name not in _KINDS:
            raise ConfigurationError(
                f"loss={name} is no loss module that is known; expected one of {sorted(_KINDS)} of "
                "torch.nn, a name, or a function (outputs, targets) -> per-point losses"
            )
        if module.reduction not in ("mean", "sum"):
            raise ConfigurationError(
                f"loss={name}(reduction={module.reduction!r}): training's loss has to be the mean "
                "or the sum over the batch; use reduction='mean'"
            )
        if getattr(module, "weight", None) is not None:
            raise ConfigurationError(
                f"loss={name}(weight=...) divides by the batch's own sum of weights, or weighs "
                "places of a batch: it is no sum over points. Give every point its weight by a "
                "WeightedRandomSampler, or write the weighted sum as a function (outputs, targets) "
                "-> per-point losses and train with its mean"
            )
        named = (*_KINDS[name].options, "reduction")
        found = {one: _plain(getattr(module, one)) for one in named}
        default = {one: _plain(getattr(type(module)(), one)) for one in found}
        changed = {one: value for one, value in found.items() if value != default[one]}
        return cls(name, tuple(sorted(changed.items())))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TorchLoss:
        """The inverse of `to_dict`."""
        options = {name: value for name, value in data.items() if name != "torch"}
        known = (*_KINDS[data["torch"]].options, "reduction")
        if options.keys() - set(known):
            raise ValueError(
                f"{data['torch']} has no options {sorted(options.keys() - set(known))}"
            )
        fixed = {name: _plain(value) for name, value in options.items()}
        return cls(data["torch"], tuple(sorted(fixed.items())))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        options = {name: list(v) if isinstance(v, tuple) else v for name, v in self.options}
        return {"torch": self.name, **options}

    @property
    def point_loss(self) -> PointLoss:
        """The loss of a point, with its derivatives."""
        options = dict(self.options)
        summed = options.get("reduction") == "sum"
        return replace(_KINDS[self.name].build(options), summed=summed)


def _plain(value: Any) -> Any:
    value = value.tolist() if isinstance(value, Tensor) else value
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class _Kind:
    options: tuple[str, ...]
    build: Callable[[dict[str, Any]], PointLoss]


def _cross_entropy(options: dict[str, Any]) -> PointLoss:
    """l = Σ_j p_j (-log q_j) with p = (1 - α) e_y + α / C; r = q - p, S as without smoothing."""
    alpha, ignored = options.get("label_smoothing", 0.0), options.get("ignore_index")
    own = LOSSES["cross_entropy"]
    if alpha == 0:
        return replace(own, ignored=ignored)

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets.long(), reduction="none", label_smoothing=alpha)

    def derivatives(z: Tensor, y: Tensor) -> tuple[Tensor, OutputCurvature]:
        r, s = own.derivatives(z, y)
        true = F.one_hot(y.long(), z.shape[1]).to(r)
        return r + alpha * (true - 1.0 / z.shape[1]), s

    name = f"CrossEntropyLoss(label_smoothing={alpha})"
    return PointLoss(name, losses, derivatives, target_kind="classes", ignored=ignored)


def _terms(options: dict[str, Any], z: Tensor) -> int:
    """What torch divides the sum over a point's outputs (n, C) by: C, or 1 where it sums."""
    return 1 if options.get("reduction") == "sum" else z.shape[1]


def _binary(options: dict[str, Any]) -> PointLoss:
    """The mean over labels of w_j (softplus(z_j) - y_j z_j), w_j the weight of a positive label."""
    positive = options.get("pos_weight")

    def parts(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = z.reshape(len(z), -1)
        labels = y.reshape(z.shape).to(z)
        scale = torch.ones_like(z[0]) if positive is None else z.new_tensor(positive)
        return labels, 1.0 + (scale - 1.0) * labels

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        z = outputs.reshape(len(outputs), -1)
        labels, _ = parts(outputs, targets)
        scale = None if positive is None else z.new_tensor(positive)
        each = F.binary_cross_entropy_with_logits(z, labels, reduction="none", pos_weight=scale)
        return each.sum(dim=1) / _terms(options, z)

    def derivatives(z: Tensor, y: Tensor) -> tuple[Tensor, OutputCurvature]:
        z = z.reshape(len(z), -1)
        labels, weights = parts(z, y)
        # w y + 1 - y is the weight of a label's term, w y what pulls upwards
        upward = weights * labels
        r = (weights * torch.sigmoid(z) - upward) / _terms(options, z)
        curvature = weights * torch.sigmoid(z) * torch.sigmoid(-z) / _terms(options, z)
        return r, Diagonal(curvature)

    return PointLoss("BCEWithLogitsLoss", losses, derivatives, target_kind="shares")


def _squares(options: dict[str, Any]) -> PointLoss:
    """The mean over outputs of (z_j - y_j)²."""

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        z = outputs.reshape(len(outputs), -1)
        return (z - targets.reshape(z.shape).to(z)).square().sum(dim=1) / _terms(options, z)

    def derivatives(z: Tensor, y: Tensor) -> tuple[Tensor, OutputCurvature]:
        z = z.reshape(len(z), -1)
        r = 2.0 * (z - y.reshape(z.shape).to(z)) / _terms(options, z)
        return r, Diagonal(torch.full_like(z, 2.0 / _terms(options, z)))

    return PointLoss("MSELoss", losses, derivatives, classifies=False)


_KINDS: dict[str, _Kind] = {
    "BCEWithLogitsLoss": _Kind(("pos_weight",), _binary),
    "CrossEntropyLoss": _Kind(("ignore_index", "label_smoothing"), _cross_entropy),
    "MSELoss": _Kind((), _squares),
}
