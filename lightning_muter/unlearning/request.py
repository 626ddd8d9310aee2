"""One request: δ* of the points to forget, Stage II, Stage III; without Lightning."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.curvature.base import Curvature
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.point import PointCurvature
from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.curvature.removed import RemovedPoints, gathered
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.curvature.sharded import ShardedDense
from lightning_muter.errors import StateError
from lightning_muter.linalg.solution import Solution
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import NOTHING, Beside, ModelView, measuring
from lightning_muter.parallel import Group
from lightning_muter.unlearning.block_system import BlockSystem
from lightning_muter.unlearning.diagnosis import request_warnings
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.points import Batch, Sums
from lightning_muter.unlearning.sketch_noise import noise_warning, sketch_noise
from lightning_muter.unlearning.steps import FlowStep, NewtonStep, Step

__all__ = ["Outcome", "forget", "forget_rows"]

_BLOCK_ITERATIONS = 1000
#: parameters beyond which "auto" does not factorise: a minute and 3 GB at this size
_FACTOR_LIMIT = 20_000


@dataclass(frozen=True)
class Outcome:
    """The memory after a request, with the system's solution and the sums over its points.

    ``sketch_noise`` is the share of the update by which its probes may have it wrong, None where
    nothing is sketched.
    """

    memory: UnlearningMemory
    solution: Solution
    sums: Sums
    seconds: float
    warnings: tuple[str, ...]
    sketch_noise: float | None = None


@dataclass(frozen=True)
class _Gone:
    """What leaves the sums with a request's points.

    ``sums`` are over all processes, ``gradient`` is Σ_S (∇l_i + λω*) (p,) and ``rhs`` that beside
    G_r, ``remaining`` M_r less their curvature and ``removed`` the factors of it that the memory
    has to keep; ``decay`` is their λ.
    """

    sums: Sums
    gradient: Tensor
    rhs: Tensor
    remaining: Curvature
    removed: RemovedPoints
    decay: float


def forget(
    memory: UnlearningMemory,
    view: ModelView,
    indices: list[int],
    x: Tensor,
    targets: Tensor,
    group: Group | None = None,
    beside: Beside = NOTHING,
) -> Outcome:
    """Stages II and III on the points x (m, ...), at ω*; neither memory nor module is changed.

    Solves (M_r - Σ_S D_i) Δω = G_r + Σ_S (∇l_i + λω*) and returns the memory of the remaining
    points with ω^u = ω* + Δω. The methods without a downdate solve with M_r. With a
    horizon Δω is what a gradient flow of that length would have done otherwise without them.
    Where the memory keeps rows, and no block system is asked for, x and targets have no part in it.

    Args:
        memory: the memory before the request.
        view: of the module in the user's hands.
        indices: which training points x and targets are.
        x: inputs (m, ...) on the module's device.
        targets: targets (m,).
        group: the processes that share the request; this one alone by default.
        beside: what forward takes of the points beside x.

    Raises:
        StateError: the method keeps no curvature.
    """
    start, group = time.perf_counter(), group or Group()
    curvature = _curvature(memory)
    if isinstance(curvature, RowsCurvature) and not _by_blocks(memory):
        return forget_rows(memory, indices)
    weights = memory.weights[indices]
    decay = _decay(memory, weights)
    batch = Batch(x, targets, weights.to(x.device), beside=beside).part(group.rows)
    with measuring(view.module), view.at(memory.omega_star):
        taken = _take(memory, view, batch)
        sums = taken.sums.reduced(group)
        removed = taken.of_all(memory.omega_star, decay, group)
        remaining: Curvature
        if isinstance(curvature, RowsCurvature):
            remaining, removed = curvature.without(indices), RemovedPoints()
        else:
            assert isinstance(curvature, (DenseCurvature, ShardedDense))
            remaining = curvature.without(removed)
        gradient = sums.gradient + decay * memory.omega_star
        gone = _Gone(sums, gradient, memory.gradient + gradient, remaining, removed, decay)
        if _by_blocks(memory):
            solution = _solved_by_blocks(memory, taken, gone, view.dtype, group)
        else:
            solution = _solved(memory, gone)
    return _outcome(memory, indices, gone, solution, start)


def forget_rows(memory: UnlearningMemory, indices: list[int]) -> Outcome:
    """`forget` by the rows that the memory keeps: the points themselves need not exist any more.

    Raises:
        StateError: the memory keeps no rows, or not those of all these points.
    """
    start, curvature = time.perf_counter(), _curvature(memory)
    if not isinstance(curvature, RowsCurvature):
        raise StateError(
            "the memory keeps a matrix, from which a point cannot be told by its index: give the "
            "points themselves (RemovalDataModule), or build the memory with representation='rows'"
        )
    total = Sums.zero(memory.p, memory.omega_star.device)
    for rows in curvature.rows_of(indices):
        total = total + _sums(rows.on(memory.omega_star.device))
    sums, decay = total.reduced(curvature.group), _decay(memory, memory.weights[indices])
    if int(sums.points) != len(indices):
        raise StateError(
            f"the memory keeps rows of {int(sums.points)} of the {len(indices)} points: it was "
            "built by other code, or altered; rebuild it"
        )
    gradient = sums.gradient + decay * memory.omega_star
    rhs, remaining = memory.gradient + gradient, curvature.without(indices)
    gone = _Gone(sums, gradient, rhs, remaining, RemovedPoints(), decay)
    return _outcome(memory, indices, gone, _solved(memory, gone), start)


def _curvature(memory: UnlearningMemory) -> Curvature:
    if memory.curvature is None:
        raise StateError(f"method={memory.settings.method!r} keeps no curvature to solve with")
    return memory.curvature


def _decay(memory: UnlearningMemory, weights: Tensor) -> float:
    return float(weights.sum()) * memory.settings.weight_decay


def _sums(rows: PointRows) -> Sums:
    """What rows say of a request's points; their losses are not kept."""
    facts, gradient = rows.facts, rows.gradient()
    nothing = gradient.new_zeros(())
    return Sums(
        gradient=gradient,
        loss=nothing,
        weight=rows.weight,
        points=nothing + len(rows),
        stationary=facts.stationary.double().sum(),
        active=facts.active.sum(),
        usable=nothing + len(rows),
        tied=nothing,
    )


