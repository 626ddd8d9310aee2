"""Theorem 2's block system in (Δω, Δα), solved by products only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.curvature.base import Curvature
from lightning_muter.curvature.point import PointCurvature
from lightning_muter.linalg.cg import conjugate_gradients
from lightning_muter.linalg.minres import minres
from lightning_muter.linalg.solution import Solution, Status
from lightning_muter.parallel import Group

__all__ = ["BlockSystem"]


@dataclass(frozen=True)
class BlockSystem:
    """[[M_r - Σ_S H_i - mλI, B R], [R Bᵀ, R]] [Δω; β] = [rhs; 0].

    With Δα = R β this is Theorem 2's system: its Schur complement is M_r - Σ_S D_i. Written with
    the responses R_i instead of K_i it serves every response, a clipped series, a frozen point and
    a sketch among them, by the same R that dense sums are made of. Each process applies the blocks
    of its own points; the vector is the same on every process.

    Attributes:
        curvature: M_r.
        parts: the removed points' curvature, this process's share.
        shift: what is added to M_r's diagonal: damping, less the removed points' λ.
        group: the processes.
        max_iter: iterations of each solver at the most.
    """

    curvature: Curvature
    parts: Sequence[PointCurvature]
    shift: float
    group: Group
    max_iter: int

    def solve(self, rhs: Tensor, tol: float) -> Solution:
        """Δω (p,) by conjugate gradients, or minimum residuals where the system is indefinite."""
        p = len(rhs)
        first, inner = self.group.offsets(sum(part.inner_size for part in self.parts))
        full = torch.cat([rhs, rhs.new_zeros(inner)])

        def operator(vector: Tensor) -> Tensor:
            return self._apply(vector, p, p + first)

        inverse = self._preconditioner(p, inner, p + first)
        found = conjugate_gradients(operator, full, lambda v: inverse * v, tol, self.max_iter)
        if found.status is not Status.CONVERGED:
            spent = found.iterations
            found = minres(operator, full, tol, self.max_iter)
            found = Solution(found.value, found.residual, spent + found.iterations, found.status)
        return Solution(found.value[:p], found.residual, found.iterations, found.status)

    def _apply(self, vector: Tensor, p: int, at: int) -> Tensor:
        result, v = torch.zeros_like(vector), vector[:p]
        for part in self.parts:
            beta = vector[at : at + part.inner_size]
            moved = part.respond(beta)
            result[:p] += part.spread(moved) - part.direct(v)
            result[at : at + part.inner_size] = part.respond(part.couple(v)) + moved
            at += part.inner_size
        result = self.group.sum(result)
        result[:p] += self.curvature.matvec(v) + self.shift * v
        return result

    def _preconditioner(self, p: int, inner: int, at: int) -> Tensor:
        own = self.curvature.base_diagonal()
        diagonal = own.new_zeros(p + inner)
        for part in self.parts:
            diagonal[at : at + part.inner_size] = part.response_diagonal().abs()
            at += part.inner_size
        diagonal = self.group.sum(diagonal)
        diagonal[:p] = own.clamp(min=1e-12)
        return torch.where(diagonal > 0, 1 / diagonal.clamp(min=1e-300), 1.0)
