"""Blocks of several classes by few points each, over a Gram matrix that all classes share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PivotFactors"]

#: times σ: the trace of what a class's block has outside the span of the class's pivots
_LEFT = 2.0
#: roundings of a class's heaviest point: what is left of a point by fewer is noise
_NOISE = 16
_STEPS = 32  # columns for which there is room at first


@dataclass(frozen=True)
class PivotFactors:
    """A_c⁻¹ = (I + Hᵀ Z_c H) / σ of A_c = σI + P_c Hᵀ D_c H P_c for g classes.

    H (n, F̃) are the points' features, D_c what they weigh in class c, and P_c projects on the span
    of the class's pivots, by which pivoted Cholesky of D^½ HHᵀ D^½ leaves a trace of less than 2 σ.
    Z_c is negative semidefinite on the pivots and zero elsewhere, so that A_c⁻¹ is
    positive by its form. Source: ours (docs/theory.md).

    Attributes:
        members: the classes (g,).
        pivots: points (g, k) of each; one of few has zeros in Z for the rest.
        inner: Z (g, k, k) on the pivots.
    """

    members: Tensor
    pivots: Tensor
    inner: Tensor

    @classmethod
    def of(
        cls, members: Tensor, gram: Tensor, weights: Tensor, shift: float, most: int
    ) -> PivotFactors:
        """The factors of some classes.

        Args:
            members: the classes (g,).
            gram: HHᵀ (n, n).
            weights: D (g, n), at least 0.
            shift: σ, positive.
            most: pivots of a class at the most.
        """
        roots = weights.sqrt()
        pivots, columns = _pivoted(gram, roots, _LEFT * shift, min(most, len(gram)))
        k = pivots.shape[1]
        # D^½ HHᵀ D^½ is RᵀR on the pivots; rows R⁻ᵀ D^½ H of them are an orthonormal basis
        corner = columns.gather(2, pivots.unsqueeze(1).expand(-1, k, -1)).double().triu()
        unused = corner.diagonal(dim1=1, dim2=2) <= 0
        corner.diagonal(dim1=1, dim2=2).masked_fill_(unused, 1.0)
        seen = (columns @ columns.mT).double() / shift
        eye = torch.eye(k, dtype=torch.float64, device=gram.device)
        factor, _ = torch.linalg.cholesky_ex(seen + eye)
        half = torch.linalg.solve_triangular(factor, eye, upper=False)
        own = roots.gather(1, pivots).double().masked_fill(unused, 0.0).unsqueeze(2)
        outer = own * torch.linalg.solve_triangular(corner, eye, upper=True)
        inner = outer @ (half.mT @ half - eye) @ outer.mT
        return cls(members, pivots, inner.to(gram.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes that the factors take."""
        return self.inner.numel() * self.inner.element_size() + 8 * self.pivots.numel()

    def add_to(self, total: Tensor, pairs: Tensor) -> None:
        """total += Z H V for ``pairs`` H V, both (q, C, n)."""
        own = pairs[:, self.members]
        index = self.pivots.expand(len(own), -1, -1)
        moved = self.inner @ own.gather(2, index).permute(1, 2, 0)
        spread = torch.zeros_like(own).scatter_add_(2, index, moved.permute(2, 0, 1))
        total.index_add_(1, self.members, spread)


def _pivoted(gram: Tensor, roots: Tensor, left: float, most: int) -> tuple[Tensor, Tensor]:
    """Pivots (g, k) and columns (g, k, n) of D^½ G D^½ ≈ Σ_j l_j l_jᵀ, all classes at once.

    A class is done once the trace of its rest is at most ``left``; its further columns are zero.
    """
    g, n = roots.shape
    rest = roots.square() * gram.diagonal()
    noise = _NOISE * torch.finfo(gram.dtype).eps * rest.amax(dim=1, keepdim=True)
    columns = roots.new_zeros(g, min(_STEPS, most), n)
    pivots: list[Tensor] = []
    for j in range(most):
        top, at = rest.max(dim=1, keepdim=True)
        todo = rest.sum(dim=1, keepdim=True) > left
        if not bool(todo.any()):
            break
        if j == columns.shape[1]:
            columns = torch.cat([columns, torch.zeros_like(columns)], dim=1)
        known = columns[:, :j]
        there = known.gather(2, at.unsqueeze(1).expand(-1, j, -1))
        column = roots * roots.gather(1, at) * gram[at[:, 0]] - (there.mT @ known).squeeze(1)
        column = torch.where(todo, column / top.clamp(min=left / n).sqrt(), 0.0)
        rest = (rest - column.square()).scatter_(1, at, 0.0)
        rest = torch.where(rest > noise, rest, 0.0)
        columns[:, j] = column
        pivots.append(at)
    found = torch.cat(pivots, dim=1) if pivots else torch.zeros(g, 0, dtype=torch.int64)
    return found.to(gram.device), columns[:, : len(pivots)]
