"""Conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.linalg.solution import Operator, Solution, finite, relative_residual

__all__ = ["batched_conjugate_gradients", "conjugate_gradients"]


def conjugate_gradients(
    operator: Operator,
    rhs: Tensor,
    preconditioner: Operator | None = None,
    tol: float = 1e-10,
    max_iter: int | None = None,
) -> Solution:
    """Preconditioned conjugate gradients; stops with "indefinite" at negative curvature."""
    apply = preconditioner or (lambda v: v)
    x = torch.zeros_like(rhs)
    r = rhs.clone()
    z = apply(r)
    direction = z.clone()
    rz = torch.dot(r, z)
    limit = 10 * len(rhs) if max_iter is None else max_iter
    threshold = tol * float(torch.linalg.vector_norm(rhs))
    status, iterations = "max_iterations", 0
    for iterations in range(limit + 1):
        if float(torch.linalg.vector_norm(r)) <= threshold:
            status = "converged"
            break
        if iterations == limit:
            break
        product = operator(direction)
        curvature = torch.dot(direction, product)
        if float(curvature) <= 0:
            status = "indefinite"
            break
        step = rz / curvature
        x = x + step * direction
        r = r - step * product
        z = apply(r)
        rz, previous = torch.dot(r, z), rz
        direction = z + (rz / previous) * direction
    return finite(Solution(x, relative_residual(operator(x) - rhs, rhs), iterations, status))


def batched_conjugate_gradients(
    operator: Operator, rhs: Tensor, inverse: Tensor, tol: float, max_iter: int = 500
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve one system a point for k right-hand sides each, (n, k, d), all points at once.

    Returns:
        The solutions (n, k, d), their residuals (n, k, d), and which points (n,) met positive
        curvature only and converged; a system that is done no longer changes, whatever else is in
        the batch.
    """
    x, r = torch.zeros_like(rhs), rhs.clone()
    z = inverse * r
    direction = z.clone()
    rz = (r * z).sum(dim=2, keepdim=True)
    limit = tol * torch.linalg.vector_norm(rhs, dim=2, keepdim=True)
    bad = torch.zeros_like(rz, dtype=torch.bool)
    for _ in range(max_iter):
        todo = (torch.linalg.vector_norm(r, dim=2, keepdim=True) > limit) & ~bad
        if not bool(todo.any()):
            break
        product = operator(direction)
        curvature = (direction * product).sum(dim=2, keepdim=True)
        bad |= todo & (curvature <= 0)
        step = torch.where(todo & ~bad, rz / curvature, torch.zeros_like(rz))
        x += step * direction
        r -= step * product
        z = inverse * r
        rz, before = (r * z).sum(dim=2, keepdim=True), rz
        direction = z + torch.where(todo, rz / before, torch.zeros_like(rz)) * direction
    done = torch.linalg.vector_norm(r, dim=2, keepdim=True) <= limit
    return x, r, (done & ~bad).all(dim=1).squeeze(1)
