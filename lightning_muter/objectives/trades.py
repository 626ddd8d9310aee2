"""TRADES: the loss at the clean point, and how far the adversary can move the outputs from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muter.arguments import number
from lightning_muter.errors import ConfigurationError
from lightning_muter.objectives.base import Objective
from lightning_muter.objectives.link import IDENTITY
from lightning_muter.objectives.losses import LOSSES, PointLoss
from lightning_muter.objectives.output_curvature import (
    Categorical,
    OutputCurvature,
    restored_output,
)
from lightning_muter.objectives.torch_losses import TorchLoss

__all__ = ["TRADES", "BoundTRADES", "PairedOutput"]


@dataclass(frozen=True)
class TRADES:
    """O = l(z(x), y) + β KL(softmax z(x) ‖ softmax z(x + δ)), its δ the maximiser of the KL term.

    A value for ``MUterCallback(objective=TRADES(beta=6.0))``. A training batch is then
    [x, target, x_adversarial], and ``training_step`` may return ``TRADES(beta=6.0).loss(self,
    batch)``, or compute the same.

    Source: Zhang et al., Theoretically principled trade-off between robustness and accuracy, 2019;
    its curvature is ours (docs/theory.md).

    Attributes:
        beta: how much the divergence counts beside the loss at the clean point.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> x = torch.randn(4, 3)
        >>> batch = [x, torch.tensor([0, 1, 1, 0]), x + 0.1]
        >>> TRADES(beta=6.0).loss(model, batch).shape
        torch.Size([])
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", number("beta", self.beta, positive=True))

    def loss(
        self, module: nn.Module, batch: Sequence[Any], loss: nn.Module | None = None
    ) -> Tensor:
        """The mean of O over a batch [x, target, x_adversarial], for ``training_step``.

        Args:
            module: maps x (n, ...) to logits (n, C).
            batch: as the callback hands it over: inputs (n, ...), targets (n,), inputs (n, ...).
            loss: of the clean point, as the callback has it: a loss module of torch,
                ``nn.CrossEntropyLoss(label_smoothing=0.1)``; the cross-entropy by default.

        Returns:
            A number (), in the dtype of the logits and on their device; computed in float64.

        Raises:
            ConfigurationError: a batch without the perturbed inputs, another loss, or logits of
                fewer than two classes.
        """
        if len(batch) < 3:
            raise ConfigurationError(
                f"{self}.loss got a batch of {len(batch)} entries and needs [input, target, "
                "perturbed input], which MUterCallback(objective=...) makes of a training batch; "
                "in validation and test log the loss at the clean input"
            )
        outputs = module(batch[0]), module(batch[2])
        each = self.of(_clean_loss(loss)).outer(outputs, batch[1])
        return each.mean().to(outputs[0].dtype)

    def hand_over(self, batch: Any, perturbed: Tensor) -> None:
        """Put x + δ (n, ...) where ``training_step`` looks for it in a batch [x, target].

        Raises:
            ConfigurationError: the batch is no list.
        """
        if not isinstance(batch, list):
            raise ConfigurationError(
                f"a training batch is a {type(batch).__name__}; with objective={self} a list "
                "[input, target] is expected, which becomes [input, target, perturbed input]: "
                "return one from collate_fn"
            )
        batch.insert(2, perturbed)

    def trained_on(self, batch: Sequence[Any]) -> tuple[Tensor, ...]:
        """The inputs of a batch that was handed over, the perturbed ones last."""
        return (batch[0], batch[2])

    def of(self, loss: PointLoss) -> BoundTRADES:
        """The objective with the loss of a clean point."""
        return BoundTRADES(self.beta, loss)


