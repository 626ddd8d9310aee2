"""How far ω^u can be from a Retrain at its optimum, from the gradient alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.unlearning.linear_objective import gap_bound
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.objective import Evaluation

__all__ = ["Bound", "strong_convexity_bound"]


@dataclass(frozen=True)
class Bound:
    """An upper bound of ‖ω^u - ω_retrain‖ for the optimal Retrain, and what it rests on.

    ``value`` is None where none holds.
    """

    value: float | None
    certificate: str


def strong_convexity_bound(
    memory: UnlearningMemory, evaluation: Evaluation, inner_gap: float | None = None
) -> Bound:
    """‖∇F_{-S}(ω^u)‖ / (λ(n - m)), for a linear head and the exact inner maximum.

    With a gap η it is (‖g‖ + √(‖g‖² + 4κη)) / (2κ), κ = λ(n - m): F is a maximum of convex
    functions of a linear head whatever the network, and the gradient is one of a function that is
    short of F by η.

    Args:
        memory: of the remaining points.
        evaluation: of the remaining points at ω^u.
        inner_gap: η, what the perturbations may fall short of their maxima by, in all; None where
            nothing proves one: the bound then assumes 0, and is no certificate.

    Source: ours (docs/certificates.md).
    """
    settings = memory.settings
    remaining = len(memory.remaining)
    strong = settings.weight_decay * float(memory.weights[memory.remaining].sum())
    if settings.head is None:
        return _none("F is convex for a linear head only")
    if strong == 0:
        return _none("without weight decay F is not strongly convex")
    if settings.objective is not None:
        return _none("the objective of TRADES need not be convex")
    if settings.threat.temperature is not None:
        return _none("a mixed adversary's soft maximum need not be convex")
    if settings.horizon is not None:
        return _none("a Retrain that stops early is not the optimum")
    if METHODS[settings.method].points != "adversarial" or settings.space != "input":
        return _none("the method does not look at the robust objective")
    if evaluation.points != remaining:
        return _none(f"the gradient is of {evaluation.points} points, {remaining} remain")
    bound = gap_bound(evaluation.residual, inner_gap or 0.0, strong)
    if not math.isfinite(bound):
        return _none("the gradient of the remaining points is not finite")
    basis = "strong convexity, Retrain at its optimum"
    if inner_gap is not None:
        return Bound(bound, f"{basis}, an inner gap of at most {inner_gap:g} in all, as proved")
    return Bound(
        bound,
        "no certificate: the maximiser is not known to be global; a bound by "
        f"{basis}, exact inner maximum assumed: "
        f"{evaluation.stationary:.1%} of the remaining maximisers were stationary",
    )


def _none(reason: str) -> Bound:
    return Bound(None, f"no certificate: {reason}")
