"""What some probes weigh, and the small system that they make of a sum's inverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.curvature.point_rows import PointRows

__all__ = ["ProbeWeights"]


@dataclass(frozen=True)
class ProbeWeights:
    """(D⁻¹ + G)⁻¹ with G = Vᵀ A⁻¹ V of m probes' vectors V, and D what they weigh.

    It is what turns A⁻¹ into (A + V D Vᵀ)⁻¹. D is looked up anew for every system: 0 where a point
    is forgotten, which this form allows. Source: Woodbury's identity.

    Attributes:
        points: the training points (m,) that the probes are of.
        numbers: which of its point's probes each is (m,).
        gram: G (m, m), float64.
        weights: D (m,), float64.
        factor: L of I + D^½ G D^½ = L Lᵀ (m, m), float64.
    """

    points: Tensor
    numbers: Tensor
    gram: Tensor
    weights: Tensor
    factor: Tensor

    @classmethod
    def of(
        cls, points: Tensor, numbers: Tensor, gram: Tensor, blocks: Sequence[PointRows]
    ) -> ProbeWeights:
        """The system of some probes with what they weigh in some rows."""
        return cls(points, numbers, gram, gram.diagonal(), gram).now(blocks)

    @property
    def nbytes(self) -> int:
        """Bytes that the system takes."""
        return 8 * 2 * self.gram.numel()

    def now(self, blocks: Sequence[PointRows]) -> ProbeWeights:
        """The same probes with the weights that they have in some rows."""
        weights = self._looked_up(blocks)
        root = weights.sqrt()
        inner = root.unsqueeze(1) * self.gram * root
        inner.diagonal().add_(1.0)
        factor, _ = torch.linalg.cholesky_ex(inner)
        return replace(self, weights=weights, factor=factor)

    def solve(self, v: Tensor) -> Tensor:
        """(D⁻¹ + G)⁻¹ v for columns v (m, k), float64."""
        root = self.weights.sqrt().unsqueeze(1)
        found: Tensor = root * torch.cholesky_solve(root * v.double(), self.factor)
        return found

    def _looked_up(self, blocks: Sequence[PointRows]) -> Tensor:
        """w_i c_ik (m,), float64, of the probes in rows; 0 of points that are not there."""
        points = self.points
        found = torch.zeros(len(points), dtype=torch.float64, device=points.device)
        for one in blocks:
            indices, order = one.facts.indices.to(points.device).sort()
            place = torch.searchsorted(indices, points).clamp(max=max(len(indices) - 1, 0))
            here = indices[place] == points if len(indices) else torch.zeros_like(points).bool()
            at, number = order[place[here]].to(one.device), self.numbers[here].to(one.device)
            own = one.points.weights[at] * one.coefficients[at, number].double()
            found[here] = own.to(points.device)
        return found