def _solved(memory: UnlearningMemory, gone: _Gone) -> Solution:
    """Δω (p,) of Stage II."""
    return _step(memory, gone.sums.weight).solve(_system(memory, gone), gone.rhs)


def _system(memory: UnlearningMemory, gone: _Gone) -> Curvature:
    """M of Stage II."""
    downdated = METHODS[memory.settings.method].downdate
    curvature = gone.remaining if downdated else _curvature(memory)
    return curvature.damped(memory.settings.damping)


def _solved_by_blocks(
    memory: UnlearningMemory, taken: _Taken, gone: _Gone, dtype: torch.dtype, group: Group
) -> Solution:
    """The same by Theorem 2's system, without the downdated matrix."""
    downdated = METHODS[memory.settings.method].downdate
    parts, less = (taken.blocks, gone.decay) if downdated else ([], 0.0)
    tol = 1e-10 if dtype == torch.float64 else 1e-6
    shift = memory.settings.damping - less
    blocks = BlockSystem(_curvature(memory), parts, shift, group, _BLOCK_ITERATIONS)
    return blocks.solve(gone.rhs, tol)


def _outcome(
    memory: UnlearningMemory, indices: list[int], gone: _Gone, solution: Solution, start: float
) -> Outcome:
    before, system = _curvature(memory).damped(memory.settings.damping), _system(memory, gone)
    step = _step(memory, gone.sums.weight)
    noise = sketch_noise(system, before, step, gone.rhs, solution.value)
    noise = memory.summary.get("sketch_noise") if noise is None else noise
    entry = {
        "m": len(indices),
        "residual": solution.residual,
        "residual_asked": solution.tol,
        "sketch_noise": noise,
        "status": str(solution.status),
    }
    omega = memory.omega_star + solution.value
    after = memory.forget(indices, gone.remaining, gone.removed, gone.gradient, omega, entry)
    warnings = request_warnings(
        solution,
        float(torch.linalg.vector_norm(solution.value)),
        float(torch.linalg.vector_norm(memory.omega_star)),
        gone.sums.share(gone.sums.stationary),
        _distance(memory),
        gone.sums.share(gone.sums.tied),
        _emptied(memory, gone),
    )
    doubt = noise_warning(noise, memory.settings.probes)
    told = noise_warning(memory.summary.get("sketch_noise"), memory.settings.probes)
    warnings += () if doubt is None or told is not None else (doubt,)  # one is enough
    return Outcome(after, solution, gone.sums, time.perf_counter() - start, warnings, noise)


def _emptied(memory: UnlearningMemory, gone: _Gone) -> list[int]:
    """Classes that points held before a request and none after; rows alone know."""
    before, after = memory.curvature, gone.remaining
    if not isinstance(before, RowsCurvature) or not isinstance(after, RowsCurvature):
        return []
    return torch.nonzero((before.holders > 0) & (after.holders == 0)).flatten().tolist()


@dataclass(frozen=True)
class _Taken:
    """What this process's share of a request's points takes out of the sums.

    ``blocks`` are the points' curvatures for Theorem 2's system, where it serves; ``parts`` the
    same as they are kept.
    """

    blocks: list[PointCurvature]
    parts: RemovedPoints
    sums: Sums

    def of_all(self, omega: Tensor, decay: float, group: Group) -> RemovedPoints:
        """Σ_S D_i + λI of the points of all processes, at ω* (p,)."""
        parts = gathered(self.parts.parts, group, omega)
        return RemovedPoints.of(parts, decay).lighter(len(omega))


def _take(memory: UnlearningMemory, view: ModelView, batch: Batch) -> _Taken:
    blocks: list[PointCurvature] = []
    parts, sums = RemovedPoints(), None
    for part, more in memory.settings.problem().measure(view, batch):
        blocks += [part] if _by_blocks(memory) else []
        parts = parts.joined(RemovedPoints.of(part.kept(), 0.0)).lighter(memory.p)
        sums = more if sums is None else sums + more
    return _Taken(blocks, parts, sums or Sums.zero(memory.p, batch.x.device))


def _by_blocks(memory: UnlearningMemory) -> bool:
    """Whether Theorem 2's system serves: asked for, or M too large to factorise in passing."""
    settings = memory.settings
    large = memory.p > _FACTOR_LIMIT and settings.horizon is None
    large = large and isinstance(memory.curvature, DenseCurvature)
    return settings.solver == "schur" or (settings.solver == "auto" and large)


def _distance(memory: UnlearningMemory) -> float:
    """How far ω* is from the optimum that a step from it assumes; 0 where it assumes none."""
    measured = METHODS[memory.settings.method].points == "adversarial"
    if not measured or memory.start is not None:
        return 0.0
    return float(memory.summary.get("distance_to_optimum", 0.0))


def _step(memory: UnlearningMemory, weight: Tensor) -> Step:
    """The whole step, or one as long as training was, without points of this weight."""
    start = memory.start
    if start is None:
        return NewtonStep()
    offset = start.initial - memory.omega_star
    left = float(memory.weights[memory.remaining].sum()) - float(weight)
    times = start.flow.of_remaining(left / float(memory.weights.sum()))
    return FlowStep(times, offset, memory.residual_gradient, start.retraced)
