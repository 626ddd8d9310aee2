"""Inner responses R_i = P K_i^{-1} P and what they become at the features of a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.sketch import inverse_square_root, seeded_probes
from lightning_muter.solvers import batched_conjugate_gradients
from lightning_muter.threats import Geometry

__all__ = ["Constrained", "DiagonalLowRank", "Response", "Unconstrained", "resolve_response"]

#: vectors (n, k, d) -> ∂δδ l times them
InputCurvature = Callable[[Tensor], Tensor]

_RANK = 1e-10
#: far below the noise of any number of probes
_PROBE_TOL = 1e-3


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

    def add_weighted_sum(self, total: Tensor, weights: Tensor) -> None:
        """total (d, d) += Σ_i weights_i of the matrices."""
        total.diagonal().add_(weights @ self.diagonal)
        for k in range(self.factors.shape[1]):
            _add_outer_products(total, self.factors[:, k], weights * self.coefficients[:, k])

    def compressed(self) -> DiagonalLowRank:
        """The same matrices without the factors that vanish, to rounding, at every point."""
        size = self.coefficients.abs() * self.factors.square().sum(dim=2)
        scale = torch.finfo(size.dtype).eps * self.diagonal.abs().amax(dim=1, keepdim=True)
        kept = (size > scale).any(dim=0)
        if bool(kept.all()):
            return self
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

    def add_weighted_sum(self, total: Tensor, weights: Tensor) -> None:
        total.add_(torch.einsum("n,nij->ij", weights, self.matrices))

    def congruence(self, jacobian: Tensor) -> Dense:
        return Dense(jacobian @ self.matrices @ jacobian.mT)


class Response(Protocol):
    """How δ* moves: from curvature (low rank V S Vᵀ, or dense H) and geometry to R.

    Both return R and a mask (n,) of points whose K_i was usable there.
    """

    @property
    def constrained(self) -> bool: ...

    @property
    def matrix_free(self) -> bool:
        """Whether `congruence` is there."""

    @property
    def rank(self) -> int:
        """How many probes a point a sketch takes; 0 for exact responses."""

    @property
    def probes(self) -> Tensor | None:
        """Probes (n, k, d) of the points at hand, where R is to be sketched."""

    def seeded(self, points: Tensor) -> Response:
        """The response with the probes of points (n, d); itself where nothing is sketched."""

    def sketch(
        self, geometry: Geometry, curvature: InputCurvature
    ) -> tuple[DiagonalLowRank, Tensor]:
        """An unbiased estimate of R from ``probes``, with ∂δδ l known by its products alone."""

    def low_rank(self, geometry: Geometry, v: Tensor, s: Tensor) -> tuple[DiagonalLowRank, Tensor]:
        """R for ∂δδ l = V S Vᵀ with V (n, d, C), S (n, C, C)."""

    def dense(self, geometry: Geometry, h: Tensor) -> tuple[Dense, Tensor]:
        """R for ∂δδ l = H (n, d, d)."""

    def congruence(
        self, geometry: Geometry, curvature: InputCurvature, jacobian: Tensor
    ) -> tuple[Dense, Tensor]:
        """J R Jᵀ (n, F, F) for J (n, F, d), with ∂δδ l known by its products alone."""


@dataclass(frozen=True)
class Constrained:
    """R = P (P(Δ - ∂δδ)P)^+ P: the constraint differentiated. Source: ours.

    ``tol`` is the residual at which `congruence` stops; its error is of the order of the square.
    With ``rank`` probes a point R is sketched where J is too dear, without bias and positive
    semidefinite.
    """

    tol: float = 1e-6
    constrained: bool = True
    rank: int = 0
    probes: Tensor | None = None

    def seeded(self, points: Tensor) -> Response:
        return replace(self, probes=seeded_probes(points, self.rank)) if self.rank else self

    def sketch(
        self, geometry: Geometry, curvature: InputCurvature
    ) -> tuple[DiagonalLowRank, Tensor]:
        assert self.probes is not None
        shift = geometry.shift.unsqueeze(1)
        # P commutes with the scale: μ is one number a point, Λ comes without a normal
        scale = torch.where(shift > 0, shift.clamp(min=1e-300).rsqrt(), torch.ones_like(shift))

        def scaled(v: Tensor) -> Tensor:
            return geometry.project(shift * scale.square() * v - scale * curvature(scale * v))

        root, usable = inverse_square_root(scaled, geometry.project(self.probes), self.tol)
        # of an indefinite K the root is huge: the network's own dtype would make it infinite
        root = torch.where(usable[:, None, None], root, torch.zeros_like(root))
        kept = usable.to(root).unsqueeze(1).expand(root.shape[:2]) / root.shape[1]
        return DiagonalLowRank(torch.zeros_like(root[:, 0]), scale * root, kept), usable

    def low_rank(self, geometry: Geometry, v: Tensor, s: Tensor) -> tuple[DiagonalLowRank, Tensor]:
        inverse = torch.where(
            (geometry.free > 0) & (geometry.shift > 0),
            geometry.free / geometry.shift.clamp(min=1e-300),
            torch.zeros_like(geometry.free),
        )
        # T = P Δ^{-1} P; with a normal Δ is a multiple of the identity on the free coordinates
        normal_scale = torch.linalg.vecdot(geometry.normal * inverse, geometry.normal)
        base = DiagonalLowRank(
            inverse, geometry.normal.unsqueeze(1), -normal_scale.unsqueeze(1)
        ).compressed()
        tv = base.apply(v)
        inner = v.mT @ tv
        eye = torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
        usable = torch.linalg.eigvals(inner @ s).real.amax(dim=1) < 1 - 1e-8
        eye_minus = torch.where(usable[:, None, None], eye - inner @ s, eye)
        middle = torch.linalg.solve(eye_minus.mT, s.mT).mT
        values, basis = torch.linalg.eigh((middle + middle.mT) / 2)
        keep = usable.to(s).unsqueeze(1)
        bend = DiagonalLowRank(inverse, basis.mT @ tv.mT, values).compressed()
        if bend.factors.shape[1]:
            base = DiagonalLowRank(
                inverse,
                torch.cat([base.factors, bend.factors], dim=1),
                torch.cat([base.coefficients, bend.coefficients], dim=1),
            )
        if not bool(usable.all()):
            base = replace(base, diagonal=inverse * keep, coefficients=base.coefficients * keep)
        return base, usable

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

    @property
    def matrix_free(self) -> bool:
        return True

    def congruence(
        self, geometry: Geometry, curvature: InputCurvature, jacobian: Tensor
    ) -> tuple[Dense, Tensor]:
        shift = geometry.shift.unsqueeze(1)

        def k(alpha: Tensor) -> Tensor:
            return geometry.project(shift * alpha - curvature(alpha))

        inverse = torch.where(shift > 0, 1 / shift.clamp(min=1e-300), torch.ones_like(shift))
        rhs = geometry.project(jacobian)
        x, rest, usable = batched_conjugate_gradients(k, rhs, inverse, self.tol)
        # X = K⁻¹(B - rest): XBᵀ + rest Xᵀ is B K⁻¹ Bᵀ up to the square of rest
        return Dense((x @ rhs.mT + rest @ x.mT) * usable[:, None, None]), usable


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


def resolve_response(
    response: str | Response, inverse: str = "neumann", order: int = 3, sketch: int = 0
) -> Response:
    """The `Response` for "constrained" or "unconstrained", or the object itself."""
    if sketch < 0:
        raise ConfigurationError(f"sketch={sketch} must be 0 (exact) or a number of probes")
    if response == "constrained":
        return Constrained(tol=_PROBE_TOL, rank=sketch) if sketch else Constrained()
    if response == "unconstrained":
        return Unconstrained(inverse, order, rank=sketch)  # type: ignore[arg-type]
    if isinstance(response, str):
        raise ConfigurationError(
            f"response={response!r} is unknown; expected 'constrained' or 'unconstrained'"
        )
    return response
