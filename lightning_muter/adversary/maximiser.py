"""The inner problem: find a perturbation, check that it is stationary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Union

import torch
from torch import Tensor

from lightning_muter.adversary.acceleration import Anderson
from lightning_muter.linalg.rows import row_norm
from lightning_muter.objectives.link import IDENTITY, Link
from lightning_muter.threats import Threat

__all__ = ["InnerMaximum", "InputGradient", "Some", "inspect", "maximise"]

#: indices of some points (m,), or all of them
Some = Union[Tensor, slice]  # noqa: UP007
#: (x (m, d), which points they are) -> levels (m,) and their gradient in the input (m, d)
InputGradient = Callable[[Tensor, Some], tuple[Tensor, Tensor]]

_EVERYONE = slice(None)

STATIONARY = 1e-3
#: two maxima closer than this share of their height: nothing tells which one training would meet
TIED = 1e-5
_PAYS = 0.9  # an accelerated move that leaves more of the residual is followed by a plain one
#: the tolerance of accelerated points: another batch's rounding takes another way to the same δ*
_FINER = 1e-3
_PLAIN = 4  # passes before acceleration: most points need no more
#: a point on a kink wanders for ever: it is given up after so many passes that neither bring the
#: map's move below _NEARER of its best nor lift the level by _LIFT of its size; one whose move came
#: below _CLOSE may be a slow point of a smooth function, which has more patience
_PATIENCE, _LONG_PATIENCE = 20, 200
#: and where the network is known to have nothing but kinks, far from a maximum and close to one
_ON_KINKS, _CLOSE_TO_KINKS = 8, 15
_CLOSE = 0.1
_NEARER = 0.9
_LIFT = 1e-3


@dataclass(frozen=True)
class InnerMaximum:
    """δ* of a batch with the evidence that it is one.

    ``delta`` and ``grad`` are (n, d); ``stationarity`` (n,) is how far the fixed-point map still
    moves δ relative to the radius of the set: of an L2 ball twice the sine of half the angle
    between δ and the gradient. The size of the gradient plays no part, and where it is exactly
    zero the point is undetermined: its stationarity is infinite. ``grad`` and ``losses`` are the
    loss's own and may underflow to zero where the direction that was followed does not. ``gap``
    (n,) is how much lower the other maximum is that was found, relative to this one; infinite
    where none was.
    """

    delta: Tensor
    grad: Tensor
    losses: Tensor
    stationarity: Tensor
    gap: Tensor

    @property
    def tied(self) -> Tensor:
        """Which points (n,) have a second maximum that is as high, as far as one can tell."""
        return self.gap <= TIED

    @property
    def stationary(self) -> Tensor:
        """Which points (n,) reached stationarity."""
        return self.stationarity <= STATIONARY

    @property
    def undetermined(self) -> Tensor:
        """Which points (n,) ended where there is no gradient to tell a maximum by."""
        return torch.isposinf(self.stationarity)

    @classmethod
    def cat(cls, parts: Sequence[InnerMaximum]) -> InnerMaximum:
        """The points of several batches."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def part(self, some: slice) -> InnerMaximum:
        """Some of the points; the same where they are all."""
        n = self.delta.shape[0]
        if some.indices(n) == (0, n, 1):
            return self
        return InnerMaximum(*(getattr(self, f.name)[some] for f in fields(self)))


@torch.no_grad()
def maximise(
    input_gradient: InputGradient,
    x: Tensor,
    threat: Threat,
    max_iter: int = 200,
    start: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    tol: float = 1e-8,
    link: Link = IDENTITY,
    bends: Callable[[], bool] = lambda: True,
) -> InnerMaximum:
    """Ascend to a stationary point of the inner problem, deterministically.

    Starts at ``start`` (zero by default), tries the threat's fixed-point map first and falls
    back, point by point, to shorter and shorter ascent steps wherever the (smoothed) objective
    fell. For a loss that is convex in δ the map itself is monotone (minorise-maximise). Points
    that are not done after some passes are accelerated, and never past a fall of the objective.

    Args:
        input_gradient: levels and their gradients at perturbed points; the losses themselves
            with the default link.
        x: flattened points (n, d).
        threat: the constraint set.
        max_iter: passes over the batch at the most.
        start: perturbations (n, d) to start from.
        dtype: what losses and gradients were computed in: no difference below its rounding counts.
        tol: a point is done when the map moves it by less than this share of the radius.
        link: from the levels to the losses.
        bends: whether the logits have a second derivative, asked where the map's own step lowered
            the objective: a convex loss of logits without one falls across kinks alone. On them
            points are not accelerated, nor waited for as long.
    """
    rounding = 50 * torch.finfo(dtype).eps
    ascent = _Ascent(input_gradient, x, threat, start, dtype, link, bends)
    limit = torch.full_like(ascent.moved, max(tol, rounding))
    history: Anderson | None = None
    for k in range(max_iter):
        todo = ascent.open(limit)
        if todo.numel() == 0:
            break
        if k == _PLAIN:
            history = Anderson(x)
            limit[todo] = max(_FINER * tol, rounding)
        ascent.advance(todo, history)
    return ascent.found()


