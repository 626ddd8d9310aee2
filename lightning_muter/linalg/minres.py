"""Minimum residuals."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.linalg.solution import Operator, Solution, Status, finite, relative_residual

__all__ = ["minres"]


def minres(operator: Operator, rhs: Tensor, tol: float = 1e-10, max_iter: int = 1000) -> Solution:
    """Minimum residuals for a symmetric, possibly indefinite operator (Paige and Saunders)."""
    beta = torch.linalg.vector_norm(rhs)
    if float(beta) == 0:
        return Solution(torch.zeros_like(rhs), 0.0, 0, Status.CONVERGED)
    x = torch.zeros_like(rhs)
    v_old, v = torch.zeros_like(rhs), rhs / beta
    d_old, d = torch.zeros_like(rhs), torch.zeros_like(rhs)
    c_old, s_old, c, s = 1.0, 0.0, 1.0, 0.0
    scale, eta, b = float(beta), float(beta), 0.0
    iterations = 0
    for iterations in range(1, max_iter + 1):  # noqa: B007
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
    residual = relative_residual(operator(x) - rhs, rhs)
    done = residual <= max(1e3 * tol, 1e-8)
    status = Status.INDEFINITE if done else Status.MAX_ITERATIONS
    return finite(Solution(x, residual, iterations, status))
