"""Anderson acceleration of a fixed-point map, one map a point, a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Anderson"]

_RIDGE = 1e-8  # relative: earlier residuals are nearly parallel close to a fixed point


class Anderson:
    """The last ``depth`` moves of each point and what they changed of its residual.

    Source: Anderson 1965, in the form of Walker and Ni 2011 (type II).

    Args:
        like: points (n, d), for their shape, dtype and device.
        depth: how many moves are kept.
    """

    def __init__(self, like: Tensor, depth: int = 5) -> None:
        n, d = like.shape
        self.moves = like.new_zeros(n, depth, d)
        self.changes = like.new_zeros(n, depth, d)
        self.filled = torch.zeros(n, dtype=torch.bool, device=like.device)
        self._slot = 0

    def propose(self, some: Tensor | slice, mapped: Tensor, residual: Tensor) -> Tensor:
        """Where the moves so far suggest that the residual vanishes (m, d).

        Args:
            some: which points.
            mapped: the map's images T(δ) of them (m, d).
            residual: T(δ) - δ (m, d).
        """
        moves, changes = self.moves[some], self.changes[some]
        gram = changes @ changes.mT
        scale = torch.diagonal(gram, dim1=1, dim2=2).amax(dim=1).clamp(min=1e-300)[:, None, None]
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        rhs = changes @ residual.unsqueeze(2) / scale
        weights: Tensor = torch.linalg.solve(gram / scale + _RIDGE * eye, rhs)
        along = weights.mT @ moves + weights.mT @ changes
        return mapped - along.squeeze(1)

    def record(self, some: Tensor | slice, move: Tensor, change: Tensor, kept: Tensor) -> None:
        """Remember a move (m, d) and its change of the residual, or forget all where not ``kept``.

        Args:
            some: which points.
            move: of δ (m, d).
            change: of T(δ) - δ (m, d).
            kept: whether the move was made (m, 1).
        """
        before = self.filled.clone()
        self.filled[some] = kept.squeeze(1)
        if bool(self.filled.any()):
            self.moves[some, self._slot] = torch.where(kept, move, 0.0)
            self.changes[some, self._slot] = torch.where(kept, change, 0.0)
        forgotten = torch.nonzero(before & ~self.filled).flatten()
        self.moves[forgotten], self.changes[forgotten] = 0, 0
        self._slot = (self._slot + 1) % self.moves.shape[1]
