"""Cholesky factorisation of a symmetric matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.linalg.solution import Solution, finite, relative_residual

__all__ = ["direct"]

_SINGULAR = 1e-13


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
        return finite(Solution(value, relative_residual(matrix @ value - rhs, rhs), 0, "converged"))
    values, basis = torch.linalg.eigh(matrix)
    largest = values.abs().max()
    kept = values.abs() > len(values) * torch.finfo(matrix.dtype).eps * largest
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), torch.zeros_like(values))
    value = basis @ (inverse * (basis.T @ rhs))
    indefinite = bool((values[kept] < 0).any())
    status = "indefinite" if indefinite else "minimum_norm"
    return finite(Solution(value, relative_residual(matrix @ value - rhs, rhs), 0, status))