@torch.no_grad()
def inspect(
    input_gradient: InputGradient, x: Tensor, threat: Threat, delta: Tensor, link: Link = IDENTITY
) -> InnerMaximum:
    """Perturbations (n, d) of the caller's own, with the evidence of how stationary they are."""
    level, slope = input_gradient(x + delta, _EVERYONE)
    shown = slope * link.weight(level, slope)
    stationarity = threat.stationarity(x, delta, shown)
    alone = torch.full_like(stationarity, torch.inf)
    return InnerMaximum(delta, link.gradient(level, slope), link.loss(level), stationarity, alone)


class _Ascent:
    """Where the perturbations of a batch are: δ (n, d), levels, slopes, and the map's image."""

    def __init__(
        self,
        input_gradient: InputGradient,
        x: Tensor,
        threat: Threat,
        start: Tensor | None,
        dtype: torch.dtype,
        link: Link,
        bends: Callable[[], bool],
    ) -> None:
        self.input_gradient, self.x, self.threat, self.link = input_gradient, x, threat, link
        self.bends = bends
        self.slack = 10 * torch.finfo(dtype).eps
        self.delta = torch.zeros_like(x) if start is None else threat.project(x, start)
        begin = x if start is None else x + self.delta
        self.level, self.slope = input_gradient(begin, _EVERYONE)
        self.size = torch.full_like(x[:, :1], torch.inf)
        self.mapping = True
        self.weight = self.link.weight(self.level, self.slope)
        self.mapped = threat.ascend(x, self.delta, self.slope * self.weight, self.size)
        self.moved = threat.distance(x, self.mapped - self.delta)
        if start is not None:  # a start within the tolerance would be kept with its whole error
            self.moved = torch.full_like(self.moved, torch.inf)
        self.nearest, self.height = self.moved.clone(), self.level.clone()
        self.idle = torch.zeros_like(self.moved, dtype=torch.long)
        self.hopeful = torch.ones_like(self.moved, dtype=torch.bool)
        self.fell = ~self.hopeful
        self.rose = torch.zeros_like(self.size, dtype=torch.bool)

    @property
    def led(self) -> Tensor:
        """Points (n,) that have a gradient to go by where they are."""
        return self.slope.any(dim=1)

    def open(self, limit: Tensor) -> Tensor:
        """Which points (m,) the map still moves by more than their limit (n,), and may."""
        moving = self.moved > limit
        found = torch.nonzero(moving)
        if found.numel():
            found = torch.nonzero(moving & self.led & self.hopeful)
        return found.squeeze(1)

    def found(self) -> InnerMaximum:
        """Where the points are now, with the gradients and losses of the loss itself."""
        grad = self.link.gradient(self.level, self.slope)
        stationarity = torch.where(self.led, self.moved, torch.inf)
        alone = torch.full_like(stationarity, torch.inf)
        return InnerMaximum(self.delta, grad, self.link.loss(self.level), stationarity, alone)

    def advance(self, todo: Tensor, history: Anderson | None) -> None:
        """Move the points ``todo`` to a candidate each, where it does not lower the objective."""
        threat = self.threat
        some: Some = _EVERYONE if todo.numel() == self.moved.numel() else todo
        point, now, size = (_of(one, some) for one in (self.x, self.delta, self.size))
        level, slope, weight = (_of(one, some) for one in (self.level, self.slope, self.weight))
        image, shown = _of(self.mapped, some), slope * weight
        mapping = self.mapping or bool(torch.isinf(size).all())
        candidate = image if mapping else threat.ascend(point, now, shown, size)
        if history is not None:
            residual = image - now
            kinked = self._on_kinks(some).unsqueeze(1)
            bold = history.filled[some].unsqueeze(1) & ~kinked
            if bool(bold.any()):
                proposal = threat.project(point, history.propose(some, image, residual))
                candidate = torch.where(bold, proposal, candidate)
        new_level, new_slope = self.input_gradient(point + candidate, some)
        before, after = (threat.merit(delta, shown) for delta in (now, candidate))
        better = (new_level >= level) & (after >= before)  # for then the loss has risen as well
        risen = bool(better.all())
        if not risen:
            gain = weight.squeeze(1) * self.link.gain(level, new_level) + after - before
            inputs = (row_norm(shown) * (row_norm(point) + row_norm(candidate))).squeeze(1)
            size_of_level = weight.squeeze(1) * (self.link.unit + level.abs())
            # rounding is of the level, of the inputs that it is computed from, and of the merit
            better = gain >= -self.slack * (size_of_level + inputs + before.abs())
        better = better.unsqueeze(1)
        if not risen:
            spared = better if history is None else better | bold
            self.fell[some] |= ~spared.squeeze(1)
            self.mapping = False
        if risen:
            delta, slope, level = candidate, new_slope, new_level
        else:
            delta = torch.where(better, candidate, now)
            slope = torch.where(better, new_slope, slope)
            level = torch.where(better.squeeze(1), new_level, level)
        weight = self.link.weight(level, slope)
        whole = size if mapping else torch.full_like(size, torch.inf)
        mapped = threat.ascend(point, delta, slope * weight, whole)
        left = mapped - delta
        distance = threat.distance(point, left)
        if not (risen and mapping):  # the map serves on where it served
            tried = _next_size(size, better)
            size = tried if history is None else self._resized(some, tried, better, bold, kinked)
        if history is not None:  # at an interior maximum the map has no fixed point to go by
            move = torch.where(better, candidate - now, 0.0)
            pays = (distance < _PAYS * _of(self.moved, some)).unsqueeze(1) | ~bold
            history.record(some, move, left - residual, better & pays & ~kinked)
        self.delta, self.size = _put(self.delta, some, delta), _put(self.size, some, size)
        self.level, self.slope = _put(self.level, some, level), _put(self.slope, some, slope)
        self.weight, self.mapped = _put(self.weight, some, weight), _put(self.mapped, some, mapped)
        self.moved = _put(self.moved, some, distance)
        if history is not None:
            self._look_for_progress(some)

    def _resized(
        self, some: Some, tried: Tensor, better: Tensor, bold: Tensor, kinked: Tensor
    ) -> Tensor:
        """The next sizes (m, 1): on kinks a longer step waits for a second success in a row.

        An accelerated candidate says nothing of them.
        """
        rose = _of(self.rose, some)
        self.rose = _put(self.rose, some, torch.where(bold, rose, better))
        return torch.where(bold | (kinked & better & ~rose), _of(self.size, some), tried)

    def _on_kinks(self, some: Some) -> Tensor:
        """Which points (m,) are on kinks, and not close to a maximum.

        There the map has no fixed point that Anderson's moves could lead to.
        """
        fell = _of(self.fell, some) & (_of(self.nearest, some) >= _CLOSE)
        return fell & (not (bool(fell.any()) and self.bends()))

    def _look_for_progress(self, some: Some) -> None:
        """Give up points that came no nearer to a maximum for long."""
        moved, level = self.moved[some], self.level[some]
        nearest, height = self.nearest[some], self.height[some]
        lifted = level - height > _LIFT * (self.link.unit + level.abs())
        ahead = (moved < _NEARER * nearest) | lifted
        nearest = torch.where(ahead, torch.minimum(moved, nearest), nearest)
        idle = torch.where(ahead, 0, self.idle[some] + 1)
        self.nearest[some], self.idle[some] = nearest, idle
        self.height[some] = torch.where(ahead, level, height)
        patience = torch.where(nearest < _CLOSE, _LONG_PATIENCE, _PATIENCE)
        kinked = torch.where(nearest < _CLOSE, _CLOSE_TO_KINKS, _ON_KINKS)
        doubtful = self.fell[some] & (idle >= kinked)
        if bool(doubtful.any()) and not self.bends():
            patience = torch.where(doubtful, kinked, patience)
        self.hopeful[some] = idle < patience


def _of(values: Tensor, some: Some) -> Tensor:
    """The rows of some points; the tensor itself where they are all."""
    return values[some] if isinstance(some, Tensor) else values


def _put(values: Tensor, some: Some, new: Tensor) -> Tensor:
    """The values with new rows for some points; the new ones alone where they are all."""
    if not isinstance(some, Tensor):
        return new
    values[some] = new
    return values


def _next_size(size: Tensor, better: Tensor) -> Tensor:
    """Twice the step after a success, half of it after a failure; 1 is next to infinity."""
    shorter = torch.where(torch.isinf(size), torch.ones_like(size), size / 2)
    longer = torch.where(size >= 1, torch.full_like(size, torch.inf), size * 2)
    return torch.where(better, longer, shorter)
