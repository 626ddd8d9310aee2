"""Per-point losses and their derivatives in the outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, vmap

from lightning_muter.errors import ConfigurationError

__all__ = ["LOSSES", "LossFunction", "PointLoss", "resolve_loss"]

LossFunction = Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets.long(), reduction="none")


def _logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    logits = outputs.reshape(len(outputs))
    return F.softplus(-(2.0 * targets.reshape(len(logits)).to(logits) - 1.0) * logits)


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    values = outputs.reshape(len(outputs))
    return 0.5 * (values - targets.reshape(len(values)).to(values)).square()


def _cross_entropy_derivatives(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    q = z.softmax(dim=1)
    r = q - F.one_hot(y.long(), z.shape[1]).to(z)
    return r, torch.diag_embed(q) - q.unsqueeze(2) * q.unsqueeze(1)


def _logistic_derivatives(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.sigmoid(z.reshape(-1, 1))
    return q - y.reshape(-1, 1).to(q), (q * (1 - q)).unsqueeze(2)


def _squared_derivatives(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r = z.reshape(-1, 1) - y.reshape(-1, 1).to(z)
    return r, torch.ones_like(r).unsqueeze(2)


@dataclass(frozen=True)
class PointLoss:
    """A per-point loss l(z, y) with first and second derivatives in z.

    ``function`` maps outputs (n, C) and targets to losses (n,). ``closed_form`` maps the same to
    r (n, C) and S (n, C, C); without it both come from ``torch.func`` point by point.
    """

    name: str
    function: LossFunction
    closed_form: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    one_output: bool = False

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.one_output and outputs.numel() != len(outputs):
            raise ConfigurationError(
                f"loss {self.name!r} needs one output a point, got outputs of shape "
                f"{tuple(outputs.shape)}; use a head of one output or another loss"
            )
        losses = self.function(outputs, targets)
        if losses.shape != (len(outputs),):
            raise ConfigurationError(
                f"loss {self.name!r} returned shape {tuple(losses.shape)} for {len(outputs)} "
                "points; it must return one value a point (reduction='none')"
            )
        return losses

    def derivatives(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """r = ∂_z l (n, C) and S = ∂_zz l (n, C, C) at detached outputs (n, C)."""
        if self.closed_form is not None:
            return self.closed_form(outputs, targets)

        def one(z: Tensor, y: Tensor) -> Tensor:
            return self.function(z.unsqueeze(0), y.unsqueeze(0)).squeeze(0)

        return vmap(grad(one))(outputs, targets), vmap(hessian(one))(outputs, targets)

    def is_correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Which points are classified right (n,), or None where the outputs are no classes."""
        if self.name == "squared":
            return None
        if outputs.ndim == 1 or outputs.shape[1] == 1:
            return (outputs.reshape(-1) > 0) == (targets.reshape(-1) > 0.5)
        return outputs.argmax(dim=1) == targets


LOSSES: dict[str, PointLoss] = {
    "cross_entropy": PointLoss("cross_entropy", _cross_entropy, _cross_entropy_derivatives),
    "logistic": PointLoss("logistic", _logistic, _logistic_derivatives, one_output=True),
    "squared": PointLoss("squared", _squared, _squared_derivatives, one_output=True),
}


def resolve_loss(loss: str | LossFunction | PointLoss) -> PointLoss:
    """The `PointLoss` for a name of ``LOSSES`` or a callable (outputs, targets) -> (n,).

    Raises:
        ConfigurationError: the name is unknown or the value is not callable.
    """
    if isinstance(loss, PointLoss):
        return loss
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ConfigurationError(
                f"loss={loss!r} is unknown; expected one of {sorted(LOSSES)} or a callable "
                "(outputs, targets) -> per-point losses"
            )
        return LOSSES[loss]
    if not callable(loss):
        raise ConfigurationError(f"loss={loss!r} is neither a name nor a callable")
    return PointLoss(getattr(loss, "__name__", type(loss).__name__), loss)
