"""Lengths and directions of the rows of a matrix, whatever the size of its entries.

Where a square could underflow or overflow each row is divided by its own largest absolute entry
first, so that no constant decides what counts as zero: only a row of exact zeros has no direction.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

__all__ = ["direction", "dot", "own_scale", "row_norm"]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (n, 1) of rows."""
    return (a * b).sum(dim=1, keepdim=True)


def row_norm(a: Tensor) -> Tensor:
    """Euclidean lengths (n, 1) of rows.

    Example:
        >>> import torch
        >>> row_norm(torch.tensor([[3e-30, -4e-30], [0.0, 0.0]]))
        tensor([[5.0000e-30],
                [0.0000e+00]])
    """
    norm: Tensor = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    if _squares_fit(norm) or not bool(a.any()):
        return norm
    scaled, largest = own_scale(a)
    rescaled: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return rescaled * largest


def direction(a: Tensor, length: float = 1.0) -> Tensor:
    """Vectors (n, d) of a length along the rows; zero rows stay zero."""
    norm: Tensor = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    if not _squares_fit(norm):
        a, largest = own_scale(a)
        again: Tensor = torch.linalg.vector_norm(a, dim=1, keepdim=True)
        norm = torch.where(largest > 0, again, 1.0)
    return a * (length / norm)


def _squares_fit(norm: Tensor) -> bool:
    """Whether lengths (n, 1) say by themselves that no square of weight was lost on the way."""
    return torch.equal(norm.clamp(*_limits(norm.dtype)), norm)


@cache
def _limits(dtype: torch.dtype) -> tuple[float, float]:
    info = torch.finfo(dtype)
    return math.sqrt(info.tiny) / info.eps, math.sqrt(info.max) * info.eps


def own_scale(a: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, d) over their largest absolute entry, and that entry (n, 1); zero rows stay.

    Example:
        >>> import torch
        >>> own_scale(torch.tensor([[1e-30, -2e-30], [0.0, 0.0]]))[0]
        tensor([[ 0.5000, -1.0000],
                [ 0.0000,  0.0000]])
    """
    largest: Tensor = torch.linalg.vector_norm(a, torch.inf, dim=1, keepdim=True)
    return a / (largest + (largest == 0)), largest
