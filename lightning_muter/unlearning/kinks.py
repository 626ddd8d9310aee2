"""The step to the minimum of a quadratic model with kinks, |x·ω - y| of points near zero.

A robust squared loss is a smooth function and Σ c_i |r_i|, c_i what the perturbation moves the
output by. With t_i in [-1, 1] for the side of zero that point i is on, or the mixture of both
where it is held there, the model is minimal at -H⁻¹ (g + Σ c_i v_i x_i) for the changes v of t that
solve a quadratic problem in a box. Source: ours (docs/certificates.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Kinks", "Solve", "boxed_minimum", "kinked_step"]

#: columns G (p, k) -> H⁻¹ G of some curvature H
Solve = Callable[[Tensor], Tensor]

#: the most points that a step looks at as kinks: where more cross zero, it is a long one
_MOST = 512
#: times that further points are found to cross zero
_ROUNDS = 12
#: steps in the box, and halvings of one
_STEPS, _HALVINGS = 200, 8
#: of the diagonal, where points are linearly dependent
_RIDGE = 1e-13
#: of the slopes in the box that count as zero
_FLAT = 1e-12


@dataclass(frozen=True)
class Kinks:
    """The points whose residual can change its sign in a step.

    Attributes:
        rows: what their outputs are linear in, of k points (k,) -> (k, p).
        residual: r (n,).
        size: c (n,) ≥ 0.
        mixing: t (n,).
        moved: how a step (p,) moves the outputs (n,).
    """

    rows: Callable[[Tensor], Tensor]
    residual: Tensor
    size: Tensor
    mixing: Tensor
    moved: Callable[[Tensor], Tensor]


def kinked_step(kinks: Kinks, gradient: Tensor, solve: Solve) -> tuple[Tensor, Tensor]:
    """The step (p,) to the minimum of the model, to be subtracted, and t (n,) there.

    Points are taken in as they are found to cross zero, until none does.

    Args:
        kinks: of the points.
        gradient: g (p,) of the model, at t.
        solve: with its curvature.
    """
    plain = solve(gradient.unsqueeze(1)).squeeze(1)
    step, mixing = plain, kinks.mixing.clone()
    chosen = torch.nonzero(mixing.abs() < 1).flatten()
    rows, columns = kinks.rows(chosen), gradient.new_empty(len(gradient), 0)
    columns = solve((rows * kinks.size[chosen].unsqueeze(1)).T) if len(chosen) else columns
    for _ in range(_ROUNDS):
        if len(chosen):
            start, size = kinks.mixing[chosen], kinks.size[chosen]
            rest = size * (kinks.residual[chosen] - rows @ plain)
            curve = size.unsqueeze(1) * (rows @ columns)
            mixing[chosen] = boxed_minimum(curve, rest, start, mixing[chosen])
            step = plain + columns @ (mixing[chosen] - start)
        after = kinks.residual - kinks.moved(step)
        crossed = after * mixing < 0
        crossed[chosen] = False
        found = torch.nonzero(crossed).flatten()
        if not len(found):
            break
        if len(chosen) + len(found) > _MOST:
            mixing[found] = -mixing[found]
            break
        more = kinks.rows(found)
        chosen, rows = torch.cat([chosen, found]), torch.cat([rows, more])
        columns = torch.cat([columns, solve((more * kinks.size[found].unsqueeze(1)).T)], dim=1)
    return step, mixing


def boxed_minimum(curve: Tensor, rest: Tensor, start: Tensor, first: Tensor) -> Tensor:
    """t (k,) in [-1, 1] at the minimum of ½ v K v - b·v, v = t - ``start``.

    Newton's method on the entries that are free to move, projected onto the box (Bertsekas 1982).

    Args:
        curve: K (k, k), positive semidefinite.
        rest: b (k,).
        start: t (k,) where v is 0.
        first: t (k,) to begin with.
    """
    t, bend = first.clone(), curve.clone()
    bend.diagonal().add_(_RIDGE * float(curve.diagonal().max()))
    flat = _FLAT * float(rest.abs().max())

    def value(at: Tensor) -> float:
        v = at - start
        return float(v @ (0.5 * (curve @ v) - rest))

    now = value(t)
    for _ in range(_STEPS):
        slope = curve @ (t - start) - rest
        stuck = ((t <= -1) & (slope >= 0)) | ((t >= 1) & (slope <= 0))
        free = torch.nonzero(~stuck).flatten()
        if not len(free) or float(slope[free].abs().max()) <= flat:
            break
        factor, failed = torch.linalg.cholesky_ex(bend[free][:, free])
        if bool(failed) or not math.isfinite(now):
            break  # what it leaves is in the bound
        move = torch.zeros_like(t)
        move[free] = -torch.cholesky_solve(slope[free].unsqueeze(1), factor).squeeze(1)
        move *= min(1.0, 2.0 / float(move.abs().max()))  # where K is singular it has no end
        scales = itertools.chain((0.5**k for k in range(_HALVINGS)), [_to_a_side(t, move)])
        trials = ((t + scale * move).clamp(-1, 1) for scale in scales)
        found = next(((v, one) for one in trials if (v := value(one)) < now), None)
        if found is None:
            break
        now, t = found
    return t


def _to_a_side(t: Tensor, move: Tensor) -> float:
    """The share of a move at which the first entry arrives at its bound."""
    room = torch.where(move > 0, 1 - t, 1 + t) / move.abs().clamp(min=1e-300)
    some = room[(room > 0) & (move != 0)]
    return min(1.0, float(some.min())) if len(some) else 0.0
