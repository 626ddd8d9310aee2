"""What a person must know before trusting a memory or a result, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_muter.linalg.solution import Solution, Status

__all__ = ["MemoryEvidence", "influence_warnings", "memory_warnings", "request_warnings"]

#: a quadratic model that retraces training worse than this share of its way is no model of it
RETRACE_LIMIT = 0.3
#: fewer stationary maximisers than this, and the gradient is not that of the robust objective
STATIONARY_LIMIT = 0.5
#: more points than this whose perturbation has two sides by chance are a part of the objective
TIED_LIMIT = 0.1
#: a Newton step longer than this share of ‖ω*‖ means that training did not reach an optimum
DISTANCE_LIMIT = 0.1
#: a Newton decrement above this share of F means that F would still fall by about half as much
DECREMENT_LIMIT = 0.02
#: training that stopped farther from its optimum than this share of an update hides the update
UNFINISHED_LIMIT = 0.3
#: an update longer than this multiple of ‖ω*‖ leaves what one quadratic model can describe
UPDATE_LIMIT = 1.0
_NAMED = 5  # classes that a sentence names


@dataclass(frozen=True)
class MemoryEvidence:
    """The numbers that Stage I found.

    Attributes:
        assumes_optimum: whether requests step from ω* as from the optimum of what was measured.
        retrace_error: what the quadratic model gets wrong of training's way, relative.
        stationary: share of the maximisers that were stationary.
        usable: share of the points whose K had a response.
        constrained: whether the constraint is differentiated.
        distance: length of a Newton step from ω*; None where the curvature is indefinite.
        size: ‖ω*‖.
        decrement: ∇Fᵀ M⁻¹ ∇F relative to F.
        solution: of that Newton step.
        weight_decay: λ.
        tied: share of the points whose two maximisers are too close to tell.
    """

    assumes_optimum: bool
    retrace_error: float | None
    stationary: float
    usable: float
    constrained: bool
    distance: float | None
    size: float
    decrement: float | None
    solution: Solution | None
    weight_decay: float
    tied: float = 0.0


def memory_warnings(evidence: MemoryEvidence) -> tuple[str, ...]:
    """One sentence for each number of Stage I that is beyond its limit, with what to do.

    Example:
        >>> base = dict(assumes_optimum=False, stationary=1.0, usable=1.0, constrained=True)
        >>> rest = dict(size=1.0, distance=None, decrement=None, solution=None, weight_decay=0.1)
        >>> memory_warnings(MemoryEvidence(retrace_error=0.1, **base, **rest))
        ()
        >>> len(memory_warnings(MemoryEvidence(retrace_error=29.0, **base, **rest)))
        1
    """
    found = [_retrace(evidence), _stationary(evidence), _usable(evidence)]
    found += [_tied(evidence), _optimum(evidence)]
    return tuple(sentence for sentence in found if sentence is not None)


def _retrace(e: MemoryEvidence) -> str | None:
    if e.retrace_error is None or e.retrace_error <= RETRACE_LIMIT:
        return None
    return (
        f"retrace_error is {e.retrace_error:.2g} (at most {RETRACE_LIMIT} is good): the quadratic "
        "model at the trained weights does not lead from where training started to where it ended, "
        "so a step of the same length is not what a Retrain would do; train with a smaller "
        "learning rate and without clipping, averaging or uneven sampling, or use newton_steps"
    )


def _stationary(e: MemoryEvidence) -> str | None:
    if e.stationary >= STATIONARY_LIMIT:
        return None
    return (
        f"only {e.stationary:.0%} of the training points' perturbations are stationary: the memory "
        "is of an adversary that was not found, not of the robust objective; use a smaller eps, "
        "smooth activations, or a wider smoothing or bandwidth of a LinfBall"
    )


def _usable(e: MemoryEvidence) -> str | None:
    if e.usable >= STATIONARY_LIMIT:
        return None
    if not e.constrained:
        return (
            f"only {e.usable:.0%} of the training points have an unconstrained response (a series "
            "that converges, or an inverse of ∂δδ l): at the others the formula has no meaning, "
            "and a step may end farther from a Retrain than doing nothing; use "
            "response='constrained'"
        )
    return (
        f"only {e.usable:.0%} of the training points are at a strict inner maximum: the others "
        "keep their direct curvature alone; use a smaller eps or smooth activations"
    )


def _tied(e: MemoryEvidence) -> str | None:
    if e.tied <= TIED_LIMIT:
        return None
    return (
        f"at {e.tied:.0%} of the training points the adversary has two maxima that are too close "
        "to tell: where training met the other one, the memory is of another perturbation; give "
        "the threat a temperature, which mixes the two"
    )


def _optimum(e: MemoryEvidence) -> str | None:
    """Is ω* near the optimum that a request steps from?"""
    if not e.assumes_optimum:
        return None
    if e.distance is None or e.decrement is None or e.solution is None:
        return (
            "the curvature is indefinite: a step leads to a saddle of the quadratic model, and may "
            "end farther from a Retrain than doing nothing; use response='constrained', more "
            "newton_steps or damping"
        )
    far = not e.distance <= DISTANCE_LIMIT * e.size
    falling = not e.decrement <= DECREMENT_LIMIT
    if e.solution.status is Status.INCONSISTENT:
        return (
            "the curvature is singular along directions in which the robust objective still "
            "falls: there is no optimum to step from; train with weight decay, or give damping"
        )
    if not far and not falling:
        return None
    remedy = (
        "train with weight decay: on data that the model separates the optimum without one is at "
        "infinity"
        if e.weight_decay == 0
        else "give newton_steps=..., or horizon='training' for a Retrain that stops as early; "
        "with a very small weight decay the optimum itself is far away"
    )
    return (
        f"training stopped about {e.distance:.3g} from its optimum (‖ω*‖ = {e.size:.3g}; F would "
        f"still fall by {e.decrement / 2:.1%}): the full step assumes that it converged, and may "
        f"end farther from a Retrain than doing nothing; {remedy}"
    )


def request_warnings(
    solution: Solution,
    update: float,
    size: float,
    stationary: float,
    distance: float,
    tied: float = 0.0,
    emptied: Sequence[int] = (),
) -> tuple[str, ...]:
    """One sentence for each number of a request that is beyond its limit, with what to do.

    Args:
        solution: of the request's system.
        update: ‖Δω‖ from ω*.
        size: ‖ω*‖.
        stationary: share of the removed points' maximisers that were stationary.
        distance: of ω* from the optimum that the request steps from; 0 where it assumes none.
        tied: share of the removed points whose two maximisers are too close to tell.
        emptied: classes whose last points the request removes.
    """
    found = []
    if emptied:
        named = ", ".join(map(str, emptied[:_NAMED])) + (", ..." if emptied[_NAMED:] else "")
        found.append(
            f"no point is left of class {named}: its output falls for as long as weight decay "
            "lets it, which one quadratic model does not follow; use corrector_steps=3 or more "
            "(which a memory with a horizon does not take), or train again"
        )
    if solution.status.remedy and solution.status is not Status.MINIMUM_NORM:
        found.append(
            f"the system of the remaining points ended {solution.status}: {solution.status.remedy}"
        )
    if distance > UNFINISHED_LIMIT * update:
        found.append(
            f"training stopped about {distance:.3g} from its optimum, the update is {update:.3g} "
            "long: what is left of training is as large as what the request changes; give (more) "
            "newton_steps and a larger weight decay, or horizon='training'"
        )
    if update > UPDATE_LIMIT * size:
        found.append(
            f"the update is {update:.3g} long beside ‖ω*‖ = {size:.3g}: one quadratic model does "
            "not reach so far; use corrector_steps (which a memory with a horizon does not take), "
            "or train again"
        )
    if stationary < STATIONARY_LIMIT:
        found.append(
            f"only {stationary:.0%} of the removed points' perturbations are stationary: what was "
            "subtracted is not their share of the robust objective; use a smaller eps, or a wider "
            "smoothing or bandwidth of a LinfBall"
        )
    if tied > TIED_LIMIT:
        found.append(
            f"at {tied:.0%} of the removed points the adversary has two maxima that are too close "
            "to tell: training may have met the other one; give the threat a temperature, which "
            "mixes the two"
        )
    return tuple(found)


def influence_warnings(of_memory: Sequence[str], stationary: float) -> tuple[str, ...]:
    """What a person must know of influences: what the memory warns of, and of the points asked.

    Args:
        of_memory: the memory's own warnings.
        stationary: share of the points' maximisers that were stationary.

    Example:
        >>> influence_warnings([], 0.9)
        ()
        >>> influence_warnings(["of the memory"], 0.1)[1].split(":")[0]
        "only 10% of these points' perturbations are stationary"
    """
    found = list(of_memory)
    if stationary < STATIONARY_LIMIT:
        found.append(
            f"only {stationary:.0%} of these points' perturbations are stationary: their gradients "
            "are not those of their robust losses, and neither are influences from or on them; "
            "leave such points out, or use a smaller eps, smooth activations, or a wider "
            "smoothing or bandwidth of a LinfBall"
        )
    return tuple(found)
