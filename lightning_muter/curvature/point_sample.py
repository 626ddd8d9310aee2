"""The rows of a few points beside a matrix, which tell the noise of its probes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_muter.curvature.base import Curvature, CurvatureSum, PointFacts
from lightning_muter.curvature.point import PointCurvature
from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.parallel import Group
from lightning_muter.responses.probes import mixed

__all__ = ["PointSample"]

_POINTS = 256  # that are kept: a sum of so many squares is known to a tenth
_REMOVED = 16  # of them that stand for a request


@dataclass
class PointSample:
    """A sum of curvature that keeps the rows of some of its points, drawn at random.

    Attributes:
        total: what all points are summed in.
        probes: a point of the sketch.
    """

    total: CurvatureSum
    probes: int
    _kept: PointRows | None = None

    def add(self, part: PointCurvature, facts: PointFacts | None = None) -> None:
        """Add the curvature of some points, and keep the rows of those of the lowest draws."""
        self.total.add(part, facts)
        if facts is None:
            return
        rows = PointRows.of(part, facts, torch.float64)
        both = rows if self._kept is None else PointRows.cat([self._kept, rows])
        order = mixed(both.facts.indices).argsort()[:_POINTS]
        self._kept = both[order]

    def finished(self, group: Group, weight: float, decay: float) -> Curvature:
        """What the points were summed in."""
        return self.total.finished(group, weight, decay)

    def noise(self, curvature: Curvature, points: int) -> float | None:
        """The share of an update that the probes' noise moves, for a request of some points.

        Args:
            curvature: the finished sum.
            points: that it is of.

        Returns:
            None where nothing is sketched.
        """
        rows = self._kept
        if rows is None or not rows.sketched:
            return None
        update = curvature.estimate(rows[:_REMOVED].gradient()).value
        apart = rows.resampled(self.probes, 0).matvec(update) - rows.matvec(update)
        apart = curvature.estimate(math.sqrt(points / len(rows)) * apart).value
        length = float(torch.linalg.vector_norm(update))
        return float(torch.linalg.vector_norm(apart)) / length if length > 0 else 0.0
