"""The sum of points' curvature as rows of the points, for a linear head of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_muter.curvature.base import Curvature
from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.curvature.preconditioner import Preconditioner, preconditioner_of
from lightning_muter.linalg.cg import conjugate_gradients, iterate
from lightning_muter.linalg.lanczos import Krylov
from lightning_muter.linalg.minres import minres
from lightning_muter.linalg.solution import (
    Operator,
    Solution,
    Status,
    finite,
    relative_residual,
)
from lightning_muter.parallel import Group

__all__ = ["RowsCurvature", "RowsOptions", "RowsSolver"]

_PREFIX = "rows."  # of the names of tensors that are kept
_LANCZOS = 20  # steps that estimate the extreme eigenvalues
_SAMPLE = 16  # points of a typical request
_RESIDENT = 0.6  # of an accelerator's free memory that rows take at the most; else the host's
#: bytes of float64 rows from which on the iteration runs on a float32 copy
_LARGE = 1 << 26
#: the residual that float32 products reach at the most, and how often they are refined
_SINGLE, _REFINED = 3e-6, 4
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}


@dataclass(frozen=True)
class RowsOptions:
    """How rows are kept and their systems solved.

    Attributes:
        dtype: of the rows, float64 or float32: half the bytes, with dot products in float64.
        tol: ‖M x - b‖ / ‖b‖ at which a solve stops; None for 1e-8, or 1e-5 in float32.
        max_iter: products of a solve at the most.
        budget: bytes for the preconditioner.
        probes: a point of a sketched inner response; 0 where responses are exact.
    """

    dtype: torch.dtype = torch.float64
    tol: float | None = None
    max_iter: int = 2000
    budget: int = 1 << 30
    probes: int = 0

    @property
    def tolerance(self) -> float:
        """The residual that is asked."""
        return _TOLERANCE[self.dtype] if self.tol is None else self.tol


@dataclass(frozen=True, repr=False)
class RowsCurvature(Curvature):
    """M = Σ_i w_i D_i + (Σw λ + damping) I, by the rows of the points that are left.

    Nothing of size p² is formed. A request deletes rows: nothing of a forgotten point stays in M,
    and nothing cancels. Each process keeps the rows of its own points, at least one of them, and a
    product sums p numbers over processes. Source: ours (docs/theory.md).

    Attributes:
        blocks: the rows, on the device, or on the host where they do not fit.
        size: p.
        decay: λ of a point of weight 1.
        options: dtype, tolerance and budget.
        damping: added to the diagonal.
        group: the processes.
    """

    blocks: tuple[PointRows, ...]
    size: int
    decay: float
    options: RowsOptions = RowsOptions()
    damping: float = 0.0
    group: Group = field(default_factory=Group)
    _inverses: dict[float, tuple[int, Preconditioner]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __repr__(self) -> str:
        points = sum(map(len, self.blocks))
        return f"RowsCurvature(p={self.p}, points={points}, dtype={self.options.dtype})"

    @property
    def p(self) -> int:
        return self.size

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.blocks)

    @cached_property
    def points(self) -> int:
        """How many points all processes keep."""
        own = torch.tensor([float(sum(map(len, self.blocks)))], dtype=torch.float64)
        return round(float(self.group.sum(own.to(self.group.device))))

    @cached_property
    def shift(self) -> float:
        """The multiple of the identity in M: Σw λ + damping."""
        own = torch.stack([one.weight.to(self.group.device) for one in self.blocks]).sum()
        return float(self.group.sum(own)) * self.decay + self.damping

    @property
    def centred(self) -> bool:
        """Whether the points' sum is zero on vectors that are equal for every class."""
        return all(one.points.s.sums_to_zero for one in self.blocks)

    def to(self, device: torch.device | str, omega: Tensor) -> RowsCurvature:
        device = torch.device(device)
        if all(one.points.r.device == device for one in self.blocks):
            return self
        large = device.type == "cuda"
        large = large and self.nbytes > _RESIDENT * torch.cuda.mem_get_info(device)[0]
        moved = (one.pinned() if large else one.on(device) for one in self.blocks)
        return replace(self, blocks=tuple(moved), _inverses={})

    def shared(self, group: Group) -> RowsCurvature:
        if group.size == 1 or self.group.size == group.size:
            return self
        blocks = [one[one.facts.indices % group.size == group.rank] for one in self.blocks]
        full = tuple(one for one in blocks if len(one))
        return replace(self, blocks=full or tuple(blocks[:1]), group=group, _inverses={})

    def whole(self) -> RowsCurvature:
        if self.group.size == 1:
            return self
        shares = self.group.gather([one.on("cpu") for one in self.blocks])
        blocks = tuple(one.on(self.blocks[0].device) for share in shares for one in share)
        return replace(self, blocks=blocks, group=Group(device=self.group.device), _inverses={})

    def kept(self) -> dict[str, Tensor]:
        return {
            f"{_PREFIX}{i}.{name}": one
            for i, rows in enumerate(self.blocks)
            for name, one in rows.tensors().items()
        }

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], omega: Tensor, decay: float, options: RowsOptions
    ) -> RowsCurvature:
        """The inverse of `kept`; other tensors are left aside.

        Args:
            tensors: by name.
            omega: ω* (p,), the expansion point.
            decay: λ of a point of weight 1.
            options: how systems are solved.

        Raises:
            MemoryFormatError: they do not belong together.
        """
        parts: dict[int, dict[str, Tensor]] = {}
        for name, one in tensors.items():
            if name.startswith(_PREFIX):
                number, _, own = name.removeprefix(_PREFIX).partition(".")
                parts.setdefault(int(number), {})[own] = one
        blocks = tuple(PointRows.restore(parts[i], omega) for i in sorted(parts))
        return cls(blocks, len(omega), decay, replace(options, dtype=blocks[0].dtype))

    @staticmethod
    def found_in(tensors: Mapping[str, Tensor]) -> bool:
        """Whether some of the tensors are rows'."""
        return any(name.startswith(_PREFIX) for name in tensors)

    def damped(self, damping: float) -> RowsCurvature:
        return self if damping == 0 else replace(self, damping=self.damping + damping)

    # --- requests -------------------------------------------------------------------------------

    def rows_of(self, indices: Sequence[int]) -> list[PointRows]:
        """Those of this process's rows that are of some training points."""
        found = ((one, one.are_of(indices)) for one in self.blocks)
        return [one[which] for one, which in found if bool(which.any())]

    def without(self, indices: Sequence[int]) -> RowsCurvature:
        """The sum without some training points: their rows are gone, the others as they were."""
        blocks = []
        for one in self.blocks:
            gone = one.are_of(indices)
            blocks.append(one[~gone] if bool(gone.any()) else one)
        full = tuple(one for one in blocks if len(one))
        return replace(self, blocks=full or tuple(blocks[:1]))

    def resampled(self, seed: int = 0) -> RowsCurvature | None:
        """The sum with each probe twice or not at all, by a coin; None where nothing is sketched.

        It differs from this one as this one differs from the sum of exact responses: the spread
        of a coin is the second moment of a probe's term, which of normal probes is at most 1.5
        times its variance. Source: ours (docs/theory.md).

        Args:
            seed: of the coins, which a point keeps in any order, on any process.
        """
        if not any(one.sketched for one in self.blocks) or not self.options.probes:
            return None
        blocks = tuple(one.resampled(self.options.probes, seed) for one in self.blocks)
        return replace(self, blocks=blocks)

    def sample_gradient(self) -> Tensor:
        """The sum of a few points' gradients (p,), which stands for a request's."""
        own = self.blocks[0][:_SAMPLE].gradient()
        return self.group.sum(own.to(self.group.device))

    @cached_property
    def holders(self) -> Tensor:
        """How many points pull each output of a softmax up, r_c < 0 (C,); empty for other losses.

        An output that none pulls is held by weight decay alone.
        """
        own = [(one.points.r < 0).sum(dim=0).double().to(self.group.device) for one in self.blocks]
        found = self.group.sum(torch.stack(own).sum(dim=0))
        alone = all(len(one.points.sides) == 1 for one in self.blocks)
        return found if self.centred and alone else found[:0]

    # --- products and solves --------------------------------------------------------------------

    def matvec(self, v: Tensor) -> Tensor:
        return self._summed(lambda one: one.matvec(v), v) + self.shift * v

    def exactly(self, v: Tensor) -> Tensor:
        """M v (..., p) in float64, whatever the rows' dtype."""
        if self.options.dtype == torch.float64:
            return self.matvec(v)
        return self._summed(lambda one: one.converted(torch.float64).matvec(v), v) + self.shift * v

    def single(self, device: torch.device, room: int) -> RowsCurvature | None:
        """The sum by rows in float32, which is rough and fast; None where rows are few or away.

        Args:
            device: where products are wanted.
            room: bytes in which copies are kept for the next system.
        """
        if self.options.dtype == torch.float32:
            return self
        if self.nbytes < _LARGE or any(one.device != device for one in self.blocks):
            return None
        keeps = self.nbytes / 2 <= room
        blocks = (one.single if keeps else one.converted(torch.float32) for one in self.blocks)
        return replace(self, blocks=tuple(blocks))

    def base_diagonal(self) -> Tensor:
        like = torch.zeros(self.p, dtype=torch.float64, device=self.blocks[0].device)
        return self._summed(PointRows.diagonal_of_sum, like) + self.shift

    def _summed(self, of: Callable[[PointRows], Tensor], like: Tensor) -> Tensor:
        total = torch.zeros_like(like)
        for one in self.blocks:
            total += of(one.on(like.device))
        return self.group.sum(total)

    def solver(self) -> RowsSolver:
        return RowsSolver(self, self.options.tolerance)

    def preconditioner(self, device: torch.device) -> Preconditioner:
        """An approximate inverse, kept while requests have not taken too many of its points."""
        count, found = self._inverses.get(self.damping, (0, None))
        if found is None or not found.lasts(count, self.points):
            budget = self.options.budget
            found = preconditioner_of(self.blocks, self.shift, self.group, budget, device)
            self._inverses[self.damping] = (self.points, found)
        return found.now(self.blocks, self.shift)

    def estimate(self, rhs: Tensor, tol: float = 1e-3) -> Solution:
        return RowsSolver(self, tol).solve(rhs)

    def extremes(self) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(self.p, generator=generator, dtype=torch.float64)
        krylov = Krylov(self.matvec, start.to(self.blocks[0].device))
        for _ in range(min(_LANCZOS, self.p)):
            krylov.step()
            if not bool(torch.isfinite(krylov.length)):
                return float("nan"), float("nan")
            if bool(krylov.exhausted):
                break
        values, _ = krylov.spectrum()
        low, high = float(values[0]), float(values[-1])
        return (min(low, self.shift) if self.centred else low), high


