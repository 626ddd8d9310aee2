"""The constraint differentiated. Source: ours (docs/theory.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.linalg.cg import batched_conjugate_gradients
from lightning_muter.linalg.lanczos import inverse_square_root
from lightning_muter.responses.base import InputCurvature, Response
from lightning_muter.responses.matrices import Dense, DiagonalLowRank
from lightning_muter.responses.probes import seeded_probes
from lightning_muter.threats import Geometry

__all__ = ["Constrained"]


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

    def rough(self) -> Response:
        return replace(self, tol=1e-2, rank=min(self.rank, 1))

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
        shift = geometry.shift
        inverse = torch.where(shift > 0, geometry.free / shift.clamp(min=1e-300), 0.0)
        # T = P Δ^{-1} P; with a normal Δ is a multiple of the identity on the free coordinates
        normal_scale = torch.linalg.vecdot(geometry.normal * inverse, geometry.normal)
        some = slice(int(geometry.normal.any()))  # a normal of zero removes nothing
        base = DiagonalLowRank(
            inverse, geometry.normal.unsqueeze(1)[:, some], -normal_scale.unsqueeze(1)[:, some]
        )
        tv = base.apply(v)
        values, factors, usable = _bent(torch.bmm(v.mT, tv), s, tv)
        bend = DiagonalLowRank(inverse, factors, values).compressed()
        if bend.factors.shape[1]:
            base = DiagonalLowRank(
                inverse,
                torch.cat([base.factors, bend.factors], dim=1),
                torch.cat([base.coefficients, bend.coefficients], dim=1),
            )
        if not bool(usable.all()):
            keep = usable.to(s).unsqueeze(1)
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


def _bent(inner: Tensor, s: Tensor, tv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """TV S (I - VᵀTV S)⁻¹ VᵀT of every point, by coefficients (n, C) and factors (n, C, d).

    Args:
        inner: VᵀTV (n, C, C).
        s: S (n, C, C).
        tv: TV (n, d, C).

    Returns:
        They, and at which points (n,) K is positive definite: all eigenvalues of VᵀTV S below 1.
    """
    product = torch.bmm(inner, s)
    if s.shape[1] == 1:  # numbers: eigenvalues need no iteration
        below = product < 1 - 1e-8
        rest = torch.where(below, 1 - product, 1.0)
        return (s / rest).squeeze(2), tv.mT, below.flatten()
    eye = torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
    usable = torch.linalg.eigvals(product).real.amax(dim=1) < 1 - 1e-8
    eye_minus = torch.where(usable[:, None, None], eye - product, eye)
    middle = torch.linalg.solve(eye_minus.mT, s.mT).mT
    values, basis = torch.linalg.eigh((middle + middle.mT) / 2)
    return values, torch.bmm(basis.mT, tv.mT), usable
