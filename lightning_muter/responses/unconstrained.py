"""The paper's response without a constraint, eq. (4), (15) and (16)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.responses.base import InputCurvature, Response
from lightning_muter.responses.matrices import Dense, DiagonalLowRank
from lightning_muter.responses.probes import seeded_probes
from lightning_muter.threats import Geometry

__all__ = ["Unconstrained"]

_RANK = 1e-10


@dataclass(frozen=True)
class Unconstrained:
    """R = -∂δδ^{-1} by its Neumann series of order k (eq. 15, 16), or exactly (pseudo-inverse).

    Source: the paper, eq. (4), (15) and (16).
    """

    inverse: Literal["neumann", "exact"] = "neumann"
    order: int = 3
    constrained: bool = False
    rank: int = 0
    probes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rank and self.inverse == "exact":
            raise ConfigurationError("sketch needs inverse='neumann': an exact inverse needs all")
        if self.inverse not in ("neumann", "exact"):
            raise ConfigurationError(
                f"inverse={self.inverse!r} is unknown; expected 'neumann' or 'exact'"
            )
        if self.order < 0:
            raise ConfigurationError(f"neumann_order={self.order} must be at least 0")

    def rough(self) -> Response:
        return self

    def seeded(self, points: Tensor) -> Response:
        return replace(self, probes=seeded_probes(points, self.rank)) if self.rank else self

    def sketch(
        self, geometry: Geometry, curvature: InputCurvature
    ) -> tuple[DiagonalLowRank, Tensor]:
        assert self.probes is not None
        total, converged = self._series(self.probes, curvature)
        # ½(abᵀ + baᵀ) = ¼((a + b)(a + b)ᵀ - (a - b)(a - b)ᵀ), a = Rz, b = z
        factors = torch.cat([self.probes - total, -total - self.probes], dim=1)
        quarter = torch.full_like(factors[:, :, 0], 0.25 / self.rank)
        quarter[:, self.probes.shape[1] :] *= -1
        return DiagonalLowRank(torch.zeros_like(factors[:, 0]), factors, quarter), converged

    def _series(self, vectors: Tensor, curvature: InputCurvature) -> tuple[Tensor, Tensor]:
        """Σ_j (I - ∂δδ)^j times vectors (n, k, d), and whether its terms still fall."""
        term, total = vectors, vectors.clone()
        before = after = torch.linalg.vector_norm(vectors, dim=2)
        for _ in range(self.order):
            term = term - curvature(term)
            total += term
            before, after = after, torch.linalg.vector_norm(term, dim=2)
        return total, (after < before).all(dim=1)

    def _spectral(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """-f(θ), and whether the series converges (or the inverse exists)."""
        if self.inverse == "exact":
            null = theta.abs() <= _RANK * theta.abs().amax(dim=1, keepdim=True).clamp(min=_RANK)
            safe = torch.where(null, torch.ones_like(theta), theta)
            return torch.where(null, torch.zeros_like(theta), -1 / safe), ~null.any(dim=1)
        total = torch.zeros_like(theta)
        for _ in range(self.order + 1):
            total = 1 + (1 - theta) * total
        return -total, ((1 - theta).abs() < 1).all(dim=1)

    def low_rank(self, geometry: Geometry, v: Tensor, s: Tensor) -> tuple[DiagonalLowRank, Tensor]:
        q, upper = torch.linalg.qr(v)
        theta, basis = torch.linalg.eigh(upper @ s @ upper.mT)
        rest = 0.0 if self.inverse == "exact" else -float(self.order + 1)
        values, converged = self._spectral(theta)
        if v.shape[1] > v.shape[2]:  # the null space of ∂δδ: (I - 0)^j never decays
            converged = torch.zeros_like(converged)
        return (
            DiagonalLowRank(
                torch.full_like(v[:, :, 0], rest), (q @ basis).mT.contiguous(), values - rest
            ),
            converged,
        )

    def dense(self, geometry: Geometry, h: Tensor) -> tuple[Dense, Tensor]:
        theta, basis = torch.linalg.eigh(h)
        values, converged = self._spectral(theta)
        return Dense((basis * values.unsqueeze(1)) @ basis.mT), converged

    @property
    def matrix_free(self) -> bool:
        return self.inverse == "neumann"

    def congruence(
        self, geometry: Geometry, curvature: InputCurvature, jacobian: Tensor
    ) -> tuple[Dense, Tensor]:
        total, converged = self._series(jacobian, curvature)
        return Dense(-total @ jacobian.mT), converged
