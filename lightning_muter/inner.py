"""The inner problem: find a perturbation, check that it is stationary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.threats import Threat

__all__ = ["InnerMaximum", "maximise"]

#: (x (n, d)) -> losses (n,) and their gradient in the input (n, d)
InputGradient = Callable[[Tensor], tuple[Tensor, Tensor]]

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


@torch.no_grad()
def maximise(
    input_gradient: InputGradient,
    x: Tensor,
    threat: Threat,
    max_iter: int = 200,
    tol: float = 1e-8,
    start: Tensor | None = None,
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
        tol: a point is done when the map moves it by less than this share of the radius.
        start: perturbations (n, d) to start from.
    """
    tol = max(tol, 20 * torch.finfo(x.dtype).eps)
    delta = torch.zeros_like(x) if start is None else threat.project(x, start)
    losses, grad = input_gradient(x + delta)
    size = torch.full_like(x[:, :1], torch.inf)
    target, moved = _fixed_point(x, threat, delta, grad)
    for _ in range(max_iter):
        if bool((moved <= tol).all()):
            break
        whole = torch.isinf(size)
        candidate = target
        if not bool(whole.all()):
            candidate = torch.where(whole, target, threat.ascend(x, delta, grad, size))
        new_losses, new_grad = input_gradient(x + candidate)
        before = losses + threat.merit(delta, grad)
        after = new_losses + threat.merit(candidate, grad)
        slack = 10 * torch.finfo(x.dtype).eps * (1 + before.abs())
        better = (after >= before - slack).unsqueeze(1)
        if bool(better.all()):
            delta, grad, losses = candidate, new_grad, new_losses
        else:
            delta = torch.where(better, candidate, delta)
            grad = torch.where(better, new_grad, grad)
            losses = torch.where(better.squeeze(1), new_losses, losses)
        shorter = torch.where(whole, torch.ones_like(size), size / 2)
        longer = torch.where(size >= 1, torch.full_like(size, torch.inf), size * 2)
        size = torch.where(better, longer, shorter)
        target, moved = _fixed_point(x, threat, delta, grad)
    return InnerMaximum(delta, grad, losses, moved)


def _fixed_point(
    x: Tensor, threat: Threat, delta: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    target = threat.ascend(x, delta, grad, torch.full_like(grad[:, :1], torch.inf))
    return target, threat.distance(x, target - delta)
