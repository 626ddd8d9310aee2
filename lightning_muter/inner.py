"""The inner problem: find a perturbation, check that it is stationary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_muter.threats import Threat

__all__ = ["InnerMaximum", "maximise"]

#: (x (m, d), which points they are (m,)) -> losses (m,) and their gradient in the input (m, d)
InputGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

STATIONARY = 1e-3


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
    fell. For a loss that is convex in δ the map itself is monotone (minorise-maximise).

    Args:
        input_gradient: losses and their gradients at perturbed points.
        x: flattened points (n, d).
        threat: the constraint set.
        max_iter: passes over the batch at the most.
        start: perturbations (n, d) to start from.
        dtype: what losses and gradients were computed in: no difference below its rounding counts.
        tol: a point is done when the map moves it by less than this share of the radius.
    """
    rounding = torch.finfo(dtype).eps
    tol = max(tol, 50 * rounding)
    delta = torch.zeros_like(x) if start is None else threat.project(x, start)
    losses, grad = input_gradient(x + delta, torch.arange(len(x), device=x.device))
    size = torch.full_like(x[:, :1], torch.inf)
    mapped = threat.ascend(x, delta, grad, size)
    moved = threat.distance(x, mapped - delta)
    if start is not None:  # a start within tol would be kept with its whole error
        moved = torch.full_like(moved, torch.inf)
    for _ in range(max_iter):
        todo = torch.nonzero(moved > tol).flatten()
        if len(todo) == 0:
            break
        some: Tensor | slice = slice(None) if len(todo) == len(x) else todo
        point, now, slope = x[some], delta[some], grad[some]
        candidate = mapped[some]
        if not bool(torch.isinf(size[some]).all()):
            candidate = threat.ascend(point, now, slope, size[some])
        value, new_slope = input_gradient(point + candidate, todo)
        before = losses[some] + threat.merit(now, slope)
        after = value + threat.merit(candidate, slope)
        slack = 10 * rounding * (1 + before.abs())
        better = (after >= before - slack).unsqueeze(1)
        delta[some] = torch.where(better, candidate, now)
        grad[some] = torch.where(better, new_slope, slope)
        losses[some] = torch.where(better.squeeze(1), value, losses[some])
        size[some] = _next_size(size[some], better)
        whole = torch.full_like(size[some], torch.inf)
        mapped[some] = threat.ascend(point, delta[some], grad[some], whole)
        moved[some] = threat.distance(point, mapped[some] - delta[some])
    return InnerMaximum(delta, grad, losses, moved)


def _next_size(size: Tensor, better: Tensor) -> Tensor:
    """Twice the step after a success, half of it after a failure; 1 is next to infinity."""
    shorter = torch.where(torch.isinf(size), torch.ones_like(size), size / 2)
    longer = torch.where(size >= 1, torch.full_like(size, torch.inf), size * 2)
    return torch.where(better, longer, shorter)
