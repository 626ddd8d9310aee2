"""The two forms of a point's symmetric matrix: diagonal plus low rank, and dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Dense", "DiagonalLowRank", "restored"]


@dataclass(frozen=True)
class DiagonalLowRank:
    """diag(diagonal) + Σ_k coefficients_k factors_k factors_kᵀ, point by point.

    Shapes: diagonal (n, d), factors (n, k, d), coefficients (n, k).
    """

    diagonal: Tensor
    factors: Tensor
    coefficients: Tensor

    def apply(self, vectors: Tensor) -> Tensor:
        """Products with vectors (n, d, c)."""
        inner = self.coefficients.unsqueeze(2) * torch.bmm(self.factors, vectors)
        own = self.diagonal.unsqueeze(2) * vectors
        return torch.baddbmm(own, self.factors.mT, inner)

    def tensors(self) -> dict[str, Tensor]:
        """The parts, by name, with one row a point."""
        return {
            "diagonal": self.diagonal,
            "factors": self.factors,
            "coefficients": self.coefficients,
        }

    def main_diagonal(self) -> Tensor:
        """The diagonals (n, d)."""
        return self.diagonal + (self.coefficients.unsqueeze(2) * self.factors.square()).sum(dim=1)

    def add_weighted_sum(self, total: Tensor, weights: Tensor) -> None:
        """total (d, d) += Σ_i weights_i of the matrices."""
        total.diagonal().add_(weights @ self.diagonal)
        for k in range(self.factors.shape[1]):
            _add_outer_products(total, self.factors[:, k], weights * self.coefficients[:, k])

    def scaled(self, diagonal: Tensor) -> DiagonalLowRank:
        """J · self · J for J = diag(diagonal) (d,), the same at every point."""
        return replace(
            self, diagonal=self.diagonal * diagonal.square(), factors=self.factors * diagonal
        )

    def compressed(self) -> DiagonalLowRank:
        """The same matrices without the factors that vanish, to rounding, at every point."""
        size = self.coefficients.abs() * (self.factors * self.factors).sum(dim=2)
        largest = torch.linalg.vector_norm(self.diagonal, torch.inf, dim=1, keepdim=True)
        scale = torch.finfo(size.dtype).eps * largest
        flags = (size > scale).any(dim=0).tolist()
        if all(flags):
            return self
        kept = [k for k, flag in enumerate(flags) if flag] if any(flags) else slice(0)
        return replace(self, factors=self.factors[:, kept], coefficients=self.coefficients[:, kept])

    def congruence(self, jacobian: Tensor) -> Dense:
        """J · self · Jᵀ for J (n, F, d)."""
        outer = jacobian @ self.factors.mT
        diagonal = (jacobian * self.diagonal.unsqueeze(1)) @ jacobian.mT
        return Dense(diagonal + (outer * self.coefficients.unsqueeze(1)) @ outer.mT)


def _add_outer_products(total: Tensor, rows: Tensor, weights: Tensor) -> None:
    """total += Σ_i weights_i rows_i rows_iᵀ; one outer product where all rows are parallel.

    They are for a linear model of one output under an L2 ball: every normal is ±w/‖w‖.
    """
    first = rows[weights.abs().argmax()]
    unit = first / torch.linalg.vector_norm(first)
    tolerance = 4 * torch.finfo(rows.dtype).eps
    for part in (rows[:2], rows):
        along = part @ unit
        apart = float((part - along.unsqueeze(1) * unit).abs().max())
        if not apart <= tolerance * float(along.abs().max()):
            total.addmm_(rows.T, rows * weights.unsqueeze(1))
            return
    total.addr_(unit, unit, alpha=float(weights @ along.square()))


@dataclass(frozen=True)
class Dense:
    """One dense symmetric matrix a point (n, d, d), with the operations of the low-rank form."""

    matrices: Tensor

    def apply(self, vectors: Tensor) -> Tensor:
        return self.matrices @ vectors

    def tensors(self) -> dict[str, Tensor]:
        return {"matrices": self.matrices}

    def main_diagonal(self) -> Tensor:
        return torch.diagonal(self.matrices, dim1=1, dim2=2)

    def add_weighted_sum(self, total: Tensor, weights: Tensor) -> None:
        total.add_(torch.einsum("n,nij->ij", weights, self.matrices))

    def congruence(self, jacobian: Tensor) -> Dense:
        return Dense(jacobian @ self.matrices @ jacobian.mT)


def restored(tensors: Mapping[str, Tensor]) -> DiagonalLowRank | Dense:
    """The form that such tensors are of; others among them are left aside."""
    if "matrices" in tensors:
        return Dense(tensors["matrices"])
    return DiagonalLowRank(tensors["diagonal"], tensors["factors"], tensors["coefficients"])
