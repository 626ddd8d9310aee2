"""Factors of one class's block, for a preconditioner: of all its numbers, or of few rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["ClassFactor", "FullFactor", "ThinFactor"]

#: of a block's mean eigenvalue: a block without weight decay is singular where features vanish
_JITTER = 1e-12
#: a block whose eigenvalues are farther apart than this cancels too much in float32
_APART = 1e5


class ClassFactor(Protocol):
    """What solves A x = v for one symmetric positive definite A (F̃, F̃)."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

    def solve(self, v: Tensor) -> Tensor:
        """A⁻¹ v (m, F̃) for rows v (m, F̃)."""


@dataclass(frozen=True)
class FullFactor:
    """L⁻¹ of A = L Lᵀ.

    Attributes:
        half: L⁻¹ (F̃, F̃).
    """

    half: Tensor

    @classmethod
    def of(cls, block: Tensor, dtype: torch.dtype) -> FullFactor:
        """The factor of a block in float64; of its diagonal alone where it is indefinite."""
        block.diagonal().add_(_JITTER * float(block.diagonal().mean()))
        factor, info = torch.linalg.cholesky_ex(block)
        if int(info) != 0:
            factor = block.diagonal().abs().clamp(min=1e-300).sqrt().diag()
        return cls(_inverse(factor).to(dtype))

    @property
    def nbytes(self) -> int:
        return self.half.numel() * self.half.element_size()

    def solve(self, v: Tensor) -> Tensor:
        found: Tensor = v.to(self.half.dtype) @ self.half.T @ self.half
        return found.to(v.dtype)


@dataclass(frozen=True)
class ThinFactor:
    """A = Uᵀ U + σ I by its k < F̃ rows U: A⁻¹ v = (v - Uᵀ (σ I + U Uᵀ)⁻¹ U v) / σ.

    Attributes:
        rows: U (k, F̃).
        half: L⁻¹ of σ I + U Uᵀ = L Lᵀ (k, k).
        shift: σ, positive.
    """

    rows: Tensor
    half: Tensor
    shift: float

    @classmethod
    def of(cls, rows: Tensor, shift: float) -> ThinFactor:
        """The factor of some rows, in float64 where float32 would cancel."""
        gram = (rows @ rows.T).double()
        if float(gram.diagonal().sum()) > _APART * shift:
            rows = rows.double()
            gram = rows @ rows.T
        gram.diagonal().add_(shift)
        return cls(rows, _inverse(torch.linalg.cholesky(gram)).to(rows.dtype), shift)

    @property
    def nbytes(self) -> int:
        return (self.rows.numel() + self.half.numel()) * self.rows.element_size()

    def solve(self, v: Tensor) -> Tensor:
        inner = v.to(self.rows.dtype) @ self.rows.T
        back = inner @ self.half.T @ self.half @ self.rows
        return (v - back.to(v.dtype)) / self.shift


def _inverse(factor: Tensor) -> Tensor:
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse
