"""The sum of points' curvature as one dense matrix, less the factors of forgotten points."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_muter.curvature.base import Curvature, PointFacts
from lightning_muter.curvature.point import PointCurvature
from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.linalg.cg import conjugate_gradients
from lightning_muter.linalg.cholesky import DenseSolver
from lightning_muter.linalg.deflation import Steps
from lightning_muter.linalg.lanczos import largest_eigenvalue
from lightning_muter.linalg.solution import Solution, Status, finite, relative_residual
from lightning_muter.parallel import Group

__all__ = ["EIGEN_LIMIT", "FACTOR_LIMIT", "DenseCurvature", "DowndatedSolver"]

#: a matrix of more rows has its extreme eigenvalues by an iteration
EIGEN_LIMIT = 2000
#: and one of still more rows no factor but a request's: p³/3 operations are more than all products
FACTOR_LIMIT = 20_000
#: factors of forgotten points that weigh more than this share of the matrix go into it
_FOLDED = 0.25
#: the residual of a system that is solved with the factor of M_0; iterations, then M_r's own factor
_TOL = 1e-12
_ITERATIONS = 40
#: directions of earlier solves that are left out of later ones, one for so many parameters: they
#: weigh a twenty-fifth of the matrix
_RECYCLED = 50


@dataclass(frozen=True)
class DenseCurvature(Curvature):
    """M = M_0 - Σ_S D_i + damping · I, symmetric (p, p), float64. Source: ours (docs/theory.md).

    M_0 is kept as a matrix with its factorisation, computed once; what requests took out of it is
    kept as factors, so that a request costs neither a factorisation nor a write of p² numbers.
    `add`, `add_identity` and `finished` change M_0; they are for whoever builds the sum. Everything
    else leaves it as it is.

    Attributes:
        base: M_0 (p, p).
        removed: Σ_S D_i of the forgotten points.
        damping: added to the diagonal.
    """

    base: Tensor
    removed: RemovedPoints = field(default_factory=RemovedPoints)
    damping: float = 0.0
    _solvers: dict[float, DenseSolver] = field(default_factory=dict, repr=False, compare=False)
    _steps: dict[float, Steps] = field(default_factory=dict, repr=False, compare=False)
    _own: dict[float, DenseSolver] = field(default_factory=dict, repr=False, compare=False)
    _places: dict[torch.device, tuple[Tensor, dict[float, DenseSolver]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def zeros(cls, p: int, device: torch.device | str) -> DenseCurvature:
        """The empty sum."""
        return cls(torch.zeros(p, p, dtype=torch.float64, device=device))

    @property
    def p(self) -> int:
        return len(self.base)

    @property
    def nbytes(self) -> int:
        return self.base.numel() * self.base.element_size() + self.removed.nbytes

    @property
    def matrix(self) -> Tensor:
        """M (p, p); formed where something was taken out or damping is added."""
        if self.removed.empty and self.damping == 0:
            return self.base
        matrix = self.base.clone()
        self.removed.subtract_from(matrix)
        matrix.diagonal().add_(self.damping)
        return matrix

    def to(self, device: torch.device | str, omega: Tensor) -> DenseCurvature:
        if self.base.device == omega.device:
            return self
        self._places.setdefault(self.base.device, (self.base, self._solvers))
        if omega.device not in self._places:  # M_0 travels once, and is factorised once
            self._places[omega.device] = self.base.to(device), {}
        base, solvers = self._places[omega.device]
        removed = self.removed.to(device, omega)
        steps = {damping: one.to(device) for damping, one in self._steps.items()}
        return DenseCurvature(base, removed, self.damping, solvers, steps, _places=self._places)

    def add(self, part: PointCurvature, facts: PointFacts | None = None) -> None:
        """Add the curvature of some points; a matrix keeps no ``facts`` of theirs."""
        base = self.base

        def place(i: int, j: int, block: Tensor) -> None:
            base[i : i + block.shape[0], j : j + block.shape[1]] += block

        part.add_to(place)

    def add_identity(self, scale: float) -> None:
        """Add ``scale`` times the identity."""
        self.base.diagonal().add_(scale)

    def without(self, removed: RemovedPoints) -> DenseCurvature:
        """The sum without some more points; folded where the factors became heavy.

        A sum that a solve had to factorise is what the rest is taken from.
        """
        if self._own:
            own = self._own.get(0.0)
            base = self.folded().base if own is None else own.matrix
            return DenseCurvature(base, damping=self.damping, _solvers=self._own).without(removed)
        rest = replace(self, removed=self.removed.joined(removed), _steps={}, _own={})
        if rest.removed.nbytes > _FOLDED * self.base.numel() * self.base.element_size():
            return rest.folded()
        steps = {damping: one.of(removed.subtracted) for damping, one in self._steps.items()}
        return replace(rest, _steps=steps)

    def kept(self) -> dict[str, Tensor]:
        return {"matrix": self.folded().base}

    def folded(self) -> DenseCurvature:
        """The same sum with the forgotten points' factors gone into M_0."""
        matrix = replace(self, damping=0.0).matrix
        return DenseCurvature(matrix, damping=self.damping)

    def finished(self, group: Group, weight: float, decay: float) -> DenseCurvature:
        """The sum over processes, plus ``weight`` times ``decay`` times the identity."""
        total = DenseCurvature(group.sum(self.base))
        total.add_identity(weight * decay)
        return total

    def damped(self, damping: float) -> DenseCurvature:
        return self if damping == 0 else replace(self, damping=self.damping + damping)

    def matvec(self, v: Tensor) -> Tensor:
        product = self.base @ v
        if self.damping:
            product.add_(v, alpha=self.damping)
        return product if self.removed.empty else self.removed.subtracted(product, v)

    def base_diagonal(self) -> Tensor:
        return self.base.diagonal() + self.damping

    def solver(self) -> DenseSolver | DowndatedSolver:
        """What solves many systems; the factorisation of M_0 is computed once."""
        if self.removed.empty:
            return self.base_solver()
        return DowndatedSolver(self)

    def base_solver(self) -> DenseSolver:
        """The factorisation of M_0 + damping · I."""
        if self.damping not in self._solvers:
            damped = DenseCurvature(self.base, damping=self.damping)
            self._solvers[self.damping] = DenseSolver(damped.matrix)
        return self._solvers[self.damping]

    def own_solver(self) -> DenseSolver:
        """The factorisation of this sum itself, computed once."""
        if self.damping not in self._own:
            self._own[self.damping] = DenseSolver(self.matrix)
        return self._own[self.damping]

    @property
    def steps(self) -> Steps:
        """What solves with this sum, and with those that it comes from, left for the next."""
        return self._steps.setdefault(self.damping, Steps(self.p // _RECYCLED))

    def estimate(self, rhs: Tensor, tol: float = 1e-3) -> Solution:
        if self.p <= EIGEN_LIMIT or self._has_factor:
            return self.solver().solve(rhs)
        inverse = self.base_diagonal().clamp(min=1e-300).reciprocal()
        return conjugate_gradients(self.matvec, rhs, lambda v: inverse * v, tol, 100)

    def extremes(self) -> tuple[float, float]:
        matrix = self.matrix
        if not bool(torch.isfinite(matrix.sum())):
            return float("nan"), float("nan")
        if self.p <= EIGEN_LIMIT:
            values = torch.linalg.eigvalsh(matrix)
            return float(values[0]), float(values[-1])
        generator = torch.Generator().manual_seed(0)  # the global state, of any device, is others'
        start = torch.randn(self.p, generator=generator, dtype=torch.float64).to(matrix)
        if self._has_factor:
            solver = self.base_solver()
            inverse = largest_eigenvalue(solver.inverse, start)
            return 1 / inverse, largest_eigenvalue(self.matvec, start)
        low = torch.lobpcg(matrix, X=start.unsqueeze(1), largest=False, niter=30)[0]
        high = torch.lobpcg(matrix, X=start.unsqueeze(1), largest=True, niter=30)[0]
        return float(low[0]), float(high[0])

    @property
    def _has_factor(self) -> bool:
        """Whether M is what a factor is for: numbers for people come from it, as requests will."""
        small = self.removed.empty and self.p <= FACTOR_LIMIT
        return small and self.base_solver().definite


class DowndatedSolver:
    """Solves M x = b by conjugate gradients, with M_0 = L Lᵀ as the preconditioner.

    M is M_0 less a little: a few iterations end at rounding, and none of them multiplies by M_0.
    What the solves of earlier requests met is left out of them (`Deflation`). Where M_0 or M is not
    positive definite, or is too far from M_0, M is formed and treated as `DenseSolver` treats a
    matrix.
    """

    def __init__(self, curvature: DenseCurvature) -> None:
        self.curvature = curvature
        self._base = curvature.base_solver()

    def solve(self, rhs: Tensor) -> Solution:
        """x (p,) for b (p,), with its residual and status.

        Raises:
            SolverError: the solution is not finite.
        """
        found = self._iterated(rhs) if self._base.definite else None
        if found is None:
            return self.curvature.own_solver().solve(rhs)
        value, iterations = found
        residual = relative_residual(self.curvature.matvec(value) - rhs, rhs)
        return finite(Solution(value, residual, iterations, Status.CONVERGED))

    def _iterated(self, rhs: Tensor) -> tuple[Tensor, int] | None:
        """x (p,) and the iterations that it took; None where they met negative curvature or more.

        The iteration of `cg.iterate`, of one system: two triangular solves and one product with
        the factors each, and next to nothing else, since M z = r - Σ_S D_i z for z = M_0⁻¹ r.
        """
        removed, steps = self.curvature.removed, self.curvature.steps
        deflation = steps.deflation()
        value, rest = torch.zeros_like(rhs), rhs
        if deflation is not None:
            value, rest = deflation.start(rhs)
        limit, square = _TOL**2 * _square(rhs), _square(rest)
        direction = product = torch.zeros_like(rhs)
        height = math.inf
        for iteration in range(_ITERATIONS):
            if square <= limit:
                return value, iteration
            near = self._base.inverse(rest)
            image = removed.subtracted(rest, near)
            if deflation is not None:
                near, image = deflation.left_out(near, image)
            before, height = height, float(torch.dot(rest, near))
            direction = torch.add(near, direction, alpha=height / before)
            product = torch.add(image, product, alpha=height / before)
            curvature = float(torch.dot(direction, product))
            if not curvature > 0:
                return None
            value.add_(direction, alpha=height / curvature)
            rest = rest.sub(product, alpha=height / curvature)
            square = _square(rest)
            steps.keep(direction, product)
        return (value, _ITERATIONS) if square <= limit else None


def _square(v: Tensor) -> float:
    return float(torch.dot(v, v))
