"""A preconditioner for few points on a wide head: in the span of their rows (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.curvature.pivot_factors import PivotFactors
from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.curvature.probe_weights import ProbeWeights

__all__ = ["DualInverse"]

#: probes, whose system is solved with every application, at the most
_MOST = 4096
#: of the bytes, for everything but the classes' own factors
_FIXED = 0.75
#: a sum whose eigenvalues are farther apart than this cancels too much in float32
_APART = 1e5
#: bytes that are read faster in float32
_LARGE = 1 << 26
#: pivots a class at the most: making more takes longer than the products that they save
_PIVOTS = 96
_TOGETHER = 64  # classes whose pivots are found at once
#: points more or less for which it is not made anew: each one adds products, as the others' blocks
#: are exact and a request's right-hand side lies in what its own points had
_GONE = 2
_FEWEST = 8  # pivots a class for which there must be room


@dataclass(frozen=True)
class RowSpan:
    """The vectors v_k = r_k ⊗ b̃_k + t_k ⊗ h̃_k of m probes, by the features F = (h̃; b̃) (N, F̃).

    Attributes:
        features: F of n points and m probes, N = n + m.
        gram: FFᵀ (N, N).
        owners: the point (m,) of each probe.
        r: r_k (m, C).
        slopes: t_k (m, C).
    """

    features: Tensor
    gram: Tensor
    owners: Tensor
    r: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, rows: PointRows) -> RowSpan:
        """The span of some rows and of all their probes."""
        points, (n, k) = rows.points, rows.coefficients.shape
        h, f = points.sides[0], points.weight.shape[1]
        features = torch.cat([h, h.new_zeros(n * k, h.shape[1])])
        features[n:, :f] = rows.factors.flatten(0, 1)
        owners = torch.arange(n, device=h.device).repeat_interleave(k)
        return cls(
            features, features @ features.T, owners, points.r[owners], rows.slopes.flatten(0, 1)
        )

    @property
    def points(self) -> int:
        """n."""
        return len(self.features) - len(self.owners)

    @property
    def nbytes(self) -> int:
        """Bytes that the span takes."""
        parts = (self.features, self.gram, self.owners, self.r, self.slopes)
        return sum(one.numel() * one.element_size() for one in parts)

    def along(self, pairs: Tensor) -> Tensor:
        """Vᵀ X (q, m) for X Fᵀ (q, C, N)."""
        by_points = (self.slopes.T * pairs[..., self.owners]).sum(dim=1)
        return by_points + (self.r.T * pairs[..., self.points :]).sum(dim=1)

    def spread(self, s: Tensor) -> Tensor:
        """The coefficients (q, C, N) by which V s is a sum of features, for s (q, m)."""
        heights = s.unsqueeze(1)
        found = s.new_zeros(len(s), self.r.shape[1], len(self.features))
        found[..., self.points :] = self.r.T * heights
        return found.index_add_(2, self.owners, self.slopes.T * heights)

    def products(self) -> Tensor:
        """VᵀV (m, m)."""
        probes, own = self.gram[self.points :], self.gram[self.owners]
        found = (self.r @ self.r.T) * probes[:, self.points :]
        found += (self.slopes @ self.slopes.T) * own[:, self.owners]
        crossed = (self.r @ self.slopes.T) * probes[:, self.owners]
        return found + crossed + crossed.T

    def of_classes(self, members: Tensor, pivots: Tensor) -> Tensor:
        """(v_k)_c · h̃_i (g, m, k) for the pivots i (g, k) of classes c (g,)."""
        shape = (len(self.owners), *pivots.shape)
        probes = self.gram[self.points :][:, pivots.flatten()].reshape(shape)
        own = self.gram[:, pivots.flatten()][self.owners].reshape(shape)
        found = self.r[:, members].unsqueeze(2) * probes
        found += self.slopes[:, members].unsqueeze(2) * own
        return found.transpose(0, 1)


@dataclass(frozen=True)
class DualInverse:
    """z = Π (blockdiag(A_c) + V D Vᵀ)⁻¹ Π v + (I - Π) v / σ in the span of the points' rows.

    A_c is the block of class c without what the inner responses add (`PivotFactors`), V are all
    probes. Everything that is not in the span is divided by σ, so that an application is the matrix
    products of one product with the sum, and small ones. Π is as in `ClassBlocks`. Source: ours.

    Attributes:
        span: the features and the probes.
        factors: of the classes' blocks, some classes each.
        probes: the system of V.
        shift: σ, of the sum's multiple of the identity.
        centred: whether Π is there.
        points: rows that give a vector its matrix form.
    """

    span: RowSpan
    factors: Sequence[PivotFactors]
    probes: ProbeWeights
    shift: float
    centred: bool
    points: PointRows

    @staticmethod
    def room(rows: Sequence[PointRows], budget: int) -> int:
        """How many pivots a class may have within ``budget`` bytes; 0 where rows have no span.

        Numbers are counted in float64. Rows without a span: with a diagonal or of two inputs, of
        several structures, or with more than 4,096 probes.
        """
        first = rows[0]
        if any(one.structure != first.structure or not one.outer_products for one in rows):
            return 0
        n, k = sum(map(len, rows)), first.coefficients.shape[1]
        if n * k > _MOST:
            return 0
        classes, width = first.points.r.shape[1], first.points.features.shape[1]
        own = n * (1 + k) * (width + n * (1 + k)) + 2 * n * k * classes
        fixed = 8 * own + 16 * (n * k) ** 2
        left = int((max(budget - fixed, 0) / (8 * classes)) ** 0.5)
        return 0 if fixed > _FIXED * budget or left < _FEWEST else left

    @classmethod
    def of(
        cls, blocks: Sequence[PointRows], shift: float, budget: int, device: torch.device
    ) -> DualInverse:
        """The preconditioner of rows that have `room`.

        Args:
            blocks: all points.
            shift: σ, positive.
            budget: bytes.
            device: where it is to lie.
        """
        most = min(_PIVOTS, cls.room(blocks, budget))
        rows = PointRows.cat([one.on(device) for one in blocks])
        if rows.nbytes > _LARGE:
            rows = rows.converted(torch.float32)
        span, inner, weights = _weighed(rows)
        if rows.dtype == torch.float32 and _largest(rows, span, inner, weights) > _APART * shift:
            rows = rows.converted(torch.float64)
            span, inner, weights = _weighed(rows)
        factors = []
        order = (weights @ span.gram.diagonal()[: len(rows)]).argsort(descending=True)
        for members in torch.split(order, _TOGETHER):
            some = span.gram[: len(rows), : len(rows)]
            own = PivotFactors.of(members, some, weights[members], shift, most)
            crossed = span.of_classes(members, own.pivots)
            moved = (crossed @ own.inner).permute(1, 0, 2).flatten(1)
            inner += (moved @ crossed.permute(1, 0, 2).flatten(1).T).double()
            factors.append(own)
        gram = (inner + inner.T) / (2 * shift)
        n, k = rows.coefficients.shape
        numbers = torch.arange(k, device=device).repeat(n)
        probes = ProbeWeights.of(rows.facts.indices[span.owners], numbers, gram, blocks)
        return cls(span, factors, probes, shift, rows.points.s.sums_to_zero, rows[:1])

    def lasts(self, made: int, left: int) -> bool:
        """Whether what was made of ``made`` points still serves the ``left`` ones."""
        return abs(made - left) <= _GONE

    def now(self, rows: Sequence[PointRows], shift: float) -> DualInverse:
        """The same, with what probes weigh in some rows; a smaller σ scales all but their span."""
        return replace(self, probes=self.probes.now(rows))

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.span.nbytes + self.probes.nbytes + sum(one.nbytes for one in self.factors)

    def apply(self, v: Tensor) -> Tensor:
        """An approximation of M⁻¹ v (..., p)."""
        form, span, n = self.points.points, self.span, self.span.points
        matrix = torch.vmap(form.matrix_form)(v.reshape(-1, v.shape[-1]))
        mean = matrix.mean(dim=1, keepdim=True) if self.centred else torch.zeros_like(matrix[:, :1])
        x = (matrix - mean).to(span.features.dtype)
        pairs = x @ span.features.T
        first = self._moved(pairs[..., :n])
        along = span.along(pairs + first @ span.gram[:n]) / self.shift
        heights = span.spread(-self.probes.solve(along.T).T.to(x.dtype))
        heights[..., :n] += first + self._moved(heights @ span.gram[:, :n])
        solved = ((x + heights @ span.features) / self.shift).to(v.dtype)
        if self.centred:
            solved = solved - solved.mean(dim=1, keepdim=True) + mean / self.shift
        return torch.vmap(form.vector_form)(solved).reshape(v.shape)

    def _moved(self, pairs: Tensor) -> Tensor:
        """Z H X (q, C, n) of every class for H X."""
        total = torch.zeros_like(pairs)
        for one in self.factors:
            one.add_to(total, pairs)
        return total


def _weighed(rows: PointRows) -> tuple[RowSpan, Tensor, Tensor]:
    """The span, VᵀV (m, m) in float64, and what each point weighs in each class (C, n)."""
    span, points = RowSpan.of(rows), rows.points
    own = [points.entries(c)[:, 0, 0].clamp(min=0) for c in range(points.r.shape[1])]
    weights = torch.stack(own) * points.weights.to(rows.dtype)
    return span, span.products().double(), weights


def _largest(rows: PointRows, span: RowSpan, products: Tensor, weights: Tensor) -> float:
    """More than the largest eigenvalue of the sum."""
    traces = weights @ span.gram.diagonal()[: span.points]
    root = (rows.points.weights.unsqueeze(1) * rows.coefficients).double().flatten().sqrt()
    probes = torch.linalg.matrix_norm(root.unsqueeze(1) * products * root)
    return float(traces.max()) + float(probes)
