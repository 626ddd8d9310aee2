"""Conjugate gradients: one iteration for a single system and for a system a point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.linalg.solution import (
    Operator,
    Solution,
    Status,
    finite,
    relative_residual,
)

__all__ = ["End", "batched_conjugate_gradients", "conjugate_gradients", "iterate"]


@dataclass(frozen=True)
class End:
    """Where the iteration stopped: x and b - A x (..., d), which systems were done or negative."""

    value: Tensor
    rest: Tensor
    done: Tensor
    negative: Tensor
    iterations: int


def iterate(
    operator: Operator,
    rhs: Tensor,
    preconditioner: Operator,
    tol: float | Tensor,
    max_iter: int,
    start: Tensor | None = None,
) -> End:
    """Systems along the last dimension of ``rhs`` (..., d); one that is done changes no more.

    ``tol`` is one number, or one a system (..., 1).

    The bare iteration, for callers that measure the residual in their own way.
    """
    x = torch.zeros_like(rhs) if start is None else start.clone()
    r = rhs.clone() if start is None else rhs - operator(start)
    z = preconditioner(r)
    direction = z.clone()
    rz = (r * z).sum(dim=-1, keepdim=True)
    limit = tol * torch.linalg.vector_norm(rhs, dim=-1, keepdim=True)
    negative = torch.zeros_like(rz, dtype=torch.bool)
    iterations = 0
    while iterations < max_iter:
        todo = (torch.linalg.vector_norm(r, dim=-1, keepdim=True) > limit) & ~negative
        if not bool(todo.any()):
            break
        product = operator(direction)
        curvature = (direction * product).sum(dim=-1, keepdim=True)
        negative = negative | (todo & (curvature <= 0))
        if not bool((todo & ~negative).any()):
            break
        iterations += 1
        step = torch.where(todo & ~negative, rz / curvature, torch.zeros_like(rz))
        x += step * direction
        r -= step * product
        z = preconditioner(r)
        rz, before = (r * z).sum(dim=-1, keepdim=True), rz
        direction = z + torch.where(todo, rz / before, torch.zeros_like(rz)) * direction
    done = torch.linalg.vector_norm(r, dim=-1, keepdim=True) <= limit
    return End(x, r, done, negative, iterations)


def conjugate_gradients(
    operator: Operator,
    rhs: Tensor,
    preconditioner: Operator | None = None,
    tol: float = 1e-10,
    max_iter: int = 1000,
    start: Tensor | None = None,
) -> Solution:
    """Preconditioned conjugate gradients for systems (..., p), told by the worst of them.

    Stops with "indefinite" at negative curvature and with "max_iterations" at its limit. The
    residual is computed anew from the solution, not taken from the recurrence.

    Args:
        operator: products with a symmetric A.
        rhs: b (..., p).
        preconditioner: products with an approximate inverse; None for the identity.
        tol: ‖A x - b‖ / ‖b‖ at which to stop.
        max_iter: iterations at the most.
        start: x (..., p) to begin at; 0 by default.

    Raises:
        SolverError: the solution is not finite.
    """
    end = iterate(operator, rhs, preconditioner or (lambda v: v), tol, max_iter, start)
    status = Status.CONVERGED if bool(end.done.all()) else Status.MAX_ITERATIONS
    if bool(end.negative.any()):
        status = Status.INDEFINITE
    residual = relative_residual(operator(end.value) - rhs, rhs)
    return finite(Solution(end.value, residual, end.iterations, status))


def batched_conjugate_gradients(
    operator: Operator, rhs: Tensor, inverse: Tensor, tol: float, max_iter: int = 500
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve one system a point for k right-hand sides each, (n, k, d), all points at once.

    Returns:
        The solutions (n, k, d), their residuals (n, k, d), and which points (n,) met positive
        curvature only and converged; a system that is done no longer changes, whatever else is in
        the batch.
    """
    end = iterate(operator, rhs, lambda v: inverse * v, tol, max_iter)
    return end.value, end.rest, (end.done & ~end.negative).all(dim=1).squeeze(1)
