"""The sum of points' curvature as one dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.curvature.point import PointCurvature
from lightning_muter.linalg.cholesky import DenseSolver

__all__ = ["DenseCurvature"]

_EIGEN_LIMIT = 2000


@dataclass(frozen=True)
class DenseCurvature:
    """Σ_i D_i as a symmetric matrix (p, p), float64.

    `add` and `add_identity` change the matrix; they are for whoever builds the sum. Everything
    else leaves it as it is.
    """

    matrix: Tensor

    @classmethod
    def zeros(cls, p: int, device: torch.device | str) -> DenseCurvature:
        """The empty sum."""
        return cls(torch.zeros(p, p, dtype=torch.float64, device=device))

    @property
    def p(self) -> int:
        """How many parameters."""
        return len(self.matrix)

    @property
    def nbytes(self) -> int:
        """Bytes that the sum takes."""
        return self.matrix.numel() * self.matrix.element_size()

    def to(self, device: torch.device | str) -> DenseCurvature:
        """The sum on another device."""
        return DenseCurvature(self.matrix.to(device))

    def add(self, part: PointCurvature) -> None:
        """Add the curvature of some points."""
        matrix = self.matrix

        def place(i: int, j: int, block: Tensor) -> None:
            matrix[i : i + block.shape[0], j : j + block.shape[1]] += block

        part.add_to(place)

    def add_identity(self, scale: float) -> None:
        """Add ``scale`` times the identity."""
        self.matrix.diagonal().add_(scale)

    def less(self, removal: DenseCurvature) -> DenseCurvature:
        """The sum without another one, in the other one's memory: ``removal`` is used up."""
        return DenseCurvature(removal.matrix.neg_().add_(self.matrix))

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> DenseCurvature:
        """The sum over processes."""
        return DenseCurvature(reduce(self.matrix))

    def damped(self, damping: float) -> DenseCurvature:
        """The sum plus ``damping`` times the identity; itself at zero."""
        if damping == 0:
            return self
        matrix = self.matrix.clone()
        matrix.diagonal().add_(damping)
        return DenseCurvature(matrix)

    def matvec(self, v: Tensor) -> Tensor:
        """Products with v (p,)."""
        return self.matrix @ v

    def diagonal(self) -> Tensor:
        """The diagonal (p,)."""
        return self.matrix.diagonal()

    def solver(self) -> DenseSolver:
        """A factorisation that solves many systems."""
        return DenseSolver(self.matrix)

    def extremes(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue; beyond some size by LOBPCG; NaN where not finite."""
        matrix = self.matrix
        if not bool(torch.isfinite(matrix).all()):
            return float("nan"), float("nan")
        if self.p <= _EIGEN_LIMIT:
            values = torch.linalg.eigvalsh(matrix)
            return float(values[0]), float(values[-1])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            low = torch.lobpcg(matrix, k=1, largest=False, niter=30)[0]
            high = torch.lobpcg(matrix, k=1, largest=True, niter=30)[0]
        return float(low[0]), float(high[0])
