"""A dense symmetric matrix, factorised once and solved many times."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lightning_muter.linalg.solution import Solution, Status, finite, relative_residual

__all__ = ["DenseSolver", "direct"]

_SINGULAR = 1e-13
#: a singular system whose minimum-norm solution leaves more than this of b has none
_CONSISTENT = 1e-6


class DenseSolver:
    """Solves A x = b for a symmetric A (p, p): by Cholesky, else by its spectrum.

    The factor is computed at construction. Where A is not positive definite its eigenvalues serve
    instead, computed once and only then: the minimum-norm solution, with a status that says
    whether A is indefinite, singular, or singular along directions that b needs.

    Args:
        matrix: A (p, p), symmetric; not copied and not changed.

    Example:
        >>> import torch
        >>> solver = DenseSolver(2 * torch.eye(2))
        >>> solver.solve(torch.ones(2)).value, str(solver.solve(torch.ones(2)).status)
        (tensor([0.5000, 0.5000]), 'converged')
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        factor, info = torch.linalg.cholesky_ex(matrix.mT, upper=True)  # mT: LAPACK's own layout
        pivots = torch.diagonal(factor)
        definite = int(info) == 0
        definite = definite and float(pivots.min()) ** 2 > _SINGULAR * float(pivots.max()) ** 2
        self._factor = factor if definite else None

    @property
    def definite(self) -> bool:
        """Whether A is positive definite, beyond rounding."""
        return self._factor is not None

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, basis = torch.linalg.eigh(self.matrix)
        return values, basis

    def solve(self, rhs: Tensor) -> Solution:
        """x (p,) for b (p,), with its residual and status.

        Raises:
            SolverError: the solution is not finite.
        """
        if self._factor is None:
            return self._spectral(rhs)
        half = torch.linalg.solve_triangular(self._factor.mT, rhs.unsqueeze(1), upper=False)
        value = torch.linalg.solve_triangular(self._factor, half, upper=True).squeeze(1)
        residual = relative_residual(self.matrix @ value - rhs, rhs)
        return finite(Solution(value, residual, 0, Status.CONVERGED))

    def _spectral(self, rhs: Tensor) -> Solution:
        values, basis = self._spectrum
        largest = values.abs().max()
        kept = values.abs() > len(values) * torch.finfo(values.dtype).eps * largest
        inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), torch.zeros_like(values))
        value = basis @ (inverse * (basis.T @ rhs))
        residual = relative_residual(self.matrix @ value - rhs, rhs)
        status = Status.MINIMUM_NORM if residual <= _CONSISTENT else Status.INCONSISTENT
        if bool((values[kept] < 0).any()):
            status = Status.INDEFINITE
        return finite(Solution(value, residual, 0, status))


def direct(matrix: Tensor, rhs: Tensor) -> Solution:
    """One solve with `DenseSolver`.

    Example:
        >>> import torch
        >>> direct(2 * torch.eye(2), torch.ones(2)).value
        tensor([0.5000, 0.5000])
    """
    return DenseSolver(matrix).solve(rhs)