class RowsSolver:
    """Solves M X = B by conjugate gradients on products with rows, all right-hand sides at once.

    The span of few rows preconditions, or the classes' blocks (`preconditioner_of`). Rows in
    float32, and many rows in float64 by a copy, iterate in float32, which takes half the time; what
    that leaves by all digits is solved again. Where M is indefinite minimum residuals take over and
    the status says so; without weight decay and damping the solution is the shortest one for losses
    that a shift of all outputs leaves as they are.

    Args:
        curvature: M.
        tol: ‖M x - b‖ / ‖b‖ at which to stop.
    """

    def __init__(self, curvature: RowsCurvature, tol: float) -> None:
        self.curvature, self.tol = curvature, tol

    def solve(self, rhs: Tensor) -> Solution:
        """X (..., p) for B (..., p), with the residual and the status of the worst of them.

        Raises:
            SolverError: the solution is not finite.
        """
        curvature, tol = self.curvature, self.tol
        inverse = curvature.preconditioner(rhs.device)
        single = curvature.single(rhs.device, curvature.options.budget - inverse.nbytes)
        found = self._in_float32(rhs, inverse.apply, single)
        if found.status is not Status.CONVERGED:
            found = self._iterated(rhs, inverse.apply, found)
        if found.status is Status.INDEFINITE:
            again = self._by_minres(rhs)
            return replace(again, iterations=found.iterations + again.iterations, tol=tol)
        status = found.status
        if status is Status.CONVERGED and curvature.centred and curvature.shift == 0:
            status = Status.MINIMUM_NORM
        if not found.residual <= tol:  # as far as rounding lets it come
            status = Status.MAX_ITERATIONS
        return replace(finite(found), status=status, tol=tol)

    def _by_minres(self, rhs: Tensor) -> Solution:
        limit, systems = self.curvature.options.max_iter, rhs.reshape(-1, rhs.shape[-1])
        found = [minres(self.curvature.exactly, b, self.tol, limit) for b in systems]
        return Solution(
            torch.stack([one.value for one in found]).reshape(rhs.shape),
            max(one.residual for one in found),
            max(one.iterations for one in found),
            Status.worst(one.status for one in found),
        )

    def _iterated(self, rhs: Tensor, inverse: Operator, begun: Solution) -> Solution:
        """Conjugate gradients by all digits, begun anew where their residual is less than x's."""
        found, limit = begun, self.curvature.options.max_iter
        for _ in range(_REFINED + 1):
            start, left = found.value if found.iterations else None, limit - found.iterations
            again = conjugate_gradients(
                self.curvature.exactly, rhs, inverse, self.tol, left, start=start
            )
            rounding = found.status is Status.CONVERGED and again.status is Status.INDEFINITE
            if rounding or (found is not begun and not again.residual < found.residual):
                break
            found = replace(again, iterations=found.iterations + again.iterations)
            if found.status is not Status.CONVERGED or found.residual <= self.tol:
                break
        return found

    def _in_float32(self, rhs: Tensor, inverse: Operator, single: RowsCurvature | None) -> Solution:
        """X by products in float32, as far as those lead; 0 where the rows are few.

        Each round solves for what is left of B by all digits (iterative refinement).
        """
        curvature = self.curvature
        x, rest, products = torch.zeros_like(rhs), rhs, 0
        goal = self.tol * torch.linalg.vector_norm(rhs, dim=-1, keepdim=True)
        for _ in range(_REFINED):
            if single is None or relative_residual(rest, rhs) <= self.tol:
                break
            length = torch.linalg.vector_norm(rest, dim=-1, keepdim=True).clamp(min=1e-300)
            most = curvature.options.max_iter // 2 - products
            tol = (goal / length / 2).clamp(min=_SINGLE)
            end = iterate(single.matvec, rest, inverse, tol, most)
            if bool(end.negative.any()):  # of rounding, or of M: the iteration by all digits tells
                break
            x = x + end.value
            rest, products = rhs - curvature.exactly(x), products + end.iterations + 1
        residual = relative_residual(rest, rhs)
        status = Status.CONVERGED if residual <= self.tol else Status.MAX_ITERATIONS
        return Solution(x, residual, products, status)
