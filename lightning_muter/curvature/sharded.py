"""The sum of points' curvature as a dense matrix whose rows lie on several processes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_muter.curvature.base import Curvature, PointFacts
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.kept import join
from lightning_muter.curvature.point import KeptCurvature, PointCurvature
from lightning_muter.curvature.removed import RemovedPoints, gathered
from lightning_muter.linalg.cg import conjugate_gradients, iterate
from lightning_muter.linalg.cholesky import DenseSolver
from lightning_muter.linalg.lanczos import Krylov
from lightning_muter.linalg.minres import minres
from lightning_muter.linalg.solution import Operator, Solution, Status
from lightning_muter.parallel import Group

__all__ = ["ShardedDense", "ShardedSolver", "ShardedSum"]

#: factors of forgotten points that weigh more than this share of a process's rows go into them
_FOLDED = 0.25
_TOL = 1e-13
#: a solve that rounding ends before ``_TOL`` is good to this all the same
_GOOD = 1e-10
_ROUGH = 1e-3  # the residual of a number for people, and of what tells a singular matrix
_ITERATIONS = 2000
#: eigenvalues below this share of the largest are zero
_SINGULAR = 1e-10
_LANCZOS = 60  # steps that estimate the extreme eigenvalues


@dataclass
class ShardedSum:
    """The rows of a sum on its way: each process keeps its own points' factors until the end.

    Attributes:
        omega: ω* (p,), the expansion point, where the rows will lie.
    """

    omega: Tensor
    _parts: list[KeptCurvature] = field(default_factory=list)

    def add(self, part: PointCurvature, facts: PointFacts | None = None) -> None:
        """Add the curvature of some points; a matrix keeps no ``facts`` of theirs."""
        self._parts = list(join([*self._parts, *part.kept()]))

    def finished(self, group: Group, weight: float, decay: float) -> ShardedDense:
        """This process's rows of the sum over processes, plus ``weight`` · ``decay`` · I."""
        total = ShardedDense.zeros(len(self.omega), self.omega.device, group)
        for k in range(max(group.gather(len(self._parts)))):
            for part in gathered(self._parts[k : k + 1], group, self.omega):
                total.add(part)
        self._parts.clear()
        total.add_identity(weight * decay)
        return total


