"""The probes that weigh most, beside the blocks of the classes (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.curvature.probe_weights import ProbeWeights

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
        rows: Uᵀ (m, p), float32.
        probes: the system of UᵀU and D.
    """

    rows: Tensor
    probes: ProbeWeights

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
        alone = torch.zeros_like(numbers)  # rows of one probe each
        own_weights = ProbeWeights.of(points, alone, gram, probes)
        return cls(rows.reshape(m, -1), replace(own_weights, numbers=numbers))

    @property
    def nbytes(self) -> int:
        """Bytes that the probes take."""
        return self.rows.numel() * self.rows.element_size() + self.probes.nbytes

    def now(self, blocks: Sequence[PointRows]) -> HeavyProbes:
        """The same probes with the weights that they have in some rows."""
        return replace(self, probes=self.probes.now(blocks))

    def apply(self, v: Tensor) -> Tensor:
        """(I + U D Uᵀ)⁻¹ v for rows v (k, p)."""
        inner = self.probes.solve(self.rows @ v.to(self.rows.dtype).T)
        return v - (inner.T.to(self.rows.dtype) @ self.rows).to(v.dtype)
