"""How far the noise of probes moves a request's answer (docs/theory.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_muter.curvature.base import Curvature
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.unlearning.steps import Step

__all__ = ["NOISE_LIMIT", "noise_warning", "probes_for", "sketch_noise"]

#: noise above this share of the update is in doubt
NOISE_LIMIT = 0.1


def sketch_noise(
    curvature: Curvature, before: Curvature, step: Step, rhs: Tensor, update: Tensor
) -> float | None:
    """The length of an update's error by its probes, as a share of the update.

    The step is taken again with a sum whose probes count twice or not at all
    (`RowsCurvature.resampled`). On networks of the tests' size it is within a factor of 1.5 of the
    error that the exact responses show. Source: ours (docs/theory.md).

    Args:
        curvature: M of the request.
        before: the sum before it.
        step: how its system is solved.
        rhs: b (p,) of Stage II.
        update: Δω (p,) that was found.

    Returns:
        None where nothing is sketched, and where M keeps no rows.
    """
    if not isinstance(curvature, RowsCurvature) or not isinstance(before, RowsCurvature):
        return None
    other, whole = curvature.resampled(), before.resampled()
    if other is None or whole is None:
        return None
    length = float(torch.linalg.vector_norm(update))
    if length == 0:
        return 0.0
    change = step.change((curvature, other), (before, whole), rhs, update)
    return float(torch.linalg.vector_norm(change)) / length


def probes_for(noise: float, probes: int) -> int:
    """How many probes a point bring the noise of some below its limit: it falls with their root.

    Example:
        >>> probes_for(0.34, 1)
        12
    """
    return math.ceil(probes * (noise / NOISE_LIMIT) ** 2)


def noise_warning(noise: float | None, probes: int) -> str | None:
    """What to do about noise above its limit; None below it, and where there is none."""
    if noise is None or noise <= NOISE_LIMIT:
        return None
    return (
        f"the noise of {probes} probe{'s' * (probes > 1)} a point moves the update by about "
        f"{noise:.0%} of its length (at most {NOISE_LIMIT:.0%} is good): build the memory with "
        f"sketch={probes_for(noise, probes)}, or sketch=0 for the exact response"
    )
