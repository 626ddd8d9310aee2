"""The inner problem: find a perturbation, check that it is stationary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_muter.adversary.acceleration import Anderson
from lightning_muter.threats import Threat

__all__ = ["InnerMaximum", "maximise"]

#: (x (m, d), which points they are (m,)) -> losses (m,) and their gradient in the input (m, d)
InputGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

STATIONARY = 1e-3
_PAYS = 0.9  # an accelerated move that leaves more of the residual is followed by a plain one
#: the tolerance of accelerated points: another batch's rounding takes another way to the same δ*
_FINER = 1e-3
_PLAIN = 4  # passes before acceleration: most points need no more


@dataclass(frozen=True)
class InnerMaximum:
    """δ* of a batch with the evidence that it is one.

    ``delta`` and ``grad`` are (n, d); ``stationarity`` (n,) is how far the fixed-point map still
    moves δ relative to the radius of the set.
    """

    delta: Tensor
    grad: Tensor
    losses: Tensor
    stationarity: Tensor

    @property
    def stationary(self) -> Tensor:
        """Which points (n,) reached stationarity."""
        return self.stationarity <= STATIONARY

    @classmethod
    def cat(cls, parts: Sequence[InnerMaximum]) -> InnerMaximum:
        """The points of several batches."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def part(self, some: slice) -> InnerMaximum:
        """Some of the points."""
        return InnerMaximum(
            self.delta[some], self.grad[some], self.losses[some], self.stationarity[some]
        )


@torch.no_grad()
def maximise(
    input_gradient: InputGradient,
    x: Tensor,
    threat: Threat,
    max_iter: int = 200,
    start: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    tol: float = 1e-8,
) -> InnerMaximum:
    """Ascend to a stationary point of the inner problem, deterministically.

    Starts at ``start`` (zero by default), tries the threat's fixed-point map first and falls
    back, point by point, to shorter and shorter ascent steps wherever the (smoothed) objective
    fell. For a loss that is convex in δ the map itself is monotone (minorise-maximise). Points
    that are not done after some passes are accelerated, and never past a fall of the objective.

    Args:
        input_gradient: losses and their gradients at perturbed points.
        x: flattened points (n, d).
        threat: the constraint set.
        max_iter: passes over the batch at the most.
        start: perturbations (n, d) to start from.
        dtype: what losses and gradients were computed in: no difference below its rounding counts.
        tol: a point is done when the map moves it by less than this share of the radius.
    """
    rounding = 50 * torch.finfo(dtype).eps
    ascent = _Ascent(input_gradient, x, threat, start, dtype)
    limit = torch.full_like(ascent.moved, max(tol, rounding))
    history: Anderson | None = None
    for k in range(max_iter):
        todo = torch.nonzero(ascent.moved > limit).flatten()
        if len(todo) == 0:
            break
        if k == _PLAIN:
            history = Anderson(x)
            limit[todo] = max(_FINER * tol, rounding)
        ascent.advance(todo, history)
    return InnerMaximum(ascent.delta, ascent.grad, ascent.losses, ascent.moved)


class _Ascent:
    """Where the perturbations of a batch are: δ (n, d), losses, gradients, and the map's image."""

    def __init__(
        self,
        input_gradient: InputGradient,
        x: Tensor,
        threat: Threat,
        start: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.input_gradient, self.x, self.threat = input_gradient, x, threat
        self.slack = 10 * torch.finfo(dtype).eps
        self.delta = torch.zeros_like(x) if start is None else threat.project(x, start)
        everyone = torch.arange(len(x), device=x.device)
        self.losses, self.grad = input_gradient(x + self.delta, everyone)
        self.size = torch.full_like(x[:, :1], torch.inf)
        self.mapped = threat.ascend(x, self.delta, self.grad, self.size)
        self.moved = threat.distance(x, self.mapped - self.delta)
        if start is not None:  # a start within the tolerance would be kept with its whole error
            self.moved = torch.full_like(self.moved, torch.inf)

    def advance(self, todo: Tensor, history: Anderson | None) -> None:
        """Move the points ``todo`` to a candidate each, where it does not lower the objective."""
        threat = self.threat
        some: Tensor | slice = slice(None) if len(todo) == len(self.x) else todo
        point, now, slope, size = self.x[some], self.delta[some], self.grad[some], self.size[some]
        candidate = self.mapped[some]
        if not bool(torch.isinf(size).all()):
            candidate = threat.ascend(point, now, slope, size)
        bold = torch.zeros_like(size, dtype=torch.bool)
        if history is not None:
            residual = self.mapped[some] - now
            bold = history.filled[some].unsqueeze(1)
            proposal = threat.project(point, history.propose(some, self.mapped[some], residual))
            candidate = torch.where(bold, proposal, candidate)
        value, new_slope = self.input_gradient(point + candidate, todo)
        before = self.losses[some] + threat.merit(now, slope)
        after = value + threat.merit(candidate, slope)
        better = (after >= before - self.slack * (1 + before.abs())).unsqueeze(1)
        if history is not None:  # before δ changes: ``now`` may be a view of it
            move = torch.where(better, candidate - now, torch.zeros_like(now))
        self.delta[some] = torch.where(better, candidate, now)
        self.grad[some] = torch.where(better, new_slope, slope)
        self.losses[some] = torch.where(better.squeeze(1), value, self.losses[some])
        self.size[some] = torch.where(bold, size, _next_size(size, better))
        whole = torch.full_like(size, torch.inf)
        self.mapped[some] = threat.ascend(point, self.delta[some], self.grad[some], whole)
        left = self.mapped[some] - self.delta[some]
        distance = threat.distance(point, left)
        if history is not None:  # at an interior maximum the map has no fixed point to go by
            pays = (distance < _PAYS * self.moved[some]).unsqueeze(1) | ~bold
            history.record(some, move, left - residual, better & pays)
        self.moved[some] = distance


def _next_size(size: Tensor, better: Tensor) -> Tensor:
    """Twice the step after a success, half of it after a failure; 1 is next to infinity."""
    shorter = torch.where(torch.isinf(size), torch.ones_like(size), size / 2)
    longer = torch.where(size >= 1, torch.full_like(size, torch.inf), size * 2)
    return torch.where(better, longer, shorter)
