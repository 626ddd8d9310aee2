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
    """K with KᵀK = A⁻¹, for one symmetric positive definite A (F̃, F̃)."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

    def halved(self, v: Tensor) -> Tensor:
        """K x (m, F̃) for rows v (m, F̃)."""

    def whole(self, v: Tensor) -> Tensor:
        """Kᵀ x (m, F̃) for rows v (m, F̃), which ends what `halved` began: A⁻¹ = KᵀK."""


@dataclass(frozen=True)
class FullFactor:
    """K = L⁻¹ of A = L Lᵀ.

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

    def halved(self, v: Tensor) -> Tensor:
        return (v.to(self.half.dtype) @ self.half.T).to(v.dtype)

    def whole(self, v: Tensor) -> Tensor:
        return (v.to(self.half.dtype) @ self.half).to(v.dtype)


@dataclass(frozen=True)
class ThinFactor:
    """K = Q L⁻¹ Qᵀ + (I - QQᵀ) / √σ of A = UᵀU + σI by its k < F̃ rows U.

    Q is an orthonormal basis of the rows, UᵀU = Q (L Lᵀ - σI) Qᵀ.

    Attributes:
        basis: Qᵀ (k, F̃).
        half: L⁻¹ - I / √σ (k, k), what A adds to σI.
        shift: σ, positive.
    """

    basis: Tensor
    half: Tensor
    shift: float

    @classmethod
    def of(cls, rows: Tensor, shift: float) -> ThinFactor:
        """The factor of some rows, in float64 where float32 would cancel."""
        if float(rows.double().square().sum()) > _APART * shift:
            rows = rows.double()
        basis, upper = torch.linalg.qr(rows.T)
        gram = upper.double() @ upper.double().T
        gram.diagonal().add_(shift)
        half = _inverse(torch.linalg.cholesky(gram))
        half.diagonal().sub_(shift**-0.5)
        return cls(basis.T.contiguous(), half.to(rows.dtype), shift)

    @property
    def nbytes(self) -> int:
        return (self.basis.numel() + self.half.numel()) * self.basis.element_size()

    def halved(self, v: Tensor) -> Tensor:
        return self._with(v, self.half.T)

    def whole(self, v: Tensor) -> Tensor:
        return self._with(v, self.half)

    def _with(self, v: Tensor, half: Tensor) -> Tensor:
        inner = v.to(self.basis.dtype) @ self.basis.T
        found: Tensor = v / self.shift**0.5 + (inner @ half @ self.basis).to(v.dtype)
        return found


def _inverse(factor: Tensor) -> Tensor:
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse
