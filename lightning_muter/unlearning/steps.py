"""How far a request moves ω: to the optimum of the remaining points, or as long as training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.curvature.base import Curvature
from lightning_muter.linalg.lanczos import TimeAverage, flow
from lightning_muter.linalg.solution import Solution
from lightning_muter.unlearning.flow import retrace

__all__ = ["FlowStep", "NewtonStep", "Pair", "Step"]

#: two curvatures to compare
Pair = tuple[Curvature, Curvature]

_ROUGH = 0.03  # of a change, that a number for people may be wrong by
_FINE = 1e-3  # of an update, whose changes are smaller than itself


class Step(ABC):
    """Δω of a quadratic model: its curvature, and the right-hand side of Stage II."""

    @abstractmethod
    def solve(self, curvature: Curvature, rhs: Tensor) -> Solution:
        """Δω (p,) for rhs = G_r + Σ_S (∇l_i + λω*) (p,)."""

    @abstractmethod
    def change(self, system: Pair, before: Pair, rhs: Tensor, update: Tensor) -> Tensor:
        """Roughly how other curvature would move an update (p,).

        Args:
            system: M of the request, and the other one.
            before: the same of the points that were there before it.
            rhs: as in `solve`.
            update: what M gave.
        """


@dataclass(frozen=True)
class NewtonStep(Step):
    """The whole way to the optimum of the quadratic model: M⁻¹ rhs (the paper's eq. 11)."""

    def solve(self, curvature: Curvature, rhs: Tensor) -> Solution:
        return curvature.solver().solve(rhs)

    def change(self, system: Pair, before: Pair, rhs: Tensor, update: Tensor) -> Tensor:
        other = system[1]
        return other.estimate(rhs - other.matvec(update), _ROUGH).value


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

    def change(self, system: Pair, before: Pair, rhs: Tensor, update: Tensor) -> Tensor:
        # along the way to ω* the points that went have noise of their own
        tol = _FINE * float(torch.linalg.vector_norm(update))

        def end(curvature: Curvature, gradient: Tensor) -> Tensor:
            way = -gradient - curvature.matvec(self.offset)
            return flow(curvature.matvec, way, self.horizon, tol).value

        steps = [
            end(left, self.gradient - rhs) - end(everyone, self.gradient)
            for left, everyone in zip(system, before, strict=True)
        ]
        return steps[1] - steps[0]
