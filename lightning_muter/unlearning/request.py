"""One request: δ* of the points to forget, Stage II, Stage III; without Lightning."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.curvature.point import PointCurvature
from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.errors import StateError
from lightning_muter.linalg.solution import Solution
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import ModelView, measuring
from lightning_muter.parallel import Group
from lightning_muter.unlearning.block_system import BlockSystem
from lightning_muter.unlearning.diagnosis import request_warnings
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.points import Batch, Sums
from lightning_muter.unlearning.steps import FlowStep, NewtonStep, Step

__all__ = ["Outcome", "forget"]

_BLOCK_ITERATIONS = 1000
#: parameters beyond which "auto" does not factorise: a minute and 3 GB at this size
_FACTOR_LIMIT = 20_000


@dataclass(frozen=True)
class Outcome:
    """The memory after a request, with the system's solution and the sums over its points."""

    memory: UnlearningMemory
    solution: Solution
    sums: Sums
    seconds: float
    warnings: tuple[str, ...]


def forget(
    memory: UnlearningMemory,
    view: ModelView,
    indices: list[int],
    x: Tensor,
    targets: Tensor,
    group: Group | None = None,
) -> Outcome:
    """Stages II and III on the points x (m, ...), at ω*; neither memory nor module is changed.

    Solves (M_r - Σ_S D_i) Δω = G_r + Σ_S (∇l_i + λω*) and returns the memory of the remaining
    points with ω^u = ω* + Δω. The methods without a downdate solve with M_r. With a
    horizon Δω is what a gradient flow of that length would have done otherwise without them.

    Args:
        memory: the memory before the request.
        view: of the module in the user's hands.
        indices: which training points x and targets are.
        x: inputs (m, ...) on the module's device.
        targets: targets (m,).
        group: the processes that share the request; this one alone by default.
    """
    start = time.perf_counter()
    group = group or Group()
    if memory.curvature is None:
        raise StateError(f"method={memory.settings.method!r} keeps no curvature to solve with")
    problem = memory.settings.problem()
    weights = memory.weights[indices].to(x.device)
    decay = float(weights.sum()) * problem.weight_decay
    with measuring(view.module), view.at(memory.omega_star):
        taken = _take(memory, view, Batch(x, targets, weights).part(group.rows))
        sums = taken.sums.reduced(group.sum)
        removed = taken.of_all(memory.p, decay, group)
        gradient = sums.gradient + decay * memory.omega_star
        rhs = memory.gradient + gradient
        remaining = memory.curvature.without(removed)
        downdated = METHODS[problem.method].downdate
        if _by_blocks(memory):
            parts, less = (taken.blocks, decay) if downdated else ([], 0.0)
            shift = memory.settings.damping - less
            tol = 1e-10 if view.dtype == torch.float64 else 1e-6
            blocks = BlockSystem(memory.curvature, parts, shift, group, _BLOCK_ITERATIONS)
            solution = blocks.solve(rhs, tol)
        else:
            curvature = remaining if downdated else memory.curvature
            solution = _step(memory).solve(curvature.damped(memory.settings.damping), rhs)
    omega = memory.omega_star + solution.value
    entry = {
        "m": len(indices),
        "residual": solution.residual,
        "status": str(solution.status),
    }
    after = memory.forget(indices, remaining, removed, gradient, omega, entry)
    warnings = request_warnings(
        solution,
        float(torch.linalg.vector_norm(solution.value)),
        float(torch.linalg.vector_norm(memory.omega_star)),
        sums.share(sums.stationary),
        _distance(memory),
    )
    return Outcome(after, solution, sums, time.perf_counter() - start, warnings)


@dataclass(frozen=True)
class _Taken:
    """What this process's share of a request's points takes out of the sums.

    ``blocks`` are the points' curvatures for Theorem 2's system, where it serves; ``parts`` the
    same as they are kept.
    """

    blocks: list[PointCurvature]
    parts: RemovedPoints
    sums: Sums

    def of_all(self, p: int, decay: float, group: Group) -> RemovedPoints:
        """Σ_S D_i + λI of the points of all processes."""
        shares = group.gather(self.parts.parts)
        return RemovedPoints.of([one for share in shares for one in share], decay).lighter(p)


def _take(memory: UnlearningMemory, view: ModelView, batch: Batch) -> _Taken:
    blocks: list[PointCurvature] = []
    parts, sums = RemovedPoints(), Sums.zero(memory.p, batch.x.device)
    for part, more in memory.settings.problem().measure(view, batch):
        blocks += [part] if _by_blocks(memory) else []
        parts = parts.joined(RemovedPoints.of(part.kept(), 0.0)).lighter(memory.p)
        sums = sums + more
    return _Taken(blocks, parts, sums)


def _by_blocks(memory: UnlearningMemory) -> bool:
    """Whether Theorem 2's system serves: asked for, or M too large to factorise in passing."""
    settings = memory.settings
    large = memory.p > _FACTOR_LIMIT and settings.horizon is None
    return settings.solver == "schur" or (settings.solver == "auto" and large)


def _distance(memory: UnlearningMemory) -> float:
    """How far ω* is from the optimum that a step from it assumes; 0 where it assumes none."""
    measured = METHODS[memory.settings.method].points == "adversarial"
    if not measured or memory.start is not None:
        return 0.0
    return float(memory.summary.get("distance_to_optimum", 0.0))


def _step(memory: UnlearningMemory) -> Step:
    """The whole step, or one as long as training was."""
    horizon, start = memory.settings.horizon, memory.start
    if horizon is None or start is None:
        return NewtonStep()
    offset = start.initial - memory.omega_star
    return FlowStep(horizon, offset, memory.residual_gradient, start.retraced)
