"""Which curvature a method keeps of a point: one function a source."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_muter.curvature.kept import OuterProducts
from lightning_muter.curvature.point import Combined, PointCurvature
from lightning_muter.responses import Response
from lightning_muter.unlearning.points import Chunk

__all__ = ["SOURCES", "Source"]

#: (points, response, temperature of a mixed adversary) -> Σ w_i D_i without λI
Source = Callable[[Chunk, Response, float | None], PointCurvature]


def total(chunk: Chunk, response: Response, temperature: float | None) -> PointCurvature:
    """∂ωω l + ∂ωδ l · R · ∂δω l, and what moves the weights of a mixed adversary."""
    seeded = response.seeded(chunk.origin)
    first = chunk.linearisation.total(chunk.geometry, seeded)
    if chunk.rival is None:
        return first
    parts = [first, chunk.rival.linearisation.total(chunk.rival.geometry, seeded)]
    if response.constrained:
        parts.append(_covariance(chunk, chunk.rival, temperature))
    return Combined(parts)


def hessian(chunk: Chunk, response: Response, temperature: float | None) -> PointCurvature:
    """∂ωω l."""
    first = chunk.linearisation.hessian()
    return first if chunk.rival is None else Combined([first, chunk.rival.linearisation.hessian()])


def fisher(chunk: Chunk, response: Response, temperature: float | None) -> PointCurvature:
    """∇l ∇lᵀ, of a mixed adversary with its mean gradient."""
    if chunk.rival is None:
        return chunk.linearisation.fisher()
    other = chunk.rival.linearisation
    mixed = chunk.mixing.unsqueeze(1) * chunk.linearisation.gradients()
    gradients = mixed + chunk.rival.mixing.unsqueeze(1) * other.gradients()
    weights = chunk.linearisation.weights + other.weights
    usable = torch.ones_like(weights, dtype=torch.bool)
    return OuterProducts(gradients * weights.sqrt().unsqueeze(1), usable)


def _covariance(chunk: Chunk, rival: Chunk, temperature: float | None) -> PointCurvature:
    """Σ w Cov_π(∇l) / T: how the weights of a mixed adversary move with ω."""
    assert temperature is not None
    apart: Tensor = (chunk.linearisation.weights * rival.mixing / temperature).sqrt()
    gaps = chunk.linearisation.gradients() - rival.linearisation.gradients()
    usable = torch.ones_like(apart, dtype=torch.bool)
    return OuterProducts(gaps * apart.unsqueeze(1), usable)


SOURCES: dict[str, Source] = {"total": total, "hessian": hessian, "fisher": fisher}