@dataclass(frozen=True)
class BoundTRADES(Objective):
    """`TRADES` with the loss of a clean point."""

    beta: float
    point_loss: PointLoss
    even: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.point_loss.summed:
            raise ConfigurationError(
                f"TRADES(beta={self.beta:g}) is a mean over the batch, and its loss at the clean "
                "point has reduction='sum': use reduction='mean' for both"
            )

    @property
    def loss(self) -> PointLoss:
        return self.point_loss

    @property
    def asked(self) -> str:
        own = f"TRADES(beta={self.beta:g})"
        return f"{own}.loss(self, batch), for a batch [x, target, x_adversarial],"

    @cached_property
    def inner(self) -> PointLoss:
        """β KL of the perturbed outputs; its target are the clean ones."""

        def divergence(outputs: Tensor, clean: Tensor) -> Tensor:
            return self.beta * _divergence(clean, outputs)

        # a sum of log-probabilities, whose rounding stays where the divergence itself vanishes
        link = replace(IDENTITY, unit=self.beta)
        return PointLoss(f"TRADES(beta={self.beta:g})", divergence, classifies=False, link=link)

    def reference(self, clean: Callable[[], Tensor], targets: Tensor) -> Tensor:
        with torch.no_grad():
            return _logits(clean())

    def fixed(self, reference: Tensor, targets: Tensor) -> Tensor:
        return self.point_loss(reference, targets).double()

    def seen(self, clean: Tensor, perturbed: Tensor) -> tuple[Tensor, ...]:
        return (clean, perturbed)

    def outer(self, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        clean, perturbed = outputs
        return self.point_loss(clean, targets) + self.beta * _divergence(clean, perturbed)

    def derivatives(
        self, clean: Tensor, perturbed: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, PairedOutput]:
        """∂O in the clean logits and in the perturbed ones (n, C), and its second derivatives."""
        log_p, log_q = (F.log_softmax(_logits(z), dim=1) for z in (clean, perturbed))
        p, q, apart = log_p.exp(), log_q.exp(), log_p - log_q
        f = p * (apart - (p * apart).sum(dim=1, keepdim=True))
        r, s = self.point_loss.derivatives(clean, targets)
        second = PairedOutput(self.beta, s, p, q, f)
        return r + self.beta * f, self.beta * (q - p), second


@dataclass(frozen=True)
class PairedOutput:
    """∂²O of some points in their clean logits c and their perturbed ones a.

    ∂_aa = β S_q, ∂_ca = -β S_p, ∂_cc = S + β (S_p + diag f - f pᵀ - p fᵀ) with S_p = diag p - ppᵀ
    and f = p∘(u - pᵀu), u = log p - log q. ∂_cc can be indefinite.

    Attributes:
        beta: β.
        clean: S of the loss at the clean point.
        p: softmax of c (n, C).
        q: softmax of a (n, C).
        f: ∂_c KL (n, C).
    """

    beta: float
    clean: OutputCurvature
    p: Tensor
    q: Tensor
    f: Tensor

    def apply(self, c: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The products (n, C) with directions of the clean and of the perturbed logits (n, C)."""
        p, f = self.p, self.f
        along = (p * c).sum(dim=1, keepdim=True), (f * c).sum(dim=1, keepdim=True)
        own = Categorical(p).apply(c - a) + f * c - f * along[0] - p * along[1]
        other = Categorical(self.q).apply(a) - Categorical(p).apply(c)
        return self.clean.apply(c) + self.beta * own, self.beta * other

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """∂_cc, ∂_ca and ∂_aa (n, C, C)."""
        s_p, outer = Categorical(self.p).dense(), self.f.unsqueeze(2) * self.p.unsqueeze(1)
        own = s_p + torch.diag_embed(self.f) - outer - outer.mT
        second = self.beta * Categorical(self.q).dense()
        return self.clean.dense() + self.beta * own, -self.beta * s_p, second

    @property
    def sums_to_zero(self) -> bool:
        """Whether every block times 1 is 0: the divergence's are by their form."""
        return self.clean.sums_to_zero

    def entries(self, c: int) -> Tensor:
        """The entries (n, 2, 2) of ∂² at output c of both sides."""
        p, f = self.p[:, c], self.f[:, c]
        s_p = Categorical(self.p).entry(c, c)
        own = self.clean.entry(c, c) + self.beta * (s_p + f - 2 * f * p)
        s_q = Categorical(self.q).entry(c, c)
        pairs = torch.stack([own, -self.beta * s_p, -self.beta * s_p, self.beta * s_q], dim=1)
        return pairs.reshape(-1, 2, 2)

    def pulled(self, c: int, weight: Tensor) -> Tensor:
        """Row c of (∂_ca W, ∂_aa W) (n, 2, F) for W (C, F)."""
        rows = [-Categorical(self.p).row(c, weight), Categorical(self.q).row(c, weight)]
        return self.beta * torch.stack(rows, dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name, with one row a point."""
        clean = {f"clean_{name}": one for name, one in self.clean.tensors().items()}
        return {"p": self.p, "shares": self.q, "f": self.f, **clean}

    @classmethod
    def restore(cls, beta: float, tensors: Mapping[str, Tensor]) -> PairedOutput:
        """The inverse of `tensors`; others among them are left aside."""
        clean = {
            name.removeprefix("clean_"): one
            for name, one in tensors.items()
            if name.startswith("clean_")
        }
        return cls(beta, restored_output(clean), tensors["p"], tensors["shares"], tensors["f"])


def _clean_loss(loss: nn.Module | None) -> PointLoss:
    if loss is None:
        return LOSSES["cross_entropy"]
    if not isinstance(loss, nn.Module):
        raise ConfigurationError(
            f"loss={loss!r} must be a loss module of torch, as nn.CrossEntropyLoss("
            "label_smoothing=0.1), or None for the cross-entropy"
        )
    return TorchLoss.of(loss).point_loss


def _divergence(clean: Tensor, perturbed: Tensor) -> Tensor:
    """KL(softmax clean ‖ softmax perturbed) (n,), float64."""
    log_p, log_q = (F.log_softmax(_logits(z), dim=1) for z in (clean, perturbed))
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _logits(outputs: Tensor) -> Tensor:
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise ConfigurationError(
            f"TRADES compares the shares of classes, and the outputs have shape "
            f"{tuple(outputs.shape)}: give the head one output a class, two at the least"
        )
    return outputs.double()
