"""The probes that weigh most, beside the blocks of the classes (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.curvature.point_rows import PointRows

__all__ = ["HeavyProbes"]

#: more probes than this make a product with them slower than they make the solve short
_MOST = 512
#: of all probes: what is most of a sum is no exception
_SHARE = 8

#: class c, rows (m, F̃) -> K_c times them
Halved = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class HeavyProbes:
    """(I + U D Uᵀ)⁻¹ with U = K V of some probes' vectors V (p, m), and D what they weigh.

    The sum of all other points is K⁻¹K⁻ᵀ, about; a probe that weighs much has the same vector in
    many classes, which their blocks cannot know of. Source: ours (docs/theory.md).

    Attributes:
        points: the training points (m,) that the probes are of.
        numbers: which of its point's probes each is (m,).
        rows: Uᵀ (m, p), float32.
        gram: UᵀU (m, m), float64.
        weights: D (m,), float64.
        factor: L of I + D^½ UᵀU D^½ = L Lᵀ (m, m), float64.
    """

    points: Tensor
    numbers: Tensor
    rows: Tensor
    gram: Tensor
    weights: Tensor
    factor: Tensor

    @staticmethod
    def count(blocks: Sequence[PointRows], room: int) -> int:
        """How many probes of some rows are worth it, in ``room`` bytes; 0 of rows without."""
        if not all(one.sketched and bool((one.coefficients >= 0).all()) for one in blocks):
            return 0
        classes, width = blocks[0].points.r.shape[1], blocks[0].points.features.shape[1]
        if classes == 1:  # its block is the sum
            return 0
        probes = sum(one.coefficients.numel() for one in blocks)
        return min(_MOST, probes // _SHARE, room // (4 * classes * width + 16 * _MOST))

    @staticmethod
    def bytes_of(blocks: Sequence[PointRows], count: int) -> int:
        """What ``count`` probes take."""
        some = blocks[0].points
        return count * (4 * some.r.shape[1] * some.features.shape[1] + 16 * count)

    @classmethod
    def split(
        cls, blocks: Sequence[PointRows], count: int
    ) -> tuple[list[PointRows], Tensor, list[PointRows]]:
        """The ``count`` heaviest probes, their numbers (m,), and the rows without them.

        Returns:
            Rows of one probe each, which of its point's probes it is, and all rows with the
            others alone.
        """
        sizes = torch.cat([one.probe_sizes().flatten().cpu() for one in blocks])
        heavy = torch.zeros(len(sizes), dtype=torch.bool)
        heavy[sizes.topk(count).indices] = True
        parts = torch.split(heavy, [one.coefficients.numel() for one in blocks])
        alone, numbers, others = [], [], []
        for part, one in zip(parts, blocks, strict=True):
            which = part.reshape(one.coefficients.shape).to(one.device)
            if bool(which.any()):
                alone.append(one.probes(which))
                numbers.append(which.nonzero()[:, 1].cpu())
                one = one.without_probes(which)
            others.append(one)
        return alone, torch.cat(numbers), others

    @classmethod
    def of(cls, probes: Sequence[PointRows], numbers: Tensor, halved: Halved) -> HeavyProbes:
        """The probes of `split`, with the K that was made of all other rows."""
        some = probes[0].points
        m, classes, width = len(numbers), some.r.shape[1], some.features.shape[1]
        rows = torch.empty(m, classes, width, dtype=torch.float32, device=some.r.device)
        gram = torch.zeros(m, m, dtype=torch.float64, device=rows.device)
        for c in range(classes):
            own = halved(c, torch.cat([one.probe(0, c) for one in probes]))
            gram += own.double() @ own.double().T
            rows[:, c] = own
        points = torch.cat([one.facts.indices for one in probes])
        found = cls(points, numbers, rows.reshape(m, -1), gram, gram.diagonal(), gram)
        return found.weighing(probes_weights(probes, points, torch.zeros_like(numbers)))

    @property
    def nbytes(self) -> int:
        """Bytes that the probes take."""
        return self.rows.numel() * self.rows.element_size() + 8 * 2 * self.gram.numel()

    def weighing(self, weights: Tensor) -> HeavyProbes:
        """The same probes with other weights (m,): 0 where a point is gone."""
        root = weights.sqrt()
        inner = root.unsqueeze(1) * self.gram * root
        inner.diagonal().add_(1.0)
        factor, _ = torch.linalg.cholesky_ex(inner)
        return replace(self, weights=weights, factor=factor)

    def now(self, blocks: Sequence[PointRows]) -> HeavyProbes:
        """The same probes with the weights that they have in some rows."""
        return self.weighing(probes_weights(blocks, self.points, self.numbers))

    def apply(self, v: Tensor) -> Tensor:
        """(I + U D Uᵀ)⁻¹ v for rows v (k, p)."""
        root = self.weights.sqrt().unsqueeze(1)
        inner = root * (self.rows @ v.to(self.rows.dtype).T).double()
        inner = root * torch.cholesky_solve(inner, self.factor)
        return v - (inner.T.to(self.rows.dtype) @ self.rows).to(v.dtype)


def probes_weights(blocks: Sequence[PointRows], points: Tensor, numbers: Tensor) -> Tensor:
    """w_i c_ik (m,), float64, of some points' probes in rows; 0 of points that are not there."""
    found = torch.zeros(len(points), dtype=torch.float64, device=points.device)
    for one in blocks:
        indices, order = one.facts.indices.to(points.device).sort()
        place = torch.searchsorted(indices, points).clamp(max=max(len(indices) - 1, 0))
        here = indices[place] == points if len(indices) else torch.zeros_like(points).bool()
        at = order[place[here]].to(one.device)
        own = one.points.weights[at] * one.coefficients[at, numbers[here].to(one.device)].double()
        found[here] = own.to(points.device)
    return found
