"""What the remaining data can still do after a request: corrector steps, and a bound."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_muter.memory import UnlearningMemory
from lightning_muter.methods import METHODS
from lightning_muter.objective import Evaluation, RobustObjective
from lightning_muter.solvers import direct

__all__ = ["Bound", "correct", "strong_convexity_bound"]

_SLOW = 0.3


@dataclass(frozen=True)
class Bound:
    """An upper bound of ‖ω^u - ω_retrain‖ and what it rests on; None where none holds."""

    value: float | None
    certificate: str


def correct(memory: UnlearningMemory, objective: RobustObjective, steps: int) -> UnlearningMemory:
    """ω ← ω - M_r^{-1} ∇F_{-S}(ω), ``steps`` times, δ* solved again at each.

    A step that leaves more than ``_SLOW`` of the gradient has M_r, the curvature at ω*, renewed at
    the current ω: one pass more, and what points that matter need. ``objective`` is over the
    remaining points; its module is what moves. Source: ours (docs/theory.md).
    """
    derivatives = objective.derivatives
    damping = memory.settings.damping
    matrix = memory.matrix.clone()
    matrix.diagonal().add_(damping)
    before = float("inf")
    for _ in range(steps):
        evaluation = objective.gradient()
        if evaluation.residual > _SLOW * before:
            evaluation, matrix = objective.curvature()
            matrix.diagonal().add_(damping)
        before = evaluation.residual
        omega = derivatives.get()
        step = direct(matrix, evaluation.gradient.to(matrix)).value
        derivatives.set(omega - step.to(omega))
    return memory.at(derivatives.get())


def strong_convexity_bound(memory: UnlearningMemory, evaluation: Evaluation) -> Bound:
    """‖∇F_{-S}(ω^u)‖ / (λ(n - m)), for a linear head and the exact inner maximum.

    Source: ours (docs/theory.md); ``evaluation`` is of the remaining points at ω^u.
    """
    settings = memory.settings
    strong = settings.weight_decay * len(memory.remaining)
    if settings.head is None:
        return Bound(None, "no certificate: F is convex for a linear head only")
    if strong == 0:
        return Bound(None, "no certificate: without weight decay F is not strongly convex")
    if settings.threat.temperature is not None:
        return Bound(None, "no certificate: a mixed adversary's soft maximum need not be convex")
    if METHODS[settings.method].points != "adversarial" or settings.space != "input":
        return Bound(None, "no certificate: the method does not look at the robust objective")
    return Bound(
        evaluation.residual / strong,
        "strong convexity, exact inner maximum assumed: "
        f"{evaluation.stationary:.1%} of the remaining maximisers were stationary",
    )
