"""Corrector steps: what the remaining data can still do after a request."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_muter.curvature.base import Solver
from lightning_muter.errors import SolverError, StateError
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.unlearning.objective import (
    HALVINGS,
    PAYS,
    Evaluation,
    RobustObjective,
    line_search,
)

__all__ = ["Correction", "correct"]

#: a gradient this many roundings of F small cannot be lowered
_ROUNDING = 1e4


@dataclass(frozen=True)
class Correction:
    """The memory at the corrected ω, with the objective before and after."""

    memory: UnlearningMemory
    before: Evaluation
    after: Evaluation
    rounding: float

    @property
    def helped(self) -> bool:
        """Whether the gradient fell, or had nothing left to fall by."""
        at_rounding = self.before.residual <= self.rounding * max(1.0, abs(self.before.value))
        return at_rounding or self.after.residual < self.before.residual


def correct(memory: UnlearningMemory, objective: RobustObjective, steps: int) -> Correction:
    """ω ← ω - M_r^{-1} ∇F_{-S}(ω), ``steps`` times, δ* solved again at each; and where they end.

    M_r is the curvature at ω*: a step that leaves too much of the gradient has it renewed at the
    current ω, which is what points that matter need. A step that does not lower F_{-S} is halved,
    and where none does the correction ends. ``objective`` is over the remaining points; its
    module is what moves: the caller puts it back. Source: ours (docs/theory.md).

    Raises:
        SolverError: the gradient of the remaining points is not finite.
    """
    if memory.curvature is None:
        raise StateError(f"method={memory.settings.method!r} keeps no curvature to correct with")
    view, damping = objective.view, memory.settings.damping
    solver: Solver = memory.curvature.damped(damping).solver()
    before = start = objective.gradient()
    slow = False
    for _ in range(steps):
        if not math.isfinite(start.residual):
            raise SolverError(
                "the gradient of the remaining points is not finite: the request before the "
                "corrector went too far, or a point has extreme values; nothing was changed; try "
                "fewer points a request, damping, or no corrector"
            )
        if slow:
            start, curvature = objective.curvature()
            solver = curvature.damped(damping).solver()
        omega = view.get()
        step = solver.solve(start.gradient.to(memory.omega)).value.to(omega)
        trial = line_search(objective, objective.problem, omega, step, start, HALVINGS)
        if trial is None and slow:
            break
        slow = trial is None or trial.residual > PAYS * start.residual
        start = trial or start
    rounding = _ROUNDING * torch.finfo(view.dtype).eps
    return Correction(memory.at(view.get()), before, start, rounding)
