"""A dense symmetric matrix, factorised once and solved many times."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lightning_muter.errors import SolverError
from lightning_muter.linalg.solution import Solution, Status, finite, relative_residual

__all__ = ["DenseSolver", "direct"]

_SINGULAR = 1e-13
#: a singular system whose minimum-norm solution leaves more than this of b has none
_CONSISTENT = 1e-6
#: a matrix larger than this has its spectrum computed only where an LDLᵀ factorisation says that it
#: is singular: eigenvalues take some thirty times as long
_SPECTRUM_LIMIT = 2000


class DenseSolver:
    """Solves A x = b for a symmetric A (p, p): by Cholesky, else by its spectrum.

    The factor is computed at construction. Where A is not positive definite its eigenvalues serve
    instead, computed once and only then: the minimum-norm solution, with a status that says
    whether A is indefinite, singular, or singular along directions that b needs. A large A that is
    indefinite and regular is solved by an LDLᵀ factorisation.

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
        self._factor: Tensor | None = factor if definite else None

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
            return self._indefinite(rhs) or self._spectral(rhs)
        value = self.inverse(rhs)
        residual = relative_residual(self.matrix @ value - rhs, rhs)
        return finite(Solution(value, residual, 0, Status.CONVERGED))

    def solve_columns(self, rhs: Tensor) -> Tensor:
        """X (p, k) for B (p, k) of a definite A, all columns at once.

        Raises:
            SolverError: A is not positive definite.
        """
        return torch.cholesky_solve(rhs, self._cholesky(), upper=True)

    def inverse(self, rhs: Tensor) -> Tensor:
        """A⁻¹ b (p,) of a definite A = L Lᵀ, without its residual.

        Raises:
            SolverError: A is not positive definite.
        """
        factor, column = self._cholesky(), rhs.unsqueeze(1)
        half = torch.linalg.solve_triangular(factor.mT, column, upper=False)
        found: Tensor = torch.linalg.solve_triangular(factor, half, upper=True).squeeze(1)
        return found

    def _cholesky(self) -> Tensor:
        if self._factor is None:
            raise SolverError("the matrix is not positive definite: it has no Cholesky factor")
        return self._factor

    def _indefinite(self, rhs: Tensor) -> Solution | None:
        """By LDLᵀ, where A is large and regular: not positive definite, it is then indefinite."""
        p = len(self.matrix)
        if p <= _SPECTRUM_LIMIT:
            return None
        probe = torch.linspace(1.0, 2.0, p, dtype=rhs.dtype, device=rhs.device)
        probe = probe * torch.where(torch.arange(p, device=rhs.device) % 2 == 0, 1.0, -1.0)
        both = torch.stack([rhs, probe], dim=1)
        factor, pivots, info = self._ldl
        found = torch.linalg.ldl_solve(factor, pivots, both)
        inverse = float(torch.linalg.vector_norm(found[:, 1]) / torch.linalg.vector_norm(probe))
        scale = float(self.matrix.diagonal().abs().max())
        value = found[:, 0].contiguous()
        residual = relative_residual(self.matrix @ value - rhs, rhs)
        regular = int(info) == 0 and inverse * scale * _SINGULAR < 1
        if not regular or not residual <= _CONSISTENT:
            return None
        return finite(Solution(value, residual, 0, Status.INDEFINITE))

    @cached_property
    def _ldl(self) -> tuple[Tensor, Tensor, Tensor]:
        factor, pivots, info = torch.linalg.ldl_factor_ex(self.matrix)
        return factor, pivots, info

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
