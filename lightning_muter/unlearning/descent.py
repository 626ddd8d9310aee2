"""Down to a distance from the optimum of the remaining points that a bound proves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.unlearning.kinks import Kinks, Solve, kinked_step
from lightning_muter.unlearning.linear_objective import LinearRobustObjective, State
from lightning_muter.unlearning.objective import HALVINGS, PAYS
from lightning_muter.unlearning.secants import Secants

__all__ = ["Descent", "Solve", "descend"]

#: passes in a row that do not pay, while the set of points on their kink settles
_PATIENCE = 4
#: a point of the smoothed problem whose mixture is this near to an end is off its kink
_OFF = 0.95
#: a bias is at most this, and as many halvings find it to rounding
_BIAS, _HALVED = 2.0**10, 64
#: how much easier the problems on the way to an optimum are: shares of the mean level over which
#: kinks are rounded off, and factors of a bandwidth
_WAY = ((1e-1, 1e2), (1e-2, 1e1), (1e-3, 1.0), *((10.0**-k, 1.0) for k in range(4, 9)))
#: the first of them that can be the last
_LAST = 2
_EASY_STEPS = 12
#: parameters beyond which no matrix is built and factorised: passes with the memory's own only
_FACTORED = 20_000


@dataclass(frozen=True)
class Descent:
    """Where a descent ended, and what it took.

    Attributes:
        state: the one of the smallest bound.
        corrections: passes with the memory's curvature.
        rebuilds: Newton steps, each with its curvature built anew.
    """

    state: State
    corrections: int
    rebuilds: int


def descend(
    objective: LinearRobustObjective,
    starts: Sequence[Tensor],
    solve: Solve,
    radius: float,
    corrections: int = 20,
    rebuilds: int = 30,
) -> Descent:
    """Corrector passes, then Newton's method, until the bound is at most ``radius``.

    The passes use the curvature of the memory, bettered by what they find of it where there is no
    kink, as long as they pay; then it is built anew at each
    step; and where that does not lead there, easier problems are solved on the way. Points whose
    residual is next to zero, where a robust squared loss has a kink, are held there, and the
    mixture of their two perturbations is solved for. Source: ours (docs/certificates.md).

    Args:
        objective: of the remaining points.
        starts: where to begin (p,), the likeliest first; the one of the smallest bound is taken.
        solve: columns G (p, k) -> M_r⁻¹ G.
        radius: the bound that is wanted.
        corrections: passes with M_r at the most.
        rebuilds: Newton steps at the most, those on easier problems aside.
    """
    begun = _begun(objective, starts, solve)

    correct = _corrector(objective, begun, solve)

    def newton(state: State) -> State:
        return _searched(objective, state, _factor(objective.hessian(state)))

    best, last, passes = _while_it_pays(correct, begun, begun, radius, corrections)
    if len(best.omega) > _FACTORED:
        return Descent(best, passes, 0)
    best, last, built = _while_it_pays(newton, last, best, radius, rebuilds)
    if best.bound > radius:
        last, eased = _on_the_way(objective, best.omega)
        best, _, more = _while_it_pays(newton, last, best, radius, rebuilds)
        built += eased + more
    if best.bound > radius and objective.reach.pointed:
        best = min(best, _at_zero(objective), key=_bound)
    return Descent(best, passes, built)


def _corrector(
    objective: LinearRobustObjective, begun: State, solve: Solve
) -> Callable[[State], State]:
    """A pass with the memory's curvature; without kinks it learns from the passes before."""
    if objective.loss.kinked:
        return lambda state: _held_step(objective, state, solve)
    secants = Secants(solve, begun.gradient)

    def correct(state: State) -> State:
        step = secants.step()
        after = objective.at(state.omega - step)
        secants.learn(-step, after.gradient)
        return after

    return correct


def _bound(state: State) -> float:
    return state.bound if math.isfinite(state.bound) else math.inf


def _begun(objective: LinearRobustObjective, starts: Sequence[Tensor], solve: Solve) -> State:
    """The start of the smallest bound.

    Without kinks one that is farther from where a step from the first leads than the first itself
    is not worth a pass; with them its points may be on theirs already.
    """
    first, others = _started(objective, starts[0]), list(starts[1:])
    if others and not objective.loss.kinked:
        step = solve(first.gradient.unsqueeze(1)).squeeze(1)
        others = [one for one in others if (one - first.omega + step).norm() < step.norm()]
    return min([first, *(_started(objective, one) for one in others)], key=_bound)


def _started(objective: LinearRobustObjective, omega: Tensor) -> State:
    """The state at ω; residuals that are zero up to their rounding are on the kink."""
    state = objective.at(omega)
    if not objective.loss.kinked:
        return state
    on = state.level <= state.errors
    return objective.at(omega, torch.where(on, 0.0, state.side)) if bool(on.any()) else state