@dataclass(frozen=True, repr=False)
class ShardedDense(Curvature):
    """M = M_0 - Σ_S D_i + damping · I, symmetric (p, p), each process with some rows of M_0.

    A product is each process's own rows times v and a sum of p numbers over processes; nothing of
    size p² is formed on one of them. The forgotten points' factors are on every process. The rows
    are plain tensors: all that is done with them is local, and `torch.distributed.tensor` is not in
    every release of PyTorch that is supported. Source: ours (docs/theory.md).

    Attributes:
        rows: this process's rows of M_0 (own, p), float64.
        first: the first one's place in M_0.
        group: the processes.
        removed: Σ_S D_i of the forgotten points.
        damping: added to the diagonal.
    """

    rows: Tensor
    first: int = 0
    group: Group = field(default_factory=Group)
    removed: RemovedPoints = field(default_factory=RemovedPoints)
    damping: float = 0.0
    _inverses: dict[float, Operator | None] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"ShardedDense(p={self.p}, rows={len(self.rows)}, processes={self.group.size})"

    @classmethod
    def zeros(cls, p: int, device: torch.device | str, group: Group) -> ShardedDense:
        """The empty sum."""
        first, last = (p * (group.rank + k) // group.size for k in (0, 1))
        rows = torch.zeros(last - first, p, dtype=torch.float64, device=device)
        return cls(rows, first, group)

    @property
    def p(self) -> int:
        return self.rows.shape[1]

    @property
    def nbytes(self) -> int:
        return self.rows.numel() * self.rows.element_size() + self.removed.nbytes

    @property
    def _own(self) -> slice:
        return slice(self.first, self.first + len(self.rows))

    # --- the sum --------------------------------------------------------------------------------

    def add(self, part: PointCurvature, sign: float = 1.0) -> None:
        """Add ``sign`` times the curvature of some points to this process's rows."""
        first, last = self.first, self.first + len(self.rows)

        def place(i: int, j: int, block: Tensor) -> None:
            top, bottom = max(i, first), min(i + block.shape[0], last)
            if top < bottom:
                own = self.rows[top - first : bottom - first, j : j + block.shape[1]]
                own.add_(block[top - i : bottom - i], alpha=sign)

        part.add_to(place)

    def add_identity(self, scale: float) -> None:
        """Add ``scale`` times the identity."""
        self.rows[:, self._own].diagonal().add_(scale)

    def without(self, removed: RemovedPoints) -> ShardedDense:
        """The sum without some more points; folded where the factors became heavy."""
        rest = replace(self, removed=self.removed.joined(removed))
        heavy = rest.removed.nbytes > _FOLDED * self.rows.numel() * self.rows.element_size()
        return rest.folded() if heavy else rest

    def folded(self) -> ShardedDense:
        """The same sum with the forgotten points' factors gone into the rows."""
        rest = replace(self, rows=self.rows.clone(), removed=RemovedPoints(), _inverses={})
        for part in self.removed.parts:
            rest.add(part, -1.0)
        rest.add_identity(-self.removed.shift)
        return rest

    # --- where it lies --------------------------------------------------------------------------

    def to(self, device: torch.device | str, omega: Tensor) -> ShardedDense:
        if self.rows.device == omega.device:
            return self
        rows, removed = self.rows.to(device), self.removed.to(device, omega)
        return replace(self, rows=rows, removed=removed, _inverses={})

    def shared(self, group: Group) -> ShardedDense:
        if group.size == 1 or self.group.size == group.size:
            return self
        first, last = (self.p * (group.rank + k) // group.size for k in (0, 1))
        rows = self.rows[first:last].clone()  # not a view, which would hold all of them
        return replace(self, rows=rows, first=first, group=group, _inverses={})

    def whole(self) -> ShardedDense:
        if self.group.size == 1:
            return self
        everything = self.rows.new_zeros(self.p, self.p)
        everything[self._own] = self.rows
        rows = self.group.sum(everything)
        alone = Group(device=self.group.device)
        return replace(self, rows=rows, first=0, group=alone, _inverses={})

    def kept(self) -> dict[str, Tensor]:
        whole = self.whole()
        return DenseCurvature(whole.rows, whole.removed).kept()

    def damped(self, damping: float) -> ShardedDense:
        return self if damping == 0 else replace(self, damping=self.damping + damping)

    # --- products and solves --------------------------------------------------------------------

    def matvec(self, v: Tensor) -> Tensor:
        product = self._spread(self.rows @ v)
        if self.damping:
            product.add_(v, alpha=self.damping)
        return product if self.removed.empty else self.removed.subtracted(product, v)

    def _spread(self, own: Tensor) -> Tensor:
        """Every process's share (own,) of a vector, together (p,)."""
        full = own.new_zeros(self.p)
        full[self._own] = own
        return self.group.sum(full)

    def base_diagonal(self) -> Tensor:
        return self._spread(self.rows[:, self._own].diagonal()) + self.damping

    def solver(self) -> ShardedSolver:
        return ShardedSolver(self, _TOL)

    def estimate(self, rhs: Tensor, tol: float = 1e-3) -> Solution:
        return ShardedSolver(self, tol).solve(rhs)

    def preconditioner(self) -> Operator | None:
        """Solves with each process's diagonal block of M_0 + damping · I, factorised once.

        None where a block, or M_0 itself, is not positive definite beyond what a rough solve of
        some vector tells.
        """
        if self.damping not in self._inverses:
            base = replace(self, removed=RemovedPoints())
            self._inverses[self.damping] = base._checked_inverse()
        return self._inverses[self.damping]

    def _checked_inverse(self) -> Operator | None:
        block = self.rows[:, self._own].clone()
        block.diagonal().add_(self.damping)
        factor = DenseSolver(block)
        bad = torch.tensor([float(not factor.definite)], dtype=torch.float64)
        if float(self.group.sum(bad.to(self.rows.device))) > 0:
            return None

        def inverse(v: Tensor) -> Tensor:
            return self._spread(factor.solve_columns(v[self._own].unsqueeze(1)).squeeze(1))

        end = iterate(self.matvec, self._probe(), inverse, _ROUGH, _ITERATIONS)
        return inverse if bool(end.done) and not bool(end.negative) else None

    def _probe(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(self.p, generator=generator, dtype=torch.float64)
        return probe.to(self.rows.device)

    def extremes(self) -> tuple[float, float]:
        krylov = Krylov(self.matvec, self._probe())
        for _ in range(min(_LANCZOS, self.p)):
            krylov.step()
            if not bool(torch.isfinite(krylov.length)):
                return float("nan"), float("nan")
            if bool(krylov.exhausted):
                break
        values, _ = krylov.spectrum()
        return float(values[0]), float(values[-1])


class ShardedSolver:
    """Solves M x = b by conjugate gradients on products, without a factor of M.

    The diagonal block of each process's rows preconditions. Where M_0 is singular, or M indefinite,
    minimum residuals take over: from zero they lead to the shortest solution, and the status says
    what the matrix is.

    Args:
        curvature: M.
        tol: ‖M x - b‖ / ‖b‖ at which to stop.
    """

    def __init__(self, curvature: ShardedDense, tol: float) -> None:
        self.curvature, self.tol = curvature, tol

    def solve(self, rhs: Tensor) -> Solution:
        """x (p,) for b (p,), with its residual and status.

        Raises:
            SolverError: the solution is not finite.
        """
        product, inverse = self.curvature.matvec, self.curvature.preconditioner()
        if inverse is None:
            return self._not_definite(rhs)
        found = conjugate_gradients(product, rhs, inverse, self.tol, _ITERATIONS)
        if found.status is Status.INDEFINITE:
            again = minres(product, rhs, self.tol, _ITERATIONS)
            return replace(again, iterations=found.iterations + again.iterations)
        asked = max(self.tol, _GOOD)
        good = found.residual <= asked
        status = Status.CONVERGED if good else Status.MAX_ITERATIONS
        return replace(found, status=status, tol=asked)

    def _not_definite(self, rhs: Tensor) -> Solution:
        found = minres(self.curvature.matvec, rhs, self.tol, _ITERATIONS)
        low, high = self.curvature.extremes()
        if low < -_SINGULAR * high:
            return found
        if found.status is not Status.MAX_ITERATIONS:
            return replace(found, status=Status.MINIMUM_NORM)
        flat = low <= _SINGULAR * high
        return replace(found, status=Status.INCONSISTENT if flat else Status.MAX_ITERATIONS)
