"""Lengths and directions of the rows of a matrix, whatever the size of its entries.

Each row is divided by its own largest absolute entry before any square is taken, so that neither
a tiny row underflows nor a huge one overflows, and no constant decides what counts as zero: only
a row of exact zeros has no direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["direction", "dot", "own_scale", "row_norm"]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (n, 1) of rows."""
    return (a * b).sum(dim=1, keepdim=True)


def own_scale(a: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, d) over their largest absolute entry, and that entry (n, 1); zero rows stay.

    Example:
        >>> import torch
        >>> own_scale(torch.tensor([[1e-30, -2e-30], [0.0, 0.0]]))[0]
        tensor([[ 0.5000, -1.0000],
                [ 0.0000,  0.0000]])
    """
    largest = a.abs().amax(dim=1, keepdim=True)
    return a / torch.where(largest > 0, largest, torch.ones_like(largest)), largest


def row_norm(a: Tensor) -> Tensor:
    """Euclidean lengths (n, 1) of rows."""
    scaled, largest = own_scale(a)
    norm: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True) * largest
    return norm


def direction(a: Tensor) -> Tensor:
    """Unit vectors (n, d) along the rows; zero rows stay zero."""
    scaled, _ = own_scale(a)
    # a row that is not zero has an entry of ±1 by now, so that only zero rows meet the bound
    unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp(min=1.0)
    return unit
