"""Rows of points on their way to a sum."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_muter.curvature.base import PointFacts
from lightning_muter.curvature.point import PointCurvature
from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.curvature.rows import RowsCurvature, RowsOptions
from lightning_muter.parallel import Group

__all__ = ["RowsSum"]

_BLOCK = 4096  # points that are kept together


@dataclass
class RowsSum:
    """The rows of a sum on its way.

    Attributes:
        options: how they are kept.
        p: parameters.
    """

    options: RowsOptions
    p: int
    _blocks: list[PointRows] = field(default_factory=list)
    _open: list[PointRows] = field(default_factory=list)
    _seen: int = 0

    def add(self, part: PointCurvature, facts: PointFacts | None = None) -> None:
        """Add the rows of some points; without ``facts`` they are counted as they come.

        Raises:
            ConfigurationError: a curvature that has no rows.
        """
        rows = PointRows.of(part, facts or _counted(self._seen, part.usable), self.options.dtype)
        self._seen += len(rows)
        if self._open and self._open[0].structure != rows.structure:
            self._close()
        self._open.append(rows)
        if sum(map(len, self._open)) >= _BLOCK:
            self._close()

    def _close(self) -> None:
        if self._open:
            self._blocks.append(PointRows.cat(self._open))
        self._open = []

    def finished(self, group: Group, weight: float, decay: float) -> RowsCurvature:
        """The rows of this process's points; their products sum over processes."""
        self._close()
        return RowsCurvature(tuple(self._blocks), self.p, decay, self.options, group=group)


def _counted(first: int, usable: Tensor) -> PointFacts:
    indices = torch.arange(first, first + len(usable), device=usable.device)
    return PointFacts(
        indices, torch.ones_like(usable), torch.zeros_like(indices, dtype=torch.float64)
    )
