"""Inner responses R_i = P K_i^{-1} P and what they become at the features of a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.threats import Geometry

__all__ = ["Constrained", "DiagonalLowRank", "Response", "Unconstrained", "resolve_response"]

_RANK = 1e-10


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
        inner = self.coefficients.unsqueeze(2) * (self.factors @ vectors)
        return self.diagonal.unsqueeze(2) * vectors + self.factors.mT @ inner

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Σ_i weights_i of the matrices, (d, d)."""
        diagonal = weights @ self.diagonal
        total = torch.diag(diagonal)
        negligible = torch.finfo(weights.dtype).eps * float(diagonal.abs().max()) / len(weights)
        for k in range(self.factors.shape[1]):
            scale = weights * self.coefficients[:, k]
            column = self.factors[:, k]
            if (
                float((scale.abs() * torch.linalg.vector_norm(column, dim=1).square()).max())
                > negligible
            ):
                total.addmm_(column.T, column * scale.unsqueeze(1))
        return total

    def congruence(self, jacobian: Tensor) -> Dense:
        """J · self · Jᵀ for J (n, F, d)."""
        outer = jacobian @ self.factors.mT
        diagonal = (jacobian * self.diagonal.unsqueeze(1)) @ jacobian.mT
        return Dense(diagonal + (outer * self.coefficients.unsqueeze(1)) @ outer.mT)


@dataclass(frozen=True)
class Dense:
    """One dense symmetric matrix a point (n, d, d), with the operations of the low-rank form."""

    matrices: Tensor

    def apply(self, vectors: Tensor) -> Tensor:
        return self.matrices @ vectors

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return torch.einsum("n,nij->ij", weights, self.matrices)

    def congruence(self, jacobian: Tensor) -> Dense:
        return Dense(jacobian @ self.matrices @ jacobian.mT)


class Response(Protocol):
    """How δ* moves: from curvature (low rank V S Vᵀ, or dense H) and geometry to R.

    Both return R and a mask (n,) of points whose K_i was usable there.
    """

    @property
    def constrained(self) -> bool: ...

    def low_rank(self, geometry: Geometry, v: Tensor, s: Tensor) -> tuple[DiagonalLowRank, Tensor]:
        """R for ∂δδ l = V S Vᵀ with V (n, d, C), S (n, C, C)."""

    def dense(self, geometry: Geometry, h: Tensor) -> tuple[Dense, Tensor]:
        """R for ∂δδ l = H (n, d, d)."""


@dataclass(frozen=True)
class Constrained:
    """R = P (P(Δ - ∂δδ)P)^+ P: the constraint differentiated. Source: ours."""

    constrained: bool = True

    def low_rank(self, geometry: Geometry, v: Tensor, s: Tensor) -> tuple[DiagonalLowRank, Tensor]:
        inverse = torch.where(
            (geometry.free > 0) & (geometry.shift > 0),
            geometry.free / geometry.shift.clamp(min=1e-300),
            torch.zeros_like(geometry.free),
        )
        # T = P Δ^{-1} P; with a normal Δ is a multiple of the identity on the free coordinates
        normal_scale = torch.linalg.vecdot(geometry.normal * inverse, geometry.normal)
        base = DiagonalLowRank(inverse, geometry.normal.unsqueeze(1), -normal_scale.unsqueeze(1))
        tv = base.apply(v)
        inner = v.mT @ tv
        eye = torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
        usable = torch.linalg.eigvals(inner @ s).real.amax(dim=1) < 1 - 1e-8
        eye_minus = torch.where(usable[:, None, None], eye - inner @ s, eye)
        middle = torch.linalg.solve(eye_minus.mT, s.mT).mT
        values, basis = torch.linalg.eigh((middle + middle.mT) / 2)
        keep = usable.to(s).unsqueeze(1)
        return (
            DiagonalLowRank(
                inverse * keep,
                torch.cat([geometry.normal.unsqueeze(1), basis.mT @ tv.mT], dim=1),
                torch.cat([-normal_scale.unsqueeze(1), values], dim=1) * keep,
            ),
            usable,
        )

    def dense(self, geometry: Geometry, h: Tensor) -> tuple[Dense, Tensor]:
        projector = torch.diag_embed(geometry.free)
        projector = projector - geometry.normal.unsqueeze(2) * geometry.normal.unsqueeze(1)
        k = projector @ (torch.diag_embed(geometry.shift) - h) @ projector
        # scale first: rows of very different size would hide a small negative eigenvalue
        scale = torch.diagonal(k, dim1=1, dim2=2).abs().amax(dim=1).clamp(min=1e-300)
        eye = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
        filled = k / scale[:, None, None] + (eye - projector)
        factor, info = torch.linalg.cholesky_ex(filled)
        usable = info == 0
        factor = torch.where(usable[:, None, None], factor, eye)
        inverse = torch.cholesky_solve(projector, factor) / scale[:, None, None]
        r = projector @ inverse * usable.to(h)[:, None, None]
        return Dense((r + r.mT) / 2), usable


@dataclass(frozen=True)
class Unconstrained:
    """R = -∂δδ^{-1} by its Neumann series of order k (eq. 15, 16), or exactly (pseudo-inverse).

    Source: the paper, eq. (4), (15) and (16).
    """

    inverse: Literal["neumann", "exact"] = "neumann"
    order: int = 3
    constrained: bool = False

    def __post_init__(self) -> None:
        if self.inverse not in ("neumann", "exact"):
            raise ConfigurationError(
                f"inverse={self.inverse!r} is unknown; expected 'neumann' or 'exact'"
            )
        if self.order < 0:
            raise ConfigurationError(f"neumann_order={self.order} must be at least 0")

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


def resolve_response(
    response: str | Response, inverse: str = "neumann", order: int = 3
) -> Response:
    """The `Response` for "constrained" or "unconstrained", or the object itself."""
    if response == "constrained":
        return Constrained()
    if response == "unconstrained":
        return Unconstrained(inverse, order)  # type: ignore[arg-type]
    if isinstance(response, str):
        raise ConfigurationError(
            f"response={response!r} is unknown; expected 'constrained' or 'unconstrained'"
        )
    return response
