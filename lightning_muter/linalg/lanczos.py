"""Lanczos."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["inverse_square_root"]


def inverse_square_root(
    operator: Callable[[Tensor], Tensor], vectors: Tensor, tol: float = 1e-6, max_iter: int = 40
) -> tuple[Tensor, Tensor]:
    """K^{-1/2} times ``vectors`` (n, k, d) by Lanczos, one symmetric K a point.

    A vector whose last coefficient falls below ``tol`` of the result is done and changes no more,
    whatever else is in the batch.

    Returns:
        The products (n, k, d), and which points (n,) showed positive curvature only and are done.
    """
    norm = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
    q = vectors / norm.clamp(min=1e-300)
    basis, before = [q], torch.zeros_like(q)
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    beta = torch.zeros_like(norm)
    done = norm == 0
    for _ in range(min(max_iter, vectors.shape[2])):
        w = operator(q)
        alpha = (w * q).sum(dim=2, keepdim=True)
        alphas.append(torch.where(done, torch.ones_like(alpha), alpha).squeeze(2))
        w = w - alpha * q - beta * before
        for old in basis:  # rounding would let found directions come back
            w = w - (w * old).sum(dim=2, keepdim=True) * old
        length = torch.linalg.vector_norm(w, dim=2, keepdim=True)
        coefficients, lowest = _first_column(alphas, betas)
        last = coefficients[..., -1:].abs() / torch.linalg.vector_norm(
            coefficients, dim=2, keepdim=True
        )
        exhausted = length <= 1e-12 * alpha.abs()
        done = done | (last <= tol) | exhausted | (lowest <= 0).unsqueeze(2)
        if bool(done.all()):
            break
        beta = torch.where(done, torch.zeros_like(length), length)
        betas.append(beta.squeeze(2))
        before, q = q, torch.where(done, torch.zeros_like(w), w / length.clamp(min=1e-300))
        basis.append(q)
    coefficients, lowest = _first_column(alphas, betas[: len(alphas) - 1])
    value = sum(c.unsqueeze(2) * q for c, q in zip(coefficients.unbind(2), basis, strict=False))
    usable = (done.squeeze(2) & (lowest > 0)).all(dim=1)
    return norm * value, usable


def _first_column(alphas: list[Tensor], betas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """T^{-1/2} e_1 (n, k, m) of the tridiagonal T, and T's lowest eigenvalue (n, k).

    The latter less 1e-10 of the highest, so that rounding does not pass for positive.
    """
    t = torch.diag_embed(torch.stack(alphas, dim=2))
    if betas:
        off = torch.stack(betas, dim=2)
        t = t + torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)
    values, vectors = torch.linalg.eigh(t)
    lowest = values[..., 0] - 1e-10 * values[..., -1].abs()
    inverse = values.clamp(min=1e-300).rsqrt()
    return (vectors * inverse.unsqueeze(2) * vectors[..., :1, :]).sum(dim=3), lowest
