"""The inner maximum of one linear output in closed form, through the one number that it hinges on.

A perturbation δ moves the output z = w·x + b by w·δ. With a the level that the adversary raises
(minus the margin, or the absolute residual), l the loss of it, c the convex conjugate of l, and

    E(ρ) = max_δ [ρ w·δ + merit(δ)]

over the threat's set, the inner maximum is max_ρ [ρ a - c(ρ) + E(ρ)], a problem in one number a
point: ρ, the slope of the loss at the maximum. Source: ours (docs/certificates.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_muter.unlearning.reach import Reach

__all__ = ["LevelLoss", "Logistic", "Squared"]

_ROWS = 4096
_NEWTON = 60
#: of the slopes: what a maximum loses by it is of its square
_TOL = 1e-11
#: log-odds of the slopes between which the inner problem is searched for a second maximum
_LOW, _HIGH, _COUNT = -60.0, 36.0, 961
#: log-odds that are 0 or 1 as a slope
_END = 745.0


class LevelLoss(ABC):
    """A loss of the level a (n,) that the adversary raises, and its inner maximum."""

    #: the largest second derivative
    smoothness: ClassVar[float]

    @property
    @abstractmethod
    def kinked(self) -> bool:
        """Whether two perturbations of a point can tie, at a kink in ω."""

    @abstractmethod
    def level(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """a and da/dz (n,) of outputs z (n,) and targets y (n,)."""

    @abstractmethod
    def value(self, level: Tensor) -> Tensor:
        """l (n,)."""

    @abstractmethod
    def slope(self, level: Tensor) -> Tensor:
        """l' (n,) ≥ 0."""

    @abstractmethod
    def conjugate_bend(self, rho: Tensor) -> Tensor:
        """c'' (n,), the inverse of l'' where l' is ρ."""

    def maximum(self, level: Tensor, reach: Reach, w: Tensor) -> Tensor:
        """ρ (n,) at the global inner maximum; of one perturbation it is l' where that leads."""
        if reach.rigid:
            return self.slope(level + reach.slope(level, w))
        return self._searched(level, reach, w)

    @abstractmethod
    def _searched(self, level: Tensor, reach: Reach, w: Tensor) -> Tensor:
        """ρ (n,) where a - c'(ρ) + E'(ρ) is zero, at the highest of such maxima."""

    @abstractmethod
    def conjugate_slope(self, rho: Tensor) -> Tensor:
        """c' (n,), the level whose slope is ρ."""

    def gap(self, level: Tensor, rho: Tensor, reach: Reach, w: Tensor) -> Tensor:
        """What the inner maximum (n,) may exceed its value at ``rho`` by, at the most.

        Beside a maximum that is the square of what is left of a - c'(ρ) + E'(ρ), over its slope.
        """
        rest = level - self.conjugate_slope(rho) + reach.slope(rho, w)
        return rest.square() / (self.conjugate_bend(rho) - reach.bend(rho, w)).clamp(min=1e-9)

    def rounded(self, width: float) -> LevelLoss:
        """The loss with its kink, where it has one, rounded off over a width."""
        return self

    def folding(self, level: Tensor, rho: Tensor, stiff: Tensor) -> Tensor:
        """The curvature (n,) along z of points between the two sides of a kink, over 1 - t².

        Args:
            level: a (n,).
            rho: the slopes at the maximum (n,).
            stiff: the curvature (n,) of the points beside it.
        """
        return stiff


