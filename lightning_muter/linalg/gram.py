"""Sums of weighted outer products, of which half is computed: the other half mirrors it."""

from __future__ import annotations

from torch import Tensor

__all__ = ["gram", "mirrored"]

#: strips that a matrix is computed in: of k strips (k + 1) / 2k of all entries are computed
_STRIPS = 6
#: columns of a strip at the least; narrower ones keep no processor busy
_NARROWEST = 96


def gram(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ_i weights_i rows_i rows_iᵀ (d, d), symmetric to the last bit.

    Args:
        rows: (n, d).
        weights: (n,), of any sign; ones by default.

    Example:
        >>> import torch
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([1.0, -1.0]))
        tensor([[ 1.,  2.],
                [ 2., -5.]])
    """
    other = rows if weights is None else rows * weights.unsqueeze(1)
    d = rows.shape[1]
    total = rows.new_empty(d, d)
    width = max(_NARROWEST, -(-d // _STRIPS))
    for start in range(0, d, width):
        end = min(start + width, d)
        strip = rows[:, start:end].T @ other[:, start:]
        total[start:end, start:end] = mirrored(strip[:, : end - start])
        total[start:end, end:] = strip[:, end - start :]
        total[end:, start:end] = strip[:, end - start :].T
    return total


def mirrored(matrix: Tensor) -> Tensor:
    """The symmetric matrix (d, d) of an upper triangle."""
    return matrix.triu().add_(matrix.triu(1).T)
