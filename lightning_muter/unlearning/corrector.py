"""What the remaining data can still do after a request: corrector steps, and a bound."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_muter.errors import StateError
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.objective import (
    HALVINGS,
    PAYS,
    Evaluation,
    RobustObjective,
    line_search,
)

__all__ = ["Bound", "correct", "strong_convexity_bound"]


@dataclass(frozen=True)
class Bound:
    """An upper bound of ‖ω^u - ω_retrain‖ for the optimal Retrain, and what it rests on.

    ``value`` is None where none holds.
    """

    value: float | None
    certificate: str


def correct(
    memory: UnlearningMemory, objective: RobustObjective, steps: int
) -> tuple[UnlearningMemory, Evaluation]:
    """ω ← ω - M_r^{-1} ∇F_{-S}(ω), ``steps`` times, δ* solved again at each; and where they end.

    M_r is the curvature at ω*: a step that leaves too much of the gradient has it renewed at the
    current ω, which is what points that matter need. A step that does not lower F_{-S} is halved,
    and where none does the correction ends. ``objective`` is over the remaining points; its
    module is what moves. Source: ours (docs/theory.md).
    """
    if memory.curvature is None:
        raise StateError(f"method={memory.settings.method!r} keeps no curvature to correct with")
    view, damping = objective.view, memory.settings.damping
    solver = memory.curvature.damped(damping).solver()
    start, slow = objective.gradient(), False
    for _ in range(steps):
        if slow:
            start, curvature = objective.curvature()
            curvature.add_identity(damping)
            solver = curvature.solver()
        omega = view.get()
        step = solver.solve(start.gradient.to(memory.omega)).value.to(omega)
        trial = line_search(objective, objective.problem, omega, step, start, HALVINGS)
        if trial is None and slow:
            break
        slow = trial is None or trial.residual > PAYS * start.residual
        start = trial or start
    return memory.at(view.get()), start


def strong_convexity_bound(memory: UnlearningMemory, evaluation: Evaluation) -> Bound:
    """‖∇F_{-S}(ω^u)‖ / (λ(n - m)), for a linear head and the exact inner maximum.

    Source: ours (docs/theory.md); ``evaluation`` is of the remaining points at ω^u.
    """
    settings = memory.settings
    strong = settings.weight_decay * float(memory.weights[memory.remaining].sum())
    if settings.head is None:
        return Bound(None, "no certificate: F is convex for a linear head only")
    if strong == 0:
        return Bound(None, "no certificate: without weight decay F is not strongly convex")
    if settings.threat.temperature is not None:
        return Bound(None, "no certificate: a mixed adversary's soft maximum need not be convex")
    if settings.horizon is not None:
        return Bound(None, "no certificate: a Retrain that stops early is not the optimum")
    if METHODS[settings.method].points != "adversarial" or settings.space != "input":
        return Bound(None, "no certificate: the method does not look at the robust objective")
    return Bound(
        evaluation.residual / strong,
        "strong convexity, Retrain at its optimum, exact inner maximum assumed: "
        f"{evaluation.stationary:.1%} of the remaining maximisers were stationary",
    )
