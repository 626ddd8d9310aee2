"""M_r as a folder keeps it."""

from __future__ import annotations

from lightning_muter.curvature.base import Curvature
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.curvature.sharded import ShardedDense
from lightning_muter.memory.records import Content
from lightning_muter.spec import Settings

__all__ = ["kept_curvature"]


def kept_curvature(content: Content, settings: Settings, removed: list[int]) -> Curvature | None:
    """M_r as a folder keeps it: M_0, less what requests took out of it."""
    base, omega = content.base, content.base["omega_star"]
    if RowsCurvature.found_in(base):
        options = settings.rows_options(omega.device)
        rows = RowsCurvature.restore(base, omega, settings.weight_decay, options)
        return rows.without(removed)
    if "matrix" not in base:
        return None
    dense: DenseCurvature | ShardedDense = DenseCurvature(base["matrix"])
    if settings.representation == "sharded":
        dense = ShardedDense(base["matrix"])
    for request in content.requests:
        for one in request.facts:
            dense = dense.without(RemovedPoints.restore(one, request.tensors, omega))
    return dense
