"""L-BFGS for many small problems at once: each has its own history, line search and end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: F (k,) and ∇F (k, p) at ω (k, p) of the problems of some rows (k,); accuracies asked (k,)
Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

MEMORY, TRIALS = 30, 25


@dataclass
class Found:
    """Where problems ended.

    Attributes:
        omega: (k, p).
        gradient: the largest entry of ∇F (k,).
        evaluations: of F, over all problems.
    """

    omega: Tensor
    gradient: Tensor
    evaluations: int = 0


@dataclass
class _State:
    """The problems that are still under way, and their last steps and slope changes."""

    rows: Tensor
    omega: Tensor
    value: Tensor
    slope: Tensor
    failures: Tensor
    steps: list[Tensor]
    changes: list[Tensor]
    inverses: list[Tensor]

    def part(self, keep: Tensor) -> _State:
        lists = ([a[keep] for a in b] for b in (self.steps, self.changes, self.inverses))
        own = (self.rows, self.omega, self.value, self.slope, self.failures)
        return _State(*(a[keep] for a in own), *lists)

    def remember(self, step: Tensor, change: Tensor) -> None:
        product = (step * change).sum(dim=1)
        least = 1e-12 * step.norm(dim=1) * change.norm(dim=1)
        self.steps = [*self.steps[1 - MEMORY :], step]
        self.changes = [*self.changes[1 - MEMORY :], change]
        known = torch.where(product > least, 1 / product.clamp(min=1e-300), 0.0)
        self.inverses = [*self.inverses[1 - MEMORY :], known]

    def direction(self, metric: Tensor | None) -> Tensor:
        """-H ∇F, by the two loops."""
        found, shares = self.slope, []
        past = list(zip(self.steps, self.changes, self.inverses, strict=True))
        for step, change, inverse in past[::-1]:
            share = inverse * (step * found).sum(dim=1)
            shares.append(share)
            found = found - share.unsqueeze(1) * change
        found = self._scaled(found, metric)
        for (step, change, inverse), share in zip(past, shares[::-1], strict=True):
            back = inverse * (change * found).sum(dim=1)
            found = found + (share - back).unsqueeze(1) * step
        down = (found * self.slope).sum(dim=1, keepdim=True) > 0
        return -torch.where(down, found, self.slope)

    def _scaled(self, found: Tensor, metric: Tensor | None) -> Tensor:
        if metric is not None:
            return found @ metric
        if not self.steps:
            return found / found.norm(dim=1, keepdim=True).clamp(min=1.0)
        step, change = self.steps[-1], self.changes[-1]
        ratio = (step * change).sum(dim=1) / (change * change).sum(dim=1).clamp(min=1e-300)
        return found * ratio.clamp(min=1e-6).unsqueeze(1)


def minimised(
    function: Function, start: Tensor, tol: float, metric: Tensor | None = None, steps: int = 1500
) -> Found:
    """Minima near starts (k, p), until the largest entry of each gradient is below tol.

    A problem whose line search fails twice running ends where it is; its gradient says so.
    ``metric`` (p, p) is a first guess of every inverse Hessian.
    """
    k = len(start)
    every = torch.arange(k)
    found = Found(start.clone(), torch.full((k,), torch.inf, dtype=start.dtype))
    accuracy = torch.full((k,), 1e-3, dtype=start.dtype)
    value, slope = function(start, every, accuracy)
    state = _State(every, start.clone(), value, slope, torch.zeros(k), [], [], [])
    for _ in range(steps):
        size = state.slope.abs().amax(dim=1)
        found.omega[state.rows], found.gradient[state.rows] = state.omega, size
        going = (size > tol) & (state.failures < 2)
        if not going.any():
            break
        if not going.all():
            state = state.part(going)
        found.evaluations += _advance(function, state, metric)
    return found


def _advance(function: Function, state: _State, metric: Tensor | None) -> int:
    """One step of each problem; returns how often F was asked for."""
    way = state.direction(metric)
    before, old = state.omega, state.slope
    after = _search(function, state, way)
    state.failures = torch.where(after.ok, 0.0, state.failures + 1)
    state.omega, state.value, state.slope = after.omega, after.value, after.slope
    state.remember(after.omega - before, after.slope - old)
    if not after.ok.all():
        state.inverses = [torch.where(after.ok, one, 0.0) for one in state.inverses]
    return after.asked


@dataclass
class _Searched:
    omega: Tensor
    value: Tensor
    slope: Tensor
    ok: Tensor
    asked: int = 0


def _search(function: Function, state: _State, way: Tensor) -> _Searched:
    """Bisection for the weak Wolfe conditions (Lewis and Overton 2013), a problem."""
    k = len(way)
    fall = (way * state.slope).sum(dim=1)
    low, high = torch.zeros_like(fall), torch.full_like(fall, torch.inf)
    length, ok = torch.ones_like(fall), torch.zeros(k, dtype=torch.bool)
    best = _Searched(state.omega.clone(), state.value.clone(), state.slope.clone(), ok)
    slack = 1e-11 * state.value.abs()
    left = torch.arange(k)
    for _ in range(TRIALS):
        omega = state.omega[left] + length[left].unsqueeze(1) * way[left]
        accuracy = state.slope[left].abs().amax(dim=1)
        value, slope = function(omega, state.rows[left], accuracy)
        best.asked += len(left)
        high_enough = value > state.value[left] + 1e-4 * length[left] * fall[left] + slack[left]
        flat = (slope * way[left]).sum(dim=1) < 0.9 * fall[left]
        good = ~high_enough & ~flat
        took = left[good]
        best.omega[took], best.value[took], best.slope[took] = omega[good], value[good], slope[good]
        ok[took] = True
        high[left[high_enough]] = length[left[high_enough]]
        rising = left[~high_enough & flat]
        low[rising] = length[rising]
        left = left[~good]
        if len(left) == 0:
            break
        bounded = high[left].isfinite()
        length[left] = torch.where(bounded, 0.5 * (low[left] + high[left]), 2 * length[left])
    return best