@dataclass(frozen=True)
class Squared(LevelLoss):
    """½ a² of the absolute residual a: its inner problem has one maximum with ρ ≥ 0.

    Attributes:
        width: μ; a is √((z - y)² + μ²), so that a robust loss has no kink where z is y; 0 for a
            itself.
    """

    smoothness: ClassVar[float] = 1.0
    width: float = 0.0

    @property
    def kinked(self) -> bool:
        return self.width == 0

    def rounded(self, width: float) -> LevelLoss:
        return Squared(width)

    def level(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        residual = z - y
        if self.width == 0:
            return residual.abs(), torch.where(residual < 0, -1.0, 1.0).to(residual)
        level = torch.hypot(residual, torch.full_like(residual, self.width))
        return level, residual / level

    def value(self, level: Tensor) -> Tensor:
        return 0.5 * level.square()

    def slope(self, level: Tensor) -> Tensor:
        return level

    def conjugate_bend(self, rho: Tensor) -> Tensor:
        return torch.ones_like(rho)

    def conjugate_slope(self, rho: Tensor) -> Tensor:
        return rho

    def _searched(self, level: Tensor, reach: Reach, w: Tensor) -> Tensor:
        """a - ρ + E'(ρ) is concave: Newton's method from the right falls onto its one root."""
        rho = level + reach.length(len(w)) * float(w.norm())
        for _ in range(_NEWTON):
            step = (rho - level - reach.slope(rho, w)) / (1 - reach.bend(rho, w)).clamp(min=1e-12)
            after = (rho - step).clamp(min=0.0)
            if bool((rho - after <= _TOL * rho).all()):
                break
            rho = after
        return rho

    def folding(self, level: Tensor, rho: Tensor, stiff: Tensor) -> Tensor:
        return stiff if self.width == 0 else rho / level


@dataclass(frozen=True)
class Logistic(LevelLoss):
    """softplus(a) of minus the margin; the smoothed L∞ ball can have two inner maxima."""

    smoothness: ClassVar[float] = 0.25

    @property
    def kinked(self) -> bool:
        return False

    def level(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        side = 1.0 - 2.0 * y
        return side * z, side

    def value(self, level: Tensor) -> Tensor:
        return -F.logsigmoid(-level)  # softplus itself is cut at 20

    def slope(self, level: Tensor) -> Tensor:
        return torch.sigmoid(level)

    def conjugate_bend(self, rho: Tensor) -> Tensor:
        return 1 / (rho * (1 - rho)).clamp(min=1e-300)

    def conjugate_slope(self, rho: Tensor) -> Tensor:
        return torch.logit(rho).clamp(-_END, _END)

    def _searched(self, level: Tensor, reach: Reach, w: Tensor) -> Tensor:
        """The root of a - logit(ρ) + E'(ρ) in its bracket, by Newton's method."""
        low, high = _Nodes.of(reach, w).bracket(level)
        odds = torch.clamp(level + reach.slope(torch.sigmoid(level), w), low, high)
        for _ in range(_NEWTON):
            rho = torch.sigmoid(odds)
            rest = level - odds + reach.slope(rho, w)
            low, high = torch.where(rest > 0, odds, low), torch.where(rest > 0, high, odds)
            steep = reach.bend(rho, w) * rho * torch.sigmoid(-odds) - 1
            after = odds - rest / torch.where(steep == 0, -1.0, steep)
            after = torch.where((after >= low) & (after <= high), after, (low + high) / 2)
            moved, odds = (after - odds).abs(), after
            if bool((moved <= _TOL * (1 + odds.abs())).all()):
                break
        return torch.sigmoid(odds)

    def gap(self, level: Tensor, rho: Tensor, reach: Reach, w: Tensor) -> Tensor:
        elsewhere = _Nodes.of(reach, w).gap(level, rho, reach.value(rho, w))
        return elsewhere + super().gap(level, rho, reach, w)


@dataclass(frozen=True)
class _Nodes:
    """A grid of slopes ρ from 0 to 1, E there, and where the inner problem is concave.

    Between two nodes E'' is the largest at the first and -c'' at the node nearest to 1/2, which
    decides concavity. ``run`` numbers the stretches of intervals on which the problem is concave:
    a root in one is the maximum of all of it. On any interval E lies below its chord, which bounds
    the problem there in closed form.
    """

    odds: Tensor
    rho: Tensor
    reach: Tensor
    run: Tensor

    @classmethod
    def of(cls, reach: Reach, w: Tensor) -> _Nodes:
        inner = torch.linspace(_LOW, _HIGH, _COUNT, dtype=w.dtype, device=w.device)
        odds = torch.cat([inner.new_tensor([-_END]), inner, inner.new_tensor([_END])])
        rho = torch.sigmoid(odds)
        first, second = odds[:-1], odds[1:]
        nearest = torch.where(first * second < 0, 0.0, torch.minimum(first.abs(), second.abs()))
        convex = reach.bend(rho[:-1], w) * _variance(nearest) >= 1 - 1e-9
        stretch = torch.cumsum(convex.long(), 0)
        return cls(odds, rho, reach.value(rho, w), torch.where(convex, -stretch, stretch))

    @property
    def concave(self) -> bool:
        """Whether the problem is concave throughout, so that it has one maximum."""
        return bool((self.run == 0).all())

    def bracket(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds (n,) on both sides of the maximum: the neighbours of the highest node."""
        if self.concave:
            return torch.full_like(level, -_END), torch.full_like(level, _END)
        base = _entropy(self.odds) + self.reach
        blocks = torch.split(level.unsqueeze(1), _ROWS)
        best = torch.cat([(some * self.rho + base).argmax(1) for some in blocks])
        last = len(self.odds) - 1
        return self.odds[(best - 1).clamp(min=0)], self.odds[(best + 1).clamp(max=last)]

    def gap(self, level: Tensor, rho: Tensor, reached: Tensor) -> Tensor:
        """How far the problem may lie above its value at the roots ``rho``, elsewhere (n,)."""
        if self.concave:
            return torch.zeros_like(level)
        odds = torch.logit(rho).clamp(-_END, _END)
        value = rho * level + _entropy(odds) + reached
        own = (torch.searchsorted(self.odds, odds) - 1).clamp(0, len(self.run) - 1)
        parts = [
            self._elsewhere(*part)
            for part in zip(*(torch.split(t, _ROWS) for t in (level, value, own)), strict=True)
        ]
        return torch.cat(parts) if parts else level

    def _elsewhere(self, level: Tensor, value: Tensor, own: Tensor) -> Tensor:
        """The excess (n,) over ``value`` that the chords allow, outside the run of the root."""
        width = self.rho.diff()
        chord = self.reach.diff() / torch.where(width > 0, width, 1.0)
        level = level.unsqueeze(1)
        odds = torch.clamp(level + chord, self.odds[:-1], self.odds[1:])
        rho = torch.sigmoid(odds)
        above = rho * level + _entropy(odds) + self.reach[:-1] + chord * (rho - self.rho[:-1])
        rounding = 1e-13 * (1 + level.abs() + self.reach[-1])
        beyond = above - value.unsqueeze(1) + rounding
        mine = self.run[own].unsqueeze(1)
        same = (self.run == mine) & (mine >= 0)
        return beyond.masked_fill(same, 0.0).clamp(min=0.0).amax(dim=1)


def _variance(odds: Tensor) -> Tensor:
    """ρ (1 - ρ) at ρ = σ(odds)."""
    return torch.sigmoid(odds) * torch.sigmoid(-odds)


def _entropy(odds: Tensor) -> Tensor:
    """-ρ log ρ - (1 - ρ) log(1 - ρ) at ρ = σ(odds), without their cancellation."""
    size = odds.abs()
    return size * torch.sigmoid(-size) - F.logsigmoid(size)
