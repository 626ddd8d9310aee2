"""Solvers that never return a number without its status."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.errors import SolverError

__all__ = [
    "Solution",
    "batched_conjugate_gradients",
    "conjugate_gradients",
    "direct",
    "finite",
    "minres",
]

Operator = Callable[[Tensor], Tensor]

_SINGULAR = 1e-13


@dataclass(frozen=True)
class Solution:
    """A solution with its evidence: ‖A x - b‖ / ‖b‖, iterations and how it ended.

    ``status`` is "converged", "indefinite" (solved, but A is not positive definite),
    "minimum_norm" (A is singular) or "max_iterations".
    """

    value: Tensor
    residual: float
    iterations: int
    status: str


def _relative(residual: Tensor, rhs: Tensor) -> float:
    scale = float(torch.linalg.vector_norm(rhs))
    return float(torch.linalg.vector_norm(residual)) / scale if scale > 0 else 0.0


def finite(solution: Solution) -> Solution:
    """The solution itself, or a `SolverError` where it holds NaN or infinity."""
    if not bool(torch.isfinite(solution.value).all()):
        raise SolverError(
            f"the system gave a solution that is not finite (status {solution.status}); the "
            "memory is singular or damaged: raise damping"
        )
    return solution


def direct(matrix: Tensor, rhs: Tensor) -> Solution:
    """Cholesky of a symmetric matrix (p, p); otherwise its spectral minimum-norm solution.

    Example:
        >>> import torch
        >>> direct(2 * torch.eye(2), torch.ones(2)).value
        tensor([0.5000, 0.5000])
    """
    factor, info = torch.linalg.cholesky_ex(matrix.mT, upper=True)  # mT: LAPACK's own layout
    pivots = torch.diagonal(factor)
    if int(info) == 0 and float(pivots.min()) ** 2 > _SINGULAR * float(pivots.max()) ** 2:
        half = torch.linalg.solve_triangular(factor.mT, rhs.unsqueeze(1), upper=False)
        value = torch.linalg.solve_triangular(factor, half, upper=True).squeeze(1)
        return finite(Solution(value, _relative(matrix @ value - rhs, rhs), 0, "converged"))
    values, basis = torch.linalg.eigh(matrix)
    largest = values.abs().max()
    kept = values.abs() > len(values) * torch.finfo(matrix.dtype).eps * largest
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), torch.zeros_like(values))
    value = basis @ (inverse * (basis.T @ rhs))
    indefinite = bool((values[kept] < 0).any())
    status = "indefinite" if indefinite else "minimum_norm"
    return finite(Solution(value, _relative(matrix @ value - rhs, rhs), 0, status))


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
    return finite(Solution(x, _relative(operator(x) - rhs, rhs), iterations, status))


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


def minres(
    operator: Operator, rhs: Tensor, tol: float = 1e-10, max_iter: int | None = None
) -> Solution:
    """Minimum residuals for a symmetric, possibly indefinite operator (Paige and Saunders)."""
    limit = 10 * len(rhs) if max_iter is None else max_iter
    beta = torch.linalg.vector_norm(rhs)
    if float(beta) == 0:
        return Solution(torch.zeros_like(rhs), 0.0, 0, "converged")
    x = torch.zeros_like(rhs)
    v_old, v = torch.zeros_like(rhs), rhs / beta
    d_old, d = torch.zeros_like(rhs), torch.zeros_like(rhs)
    c_old, s_old, c, s = 1.0, 0.0, 1.0, 0.0
    scale, eta, b = float(beta), float(beta), 0.0
    iterations = 0
    for iterations in range(1, limit + 1):  # noqa: B007
        w = operator(v)
        alpha = float(torch.dot(v, w))
        w = w - alpha * v - b * v_old
        b_next = float(torch.linalg.vector_norm(w))
        delta = c * alpha - c_old * s * b
        rho2 = s * alpha + c_old * c * b
        rho3 = s_old * b
        rho1 = (delta**2 + b_next**2) ** 0.5
        if rho1 == 0:
            break
        c_old, s_old, c, s = c, s, delta / rho1, b_next / rho1
        d_new = (v - rho3 * d_old - rho2 * d) / rho1
        x = x + c * eta * d_new
        d_old, d = d, d_new
        eta = -s * eta
        if abs(eta) <= tol * scale or b_next <= 1e-300:
            break
        v_old, v, b = v, w / b_next, b_next
    residual = _relative(operator(x) - rhs, rhs)
    status = "indefinite" if residual <= max(1e3 * tol, 1e-8) else "max_iterations"
    return finite(Solution(x, residual, iterations, status))