def _at_zero(objective: LinearRobustObjective) -> State:
    """The state at the best ω without weights, where the adversary may have left nothing better."""
    nothing = objective.points.x.new_zeros(objective.points.x.shape[1])
    way = objective.outputs.back(nothing, nothing.new_ones(())) / objective.outputs.count
    low, high = -_BIAS, _BIAS
    for _ in range(_HALVED):
        middle = (low + high) / 2
        rises = float(objective.at(middle * way).gradient @ way) > 0
        low, high = (low, middle) if rises else (middle, high)
    return min((objective.at(b * way) for b in (low, high, 0.0)), key=_bound)


def _while_it_pays(
    step: Callable[[State], State], state: State, best: State, radius: float, limit: int
) -> tuple[State, State, int]:
    """Steps until the radius is reached or they stop to pay: the best state, the last, how many."""
    idle = taken = 0
    while _bound(best) > radius and taken < limit and idle < _PATIENCE:
        state = step(state)
        taken += 1
        idle = 0 if _bound(state) < PAYS * _bound(best) else idle + 1
        best = min(best, state, key=_bound)
        if not math.isfinite(state.value):
            return best, best, taken
    return best, state, taken


def _on_the_way(objective: LinearRobustObjective, omega: Tensor) -> tuple[State, int]:
    """The state at the optimum of the last of some easier problems, each begun at the one before.

    The mixtures of a rounded kink tell which points of the problem itself are on it: those that
    stay between its sides as it becomes narrower.
    """
    level, taken = float(objective.at(omega).level.mean()), 0
    mixing, held = None, -1
    for k, (width, factor) in enumerate(_WAY):
        loss, reach = objective.loss.rounded(width * level), objective.reach.widened(factor)
        state, steps = _settled(replace(objective, loss=loss, reach=reach), omega)
        omega, taken = state.omega, taken + steps
        if k < _LAST:
            continue
        if not objective.loss.kinked:
            break
        mixing = torch.where(state.mixing.abs() > _OFF, state.mixing.sign(), state.mixing)
        before, held = held, int((mixing.abs() < 1).sum())
        if held == before <= len(omega):
            break
    return objective.at(omega, mixing), taken


def _settled(easy: LinearRobustObjective, omega: Tensor) -> tuple[State, int]:
    """Newton steps on a problem without kinks until they stop to pay, and how many."""
    state = easy.at(omega)
    first, taken = float(state.gradient.norm()), 0
    while taken < _EASY_STEPS:
        before, state = state, _searched(easy, state, _factor(easy.hessian(state)))
        taken += 1
        small = float(state.gradient.norm()) < 1e-8 * first
        if small or not before.value - state.value > 1e-14 * abs(before.value):
            break
    return state, taken


def _factor(hessian: Tensor) -> Solve:
    """Solves with a Hessian, which is at least κ on the diagonal."""
    factor = torch.linalg.cholesky(hessian)
    return lambda columns: torch.cholesky_solve(columns, factor)


def _searched(objective: LinearRobustObjective, state: State, solve: Solve) -> State:
    """A step, halved until F falls, or at its rounding the bound does."""
    rounding = 1e-14 * max(1.0, abs(state.value))
    scale, trial = 1.0, state
    for _ in range(HALVINGS):
        trial = _held_step(objective, state, solve, scale)
        nearer = trial.value <= state.value + rounding and _bound(trial) < _bound(state)
        if trial.value < state.value - rounding or nearer:
            return trial
        scale /= 2
    return trial


def _held_step(
    objective: LinearRobustObjective, state: State, solve: Solve, scale: float = 1.0
) -> State:
    """ω less a share of the step to the minimum of a model with curvature H, kinks and all.

    Points that end on their kink are held there by their mixture after a whole step.
    """
    if not objective.loss.kinked:
        return objective.at(state.omega - scale * solve(state.gradient.unsqueeze(1)).squeeze(1))
    step, mixing = kinked_step(_kinks(objective, state), state.gradient, solve)
    if scale < 1:
        return _started(objective, state.omega - scale * step)
    return objective.at(state.omega - step, mixing)


def _kinks(objective: LinearRobustObjective, state: State) -> Kinks:
    points, outputs = objective.points, objective.outputs

    def rows(some: Tensor) -> Tensor:
        return outputs.back(points.x[some], torch.ones_like(points.y[some]))

    def moved(step: Tensor) -> Tensor:
        w, b = outputs.seen(step)
        return points.x @ w + b

    return Kinks(
        rows=rows,
        residual=state.side * state.level,
        size=points.weights * objective.scale * state.reach,
        mixing=state.mixing,
        moved=moved,
    )
