"""An adversary whose loss has no gradient at the point itself, and a maximum on either side."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from lightning_muter.adversary.maximiser import InnerMaximum
from lightning_muter.linalg.rows import direction
from lightning_muter.responses.probes import seeded_probes
from lightning_muter.threats import Threat

__all__ = ["higher", "seeded_start"]

_SHARE = 0.01  # of the threat's radius: near enough for the way to depend on the point alone
_SAME = 1e-3
_ROUNDING = 1e-9  # in double precision: of two maxima closer than this the first one serves


def seeded_start(threat: Threat, x: Tensor) -> Tensor:
    """A small allowed perturbation (n, d), each point's own by its content x (n, d) in pixels.

    The same point has the same start in every pass, so that every pass finds the same maximum.

    Example:
        >>> import torch
        >>> from lightning_muter import L2Ball
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> start = seeded_start(L2Ball(0.5), x)
        >>> torch.equal(start[1], seeded_start(L2Ball(0.5), x[1:])[0])
        True
    """
    towards = direction(seeded_probes(x, 1)[:, 0].to(x))
    return threat.project(x, _SHARE * threat.radius(x) * towards)


def higher(
    threat: Threat, x: Tensor, first: InnerMaximum, second: InnerMaximum, dtype: torch.dtype
) -> InnerMaximum:
    """The higher of two maxima of each point; the first one where rounding would decide.

    Args:
        threat: the constraint set.
        x: flat points (n, d).
        first: found from one side.
        second: found from the other.
        dtype: what the losses were computed in.

    Returns:
        Its ``gap`` is how much lower the other one is, relative to it.
    """
    heights = [one.losses + threat.merit(one.delta, one.grad) for one in (first, second)]
    apart = threat.distance(x, first.delta - second.delta) > _SAME
    rounding = max(_ROUNDING, 50 * torch.finfo(dtype).eps) * heights[0].abs()
    better = apart & (heights[1] > heights[0] + rounding)
    chosen = {
        f.name: _choose(better, getattr(second, f.name), getattr(first, f.name))
        for f in fields(InnerMaximum)
    }
    size = torch.maximum(*heights).abs().clamp(min=1e-300)
    gap = (heights[0] - heights[1]).abs() / size
    return replace(InnerMaximum(**chosen), gap=torch.where(apart, gap, torch.inf))


def _choose(which: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(which.reshape(-1, *(1 for _ in yes.shape[1:])), yes, no)
