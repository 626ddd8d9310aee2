"""Per-point losses and their derivatives in the outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, vmap

from lightning_muter.errors import ConfigurationError
from lightning_muter.linalg.rows import own_scale
from lightning_muter.objectives.link import IDENTITY, SOFTPLUS, Link
from lightning_muter.objectives.output_curvature import (
    Categorical,
    Diagonal,
    Full,
    OutputCurvature,
)

__all__ = ["LOG_ODDS", "LOSSES", "LossFunction", "PointLoss", "Slope", "TargetKind"]

LossFunction = Callable[[Tensor, Tensor], Tensor]
#: what the targets of a loss are: numbers of classes, 0 or 1, shares in [0, 1], any numbers
TargetKind = Literal["classes", "binary", "shares", "numbers"]


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets.long(), reduction="none")


def _wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sign (n,) of the other label: of labels 0 and 1 it is 1 and -1."""
    return 1.0 - 2.0 * targets.reshape(outputs.shape[0]).to(outputs)


def _logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    logits = outputs.reshape(len(outputs))
    return F.softplus(_wrong(logits, targets) * logits)


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    values = outputs.reshape(len(outputs))
    return 0.5 * (values - targets.reshape(len(values)).to(values)).square()


def _single_precision(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _class_odds(outputs: Tensor, targets: Tensor) -> Tensor:
    """log Σ_{j≠y} exp(z_j) - z_y: the log-odds of all other labels against the true one."""
    if outputs.shape[1] < 2:
        raise ConfigurationError(
            f"outputs of shape {tuple(outputs.shape)} are of one class, which every point is of: a "
            "cross-entropy needs two outputs at the least; use loss='logistic' for one logit"
        )
    z = _single_precision(outputs)
    ignored = targets == -100  # as torch's cross-entropy has it
    label = targets.long().masked_fill(ignored, 0).unsqueeze(1)
    others = z.masked_fill(
        torch.zeros_like(z, dtype=torch.bool).scatter(1, label, True), -torch.inf
    )
    odds = others.logsumexp(dim=1) - z.gather(1, label).squeeze(1)
    return odds.masked_fill(ignored, -torch.inf)


def _sign_odds(outputs: Tensor, targets: Tensor) -> Tensor:
    """The log-odds of the other label of two, from one logit."""
    return _sign_rise(outputs, targets)[0]


def _sign_rise(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`_sign_odds` and their derivative (n, 1)."""
    logits = _single_precision(outputs.reshape(outputs.shape[0]))
    wrong = _wrong(logits, targets)
    return wrong * logits, wrong.unsqueeze(1)


def _log_odds(outputs: Tensor, targets: Tensor) -> Tensor:
    """Log-odds (n,) of a wrong label, for outputs of any classifier."""
    one_logit = outputs.ndim == 1 or outputs.shape[1] == 1
    return _sign_odds(outputs, targets) if one_logit else _class_odds(outputs, targets)


def _cross_entropy_derivatives(z: Tensor, y: Tensor) -> tuple[Tensor, OutputCurvature]:
    q = z.softmax(dim=1)
    true = F.one_hot(y.long(), z.shape[1]).bool()
    # 1 - q_j is the sum of the others: a difference would lose it where q_j rounds to 1
    r = torch.where(true, -q.masked_fill(true, 0.0).sum(dim=1, keepdim=True), q)
    return r, Categorical(q)


def _logistic_derivatives(z: Tensor, y: Tensor) -> tuple[Tensor, OutputCurvature]:
    logits = z.reshape(-1, 1)
    wrong = _wrong(logits, y).unsqueeze(1)
    odds = wrong * logits
    share = torch.sigmoid(odds)  # of the other label
    return wrong * share, Diagonal(share * torch.sigmoid(-odds))


def _squared_derivatives(z: Tensor, y: Tensor) -> tuple[Tensor, OutputCurvature]:
    r = z.reshape(-1, 1) - y.reshape(-1, 1).to(z)
    return r, Diagonal(torch.ones_like(r))


def _squared_rise(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss (n,) and its derivative (n, 1)."""
    r = _squared_derivatives(outputs, targets)[0]
    return 0.5 * r.squeeze(1).square(), r


@dataclass(frozen=True)
class Slope:
    """What an adversary ascends at a batch: levels (n,) and their gradient in the inputs.

    The gradient is ``scaled`` (n, d) times ``scale`` (n, 1), kept apart because the product may
    underflow in the dtype that the network computes in.
    """

    level: Tensor
    scaled: Tensor
    scale: Tensor

    @property
    def missing(self) -> Tensor:
        """Points (n,) whose gradient is exactly zero: nothing says where to go."""
        return (self.scaled == 0).all(dim=1)


@dataclass(frozen=True)
class PointLoss:
    """A per-point loss l(z, y) with first and second derivatives in z.

    ``function`` maps outputs (n, C) and targets to losses (n,). ``closed_form`` maps the same to
    r (n, C) and S; without it both come from ``torch.func`` point by point. ``level``
    maps them to what an adversary ascends in the loss's place, and ``link`` that to the loss;
    without it the loss itself is ascended. ``rising`` maps them to what is ascended
    and its derivative (n, C), where that is known. ``classifies``: outputs are logits of classes.
    ``target_kind`` says what its targets have to be; points of the class ``ignored`` are no part of
    training's mean, so that no point may have it. ``summed``: training's loss is the sum over a
    batch, not its mean.
    """

    name: str
    function: LossFunction
    closed_form: Callable[[Tensor, Tensor], tuple[Tensor, OutputCurvature]] | None = None
    one_output: bool = False
    level: LossFunction | None = None
    link: Link = IDENTITY
    rising: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    classifies: bool = True
    target_kind: TargetKind = "numbers"
    ignored: int | None = None
    summed: bool = False

    def _check_outputs(self, outputs: Tensor) -> None:
        if self.one_output and outputs.numel() != outputs.shape[0]:
            raise ConfigurationError(
                f"loss {self.name!r} needs one output a point, got outputs of shape "
                f"{tuple(outputs.shape)}; use a head of one output or another loss"
            )

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self._check_outputs(outputs)
        losses = self.function(outputs, targets)
        if losses.shape != (len(outputs),):
            raise ConfigurationError(
                f"loss {self.name!r} returned shape {tuple(losses.shape)} for {len(outputs)} "
                "points; it must return one value a point (reduction='none')"
            )
        return losses

    def derivatives(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, OutputCurvature]:
        """r = ∂_z l (n, C) and S = ∂_zz l at detached outputs (n, C)."""
        if self.closed_form is not None:
            return self.closed_form(outputs, targets)

        def one(z: Tensor, y: Tensor) -> Tensor:
            return self.function(z.unsqueeze(0), y.unsqueeze(0)).squeeze(0)

        s = vmap(hessian(one))(outputs, targets)
        return vmap(grad(one))(outputs, targets), Full(s)

    def slope(self, module: Callable[[Tensor], Tensor], x: Tensor, targets: Tensor) -> Slope:
        """What an adversary ascends at inputs x (n, ...), in the module's own dtype.

        Each point's derivative in the outputs is divided by its largest entry before it goes back
        through the module, so that a small loss does not vanish on the way.
        """
        with torch.enable_grad():
            inputs = x.detach().requires_grad_(True)
            outputs = module(inputs)
            level, r = self.rise(outputs.detach(), targets)
            unit, scale = own_scale(r)
            (g,) = torch.autograd.grad(outputs, inputs, unit.reshape(outputs.shape))
        return Slope(level, g.reshape(len(x), -1), scale)

    def rise(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What an adversary ascends at detached outputs: levels (n,), derivatives in them (n, C).

        Raises:
            ConfigurationError: outputs that do not fit the loss.
        """
        if self.rising is not None:
            self._check_outputs(outputs)
            return self.rising(outputs, targets)
        with torch.enable_grad():
            at = outputs.detach().requires_grad_(True)
            if self.level is None:
                level = self(at, targets)
            else:
                self(outputs, targets)  # for what it says of outputs that do not fit
                level = self.level(at, targets)
            (r,) = torch.autograd.grad(level.sum(), at)
        return level.detach(), r.reshape(len(outputs), -1)

    def is_correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Which points are classified right (n,), or None where the outputs are no classes."""
        if not self.classifies:
            return None
        if outputs.ndim == 1 or outputs.shape[1] == 1:
            return (outputs.reshape(-1) > 0) == (targets.reshape(-1) > 0.5)
        if targets.shape == outputs.shape:  # several labels a point: all of them
            return ((outputs > 0) == (targets > 0.5)).all(dim=1)
        return outputs.argmax(dim=1) == targets


LOSSES: dict[str, PointLoss] = {
    "cross_entropy": PointLoss(
        "cross_entropy",
        _cross_entropy,
        _cross_entropy_derivatives,
        level=_class_odds,
        link=SOFTPLUS,
        target_kind="classes",
    ),
    "logistic": PointLoss(
        "logistic",
        _logistic,
        _logistic_derivatives,
        one_output=True,
        level=_sign_odds,
        link=SOFTPLUS,
        rising=_sign_rise,
        target_kind="binary",
    ),
    "squared": PointLoss(
        "squared",
        _squared,
        _squared_derivatives,
        one_output=True,
        rising=_squared_rise,
        classifies=False,
    ),
}

#: what an attack on a classifier's accuracy ascends, whatever it was trained with
LOG_ODDS = PointLoss("log_odds", _log_odds)
