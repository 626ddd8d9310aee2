"""How a loss grows with the level that an adversary ascends in its place.

The losses of a classifier are softplus of a log-odds t. Where the model is sure of itself,
softplus(t) and its derivative σ(t) underflow, and long before that the probability of the true
label rounds to 1: then a gradient of the loss has no direction any more, or a wrong one. The level
t still has. It is ascended instead, and the loss is read off at the end. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_muter.linalg.rows import row_norm

__all__ = ["IDENTITY", "SOFTPLUS", "Link"]


#: what a threat is shown of a gradient: nothing smaller than exp(-460) = 1e-200 or larger than its
#: inverse. Threats go by directions, and the own scale of a smoothed one is far from either end.
_LOG_SHOWN = 460.0
#: sizes that are shown as they are, and whose squares fit
_ORDINARY = 1e-140, 1e140


@dataclass(frozen=True)
class Link:
    """An increasing function from levels (n,) to losses (n,).

    Attributes:
        loss: level -> loss.
        log_rate: level -> log of the loss's derivative in it, which does not underflow.
        gain: level before, level after -> (loss after - loss before) / (derivative before).
        unit: a level's natural unit, below whose rounding no difference counts; 0 without one.
    """

    loss: Callable[[Tensor], Tensor]
    log_rate: Callable[[Tensor], Tensor]
    gain: Callable[[Tensor, Tensor], Tensor]
    unit: float

    def gradient(self, level: Tensor, slope: Tensor) -> Tensor:
        """The loss's own gradient (n, d), which may underflow to zero where the slope does not."""
        return slope * self.log_rate(level).exp().unsqueeze(1)

    def weight(self, level: Tensor, slope: Tensor) -> Tensor:
        """What a slope (n, d) is multiplied by (n, 1) to be shown to a threat.

        That is the loss's gradient, or one along it where it is too small or too large for
        arithmetic.
        """
        log_rate = self.log_rate(level).unsqueeze(1)
        rate = log_rate.exp()
        size = rate * torch.linalg.vector_norm(slope, dim=1, keepdim=True)
        if torch.equal(size.clamp(*_ORDINARY), size):
            return rate
        norm = row_norm(slope)
        log_size = log_rate + norm.log()
        shown = log_size.clamp(-_LOG_SHOWN, _LOG_SHOWN)
        ordinary = (shown == log_size) | (norm == 0)
        return torch.where(ordinary, rate, shown.exp() / norm)


def _softplus_gain(before: Tensor, after: Tensor) -> Tensor:
    """log(1 + σ(t) (exp(t' - t) - 1)) / σ(t): the limit exp(t' - t) - 1 where σ underflows."""
    rate = before.sigmoid()
    growth = torch.expm1((after - before).clamp(max=700.0))  # farther up its sign alone counts
    direct = (F.softplus(after) - F.softplus(before)) / rate
    relative = torch.where(rate > 0, torch.log1p(rate * growth) / rate, growth)
    return torch.where(before > 0, direct, relative)


#: the loss itself is ascended
IDENTITY = Link(
    loss=lambda level: level,
    log_rate=torch.zeros_like,
    gain=lambda before, after: after - before,
    unit=0.0,
)

#: the log-odds of the wrong labels are ascended, and the loss is their softplus
SOFTPLUS = Link(loss=F.softplus, log_rate=F.logsigmoid, gain=_softplus_gain, unit=1.0)
