"""Which approximate inverse serves a sum over rows: by what each reads and multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_muter.curvature.class_blocks import ClassBlocks, block_bytes
from lightning_muter.curvature.dual_inverse import DualInverse
from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.parallel import Group

__all__ = ["Preconditioner", "preconditioner_of"]

#: multiplications of a large matrix product in the time that one number of a block takes to read
_READ = 8


class Preconditioner(Protocol):
    """An approximation of (Σ w_i D_i + σI)⁻¹, symmetric positive definite."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

    def lasts(self, made: int, left: int) -> bool:
        """Whether what was made of ``made`` points still serves the ``left`` ones."""

    def now(self, rows: Sequence[PointRows], shift: float) -> Preconditioner:
        """The same for fewer points, other weights of their probes and another σ."""

    def apply(self, v: Tensor) -> Tensor:
        """What it makes of v (..., p)."""


def preconditioner_of(
    rows: Sequence[PointRows], shift: float, group: Group, budget: int, device: torch.device
) -> Preconditioner:
    """The span of the rows where points are few, else the blocks of the classes.

    With N = n (1 + K) features and probes, an application in their span multiplies 2 C N (F̃ + n)
    times; blocks of all classes are read twice, 2 C F̃² numbers. Where these do not fit they would
    be shared, and the span is taken wherever it fits (`DualInverse.room`).

    Args:
        rows: this process's points.
        shift: σ, at least 0.
        group: the processes, whose points sum.
        budget: bytes.
        device: where it is to lie.
    """
    points, k = sum(map(len, rows)), rows[0].coefficients.shape[1]
    classes, width = rows[0].points.r.shape[1], rows[0].points.features.shape[1]
    multiplied = points * (1 + k) * (width + points)
    few = multiplied <= _READ * width**2 or block_bytes(classes, width, torch.float32) > budget
    if few and group.size == 1 and shift > 0 and DualInverse.room(rows, budget) > 0:
        return DualInverse.of(rows, shift, budget, device)
    return ClassBlocks.of(rows, shift, group, budget, device)
