"""Stage I for one method or several: one pass over the training points builds every memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.adversary.maximiser import InnerMaximum
from lightning_muter.curvature.base import Curvature, CurvatureSum
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.point_sample import PointSample
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.errors import ConfigurationError
from lightning_muter.linalg.lanczos import TimeAverage
from lightning_muter.memory.fingerprint import fingerprint
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.start import Start, TrainingFlow
from lightning_muter.models import ModelView, measuring
from lightning_muter.parallel import Group
from lightning_muter.spec import Settings
from lightning_muter.threats import Threat
from lightning_muter.unlearning.diagnosis import MemoryEvidence, memory_warnings
from lightning_muter.unlearning.flow import retrace
from lightning_muter.unlearning.maxima import LastMaxima
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.objective import Evaluation
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import Batch, Sums
from lightning_muter.unlearning.sketch_noise import noise_warning, sketch_noise
from lightning_muter.unlearning.steps import NewtonStep

__all__ = ["build_memories", "summarise"]


@dataclass
class _Building:
    """One memory on its way: what it is of, and its sums so far."""

    settings: Settings
    view: ModelView
    problem: PointProblem
    curvature: CurvatureSum | None
    sums: Sums

    @classmethod
    def start(cls, settings: Settings, module: nn.Module) -> _Building:
        view = settings.view(module)
        kept = METHODS[settings.method].has_memory
        curvature = settings.empty_sum(view) if kept else None
        if isinstance(curvature, DenseCurvature) and settings.sketched:
            curvature = PointSample(curvature, settings.probes)
        return cls(settings, view, settings.problem(), curvature, Sums.zero(view.p, view.device))

    def add(self, batch: Batch, shared: dict[Threat, InnerMaximum]) -> None:
        """Add a batch, with the maximisers that settings of one threat share."""
        threat = self.problem.threat
        if threat not in shared and METHODS[self.problem.method].points != "clean":
            shared[threat] = self.problem.perturb(self.view, batch)
        inner = shared.get(threat)
        if self.curvature is None:
            self.sums += self.problem.gradient(self.view, batch, inner)
        else:
            self.sums += self.problem.accumulate(self.view, batch, self.curvature, inner)


def build_memories(
    module: nn.Module,
    settings: Sequence[Settings],
    batches: Iterable[Batch],
    digests: Tensor,
    key: bytes,
    group: Group | None = None,
    initial: Tensor | None = None,
    weights: Tensor | None = None,
    flow: TrainingFlow | None = None,
    maxima: LastMaxima | None = None,
) -> list[UnlearningMemory]:
    """Memories of several methods at the module's ω* from one pass and one δ* a point.

    The settings must share loss, λ and trained parameters, and those of one threat share its δ*;
    each process passes its own batches and ``group`` sums over processes.

    Args:
        module: the trained module; left as it was.
        settings: one for each memory.
        batches: the training points, each once over all processes, with their weights.
        digests: of all points (n, 16), in the order of their indices.
        key: of the digests.
        group: the processes; this one alone by default.
        initial: the ω (p,) that training started from; needed by settings with a horizon.
        weights: of all points (n,), in the order of their indices; 1 each by default.
        flow: how long training went, where the settings have a horizon; by default that alone.
        maxima: δ* of a pass over the same batches, which serve the first settings where they are of
            this ω* and of their inner problem.
    """
    group = group or Group()
    building = [_Building.start(one, module) for one in settings]
    first, maxima = building[0], maxima or LastMaxima()
    with measuring(module):
        maxima.begin(first.view.get(), first.problem)
        for batch in batches:
            known = maxima.kept(batch)
            shared = {} if known is None else {first.problem.threat: known}
            for one in building:
                one.add(batch, shared)
    weights = torch.ones(len(digests), dtype=torch.float64) if weights is None else weights
    return [_memory(one, digests, key, group, initial, weights, flow) for one in building]


def _memory(
    built: _Building,
    digests: Tensor,
    key: bytes,
    group: Group,
    initial: Tensor | None,
    weights: Tensor,
    flow: TrainingFlow | None,
) -> UnlearningMemory:
    settings, view = built.settings, built.view
    omega = view.get()
    evaluation = Evaluation.of(built.sums.reduced(group), omega, settings.weight_decay)
    curvature: Curvature | None = None
    start = None
    summary = _counts(settings, evaluation, view.p)
    warnings: tuple[str, ...] = ()
    if built.curvature is not None:
        curvature = built.curvature.finished(group, evaluation.weight, settings.weight_decay)
        start = _start(settings, curvature, evaluation.gradient, omega, initial, flow)
        summary, warnings = summarise(settings, evaluation, curvature, omega, start)
        noise = _noise(built, curvature.damped(settings.damping), evaluation.points, group)
        summary |= {} if noise is None else {"sketch_noise": noise}
        doubt = noise_warning(noise, settings.probes)
        warnings += () if doubt is None else (doubt,)
    return UnlearningMemory(
        settings=settings,
        omega_star=omega,
        omega=omega,
        curvature=curvature,
        gradient=torch.zeros_like(omega),
        residual_gradient=evaluation.gradient,
        digests=digests,
        removed=torch.zeros(len(digests), dtype=torch.bool),
        weights=weights,
        key=key,
        fingerprint=fingerprint(view.module, view.names),
        start=start,
        summary=summary,
        warnings=warnings,
        parameters=tuple(
            (name.replace("_orig_mod.", ""), tuple(one.shape))
            for name, one in zip(view.names, view.parameters, strict=True)
        ),
    )


def _noise(built: _Building, curvature: Curvature, points: int, group: Group) -> float | None:
    """What the probes of a sketch make of a request's update; None where nothing is sketched."""
    found = None
    if isinstance(built.curvature, PointSample):
        found = built.curvature.noise(curvature, points)
    elif isinstance(curvature, RowsCurvature):
        rhs = curvature.sample_gradient()
        update = curvature.estimate(rhs).value
        found = sketch_noise(curvature, curvature, NewtonStep(), rhs, update)
    told: float | None = group.broadcast(found)
    return told


