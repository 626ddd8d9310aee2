"""How far a request moves ω: to the optimum of the remaining points, or as long as training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_muter.curvature.base import Curvature
from lightning_muter.linalg.lanczos import TimeAverage
from lightning_muter.linalg.solution import Solution
from lightning_muter.unlearning.flow import retrace

__all__ = ["FlowStep", "NewtonStep", "Step"]


class Step(ABC):
    """Δω of a quadratic model: its curvature, and the right-hand side of Stage II."""

    @abstractmethod
    def solve(self, curvature: Curvature, rhs: Tensor) -> Solution:
        """Δω (p,) for rhs = G_r + Σ_S (∇l_i + λω*) (p,)."""


@dataclass(frozen=True)
class NewtonStep(Step):
    """The whole way to the optimum of the quadratic model: M⁻¹ rhs (the paper's eq. 11)."""

    def solve(self, curvature: Curvature, rhs: Tensor) -> Solution:
        return curvature.solver().solve(rhs)


@dataclass(frozen=True)
class FlowStep(Step):
    """What a training of the same length would have done otherwise. Source: ours.

    Attributes:
        horizon: its length h, or the times that the weights were averaged over.
        offset: ω_0 - ω* (p,), where training started.
        gradient: ∇F(ω*) of all points (p,).
        retraced: where the model of all points comes to from ω_0 (p,).
    """

    horizon: TimeAverage
    offset: Tensor
    gradient: Tensor
    retraced: Tensor

    def solve(self, curvature: Curvature, rhs: Tensor) -> Solution:
        found = retrace(curvature.matvec, self.gradient - rhs, self.offset, self.horizon)
        return replace(found, value=found.value - self.retraced)