def _start(
    settings: Settings,
    curvature: Curvature,
    gradient: Tensor,
    omega: Tensor,
    initial: Tensor | None,
    flow: TrainingFlow | None,
) -> Start | None:
    """What a Retrain that stops early needs, where the settings have a horizon."""
    horizon = settings.horizon
    if horizon is None:
        return None
    if initial is None:
        raise ConfigurationError(f"horizon={horizon} needs the parameters that training started at")
    initial = initial.to(omega)
    damped = curvature.damped(settings.damping)
    flow = flow or TrainingFlow(TimeAverage.end(horizon))
    found = retrace(damped.matvec, gradient, initial - omega, flow.average)
    return Start(initial, found.value, flow)


def _counts(settings: Settings, evaluation: Evaluation, p: int) -> dict[str, Any]:
    ties = {} if settings.objective is None else {"tied": evaluation.tied}
    return ties | {
        "n": evaluation.points,
        "p": p,
        "objective": evaluation.value,
        "residual_gradient": evaluation.residual,
        "stationary": evaluation.stationary,
        "active": evaluation.active,
        "usable_response": evaluation.usable,
    }


def summarise(
    settings: Settings,
    evaluation: Evaluation,
    curvature: Curvature,
    omega: Tensor,
    start: Start | None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a person should know of a memory: sizes, shares, eigenvalues, distances; and warnings.

    Args:
        settings: what the memory is of.
        evaluation: the pass at ω*.
        curvature: M_0.
        omega: ω* (p,).
        start: where training started, with a horizon.
    """
    summary = _counts(settings, evaluation, curvature.p)
    summary["smallest_eigenvalue"], summary["largest_eigenvalue"] = curvature.extremes()
    retrace_error = None
    if start is not None:
        offset = start.initial - omega
        way = torch.linalg.vector_norm(offset)
        retrace_error = float(torch.linalg.vector_norm(offset + start.retraced) / way)
        summary |= {"horizon": settings.horizon, "retrace_error": retrace_error}
    distance = decrement = solution = None
    smallest = summary["smallest_eigenvalue"] + settings.damping
    if smallest > -1e-9 * summary["largest_eigenvalue"]:
        solution = curvature.damped(settings.damping).estimate(evaluation.gradient)
        distance = float(torch.linalg.vector_norm(solution.value))
        decrement = float(evaluation.gradient @ solution.value) / max(evaluation.value, 1e-300)
        summary["distance_to_optimum"] = distance
    evidence = MemoryEvidence(
        assumes_optimum=start is None and METHODS[settings.method].points == "adversarial",
        retrace_error=retrace_error,
        stationary=evaluation.stationary,
        usable=evaluation.usable,
        constrained=settings.problem().response.constrained,
        distance=distance,
        size=float(torch.linalg.vector_norm(omega)),
        decrement=decrement,
        solution=solution,
        weight_decay=settings.weight_decay,
        tied=evaluation.tied,
    )
    return summary, memory_warnings(evidence)
