"""A threat as a set, and what its constraint does to the inner problem.

Source: the inner responses of L2 and L-infinity balls are ours (docs/theory.md).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_muter.arguments import optional
from lightning_muter.errors import ConfigurationError
from lightning_muter.linalg.rows import row_norm
from lightning_muter.threats.data_range import describe_outside, outside
from lightning_muter.threats.pixels import (
    Scaling,
    Values,
    as_values,
    check_channels,
    largest,
    per_feature,
    times,
)

__all__ = ["LEAST_MULTIPLIER", "Geometry", "Threat", "unconstrained_geometry"]

#: A multiplier below this is none: a response divides by it, in float32 where the network
#: computes in that. What such a point adds to the curvature is of the multiplier's own order,
#: some thirty digits below a point that is not saturated; its perturbation is held still.
LEAST_MULTIPLIER = 1e-30


@dataclass(frozen=True)
class Geometry:
    """What a constraint set does to the inner problem at a maximiser.

    K_i = P (diag(shift) - ∂δδ l) P on the range of P, where P keeps the ``free`` coordinates and
    removes the unit vector ``normal``. All of shape (n, d); a zero ``normal`` removes nothing and
    a zero row of ``free`` is a point whose perturbation does not move.
    """

    shift: Tensor
    free: Tensor
    normal: Tensor

    def project(self, alpha: Tensor) -> Tensor:
        """P alpha for alpha (n, d), or for k vectors a point (n, k, d)."""
        free, normal = self.free, self.normal
        if alpha.ndim == 3:
            free, normal = free.unsqueeze(1), normal.unsqueeze(1)
        kept = alpha * free
        return kept - normal * (normal * kept).sum(dim=-1, keepdim=True)

    def freeze(self, points: Tensor) -> Geometry:
        """The same geometry with the perturbation of the masked points (n,) held still."""
        keep = (~points).unsqueeze(1).to(self.free)
        return replace(self, free=self.free * keep, normal=self.normal * keep)


def unconstrained_geometry(delta: Tensor) -> Geometry:
    """No active constraint: K = -∂δδ l, all directions free (paper, eq. 4)."""
    return Geometry(torch.zeros_like(delta), torch.ones_like(delta), torch.zeros_like(delta))


@dataclass(frozen=True)
class Threat(ABC):
    """A constraint set around each input; its geometry takes flattened points (n, d) in pixels.

    With ``mean`` and ``std`` the model receives x' = (x - mean) / std, as the data set normalised
    it; ``eps`` and ``data_range`` are on the scale before that, in pixels. Each of the four is a
    number, or one a channel: dimension 0 of a point (C, H, W), a feature of a flat one.

    Attributes:
        eps: the radius, in pixels; on the scale that the model receives without a ``mean``.
        data_range: (low, high) of valid inputs; None for no such bound.
        mean: that the data set subtracted; None where it did not normalise.
        std: that the data set divided by; given with ``mean``.
        temperature: the adversary mixes its maximiser and the one on the other side by a softmax
            of their losses at this temperature; None for the hard maximum. A loss that is even in
            the residual, as in ridge regression, has a kink where the two tie, and a trained
            model sits on many of them: it is stationary at a temperature only.

    Raises:
        ConfigurationError: an ``eps``, ``std`` or ``temperature`` that is not positive, a range
            whose low end is not below its high one, or a ``mean`` without a ``std``.
    """

    #: what attack libraries call the geometry
    norm: ClassVar[str]

    eps: Values
    data_range: tuple[Values, Values] | None = None
    mean: Values | None = field(default=None, kw_only=True)
    std: Values | None = field(default=None, kw_only=True)
    temperature: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._check_scaling()
        warmth = optional("temperature", self.temperature, positive=True)
        object.__setattr__(self, "temperature", warmth)
        object.__setattr__(self, "eps", as_values("eps", self.eps))
        if not _positive(self.eps):
            raise ConfigurationError(f"eps={self.eps!r} must be positive: use no threat at all")
        if self.data_range is None:
            return
        object.__setattr__(self, "data_range", _ordered(self.data_range))

    def _check_scaling(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ConfigurationError(
                f"mean={self.mean!r} and std={self.std!r} go together: give both (mean=0.0 or "
                "std=1.0 where the data set used one of them alone)"
            )
        if self.mean is None:
            return
        for name in ("mean", "std"):
            object.__setattr__(self, name, as_values(name, getattr(self, name)))
        assert self.std is not None  # given with mean
        if not _positive(self.std) or not math.isfinite(largest(self.std)):
            raise ConfigurationError(f"std={self.std!r} must be positive and finite")

    @property
    def scaling(self) -> Scaling:
        """The way between pixels and what the model receives."""
        return Scaling(self.mean, self.std)

    def flat_pixels(self, x: Tensor) -> Tensor:
        """Inputs (n, ...) that training receives as flat points in pixels (n, d), in their dtype.

        Raises:
            ConfigurationError: numbers that are not one a channel of these inputs.
        """
        low, high = self.data_range or (None, None)
        named = (("eps", self.eps), ("data_range", low), ("data_range", high))
        for name, values in (*named, ("mean", self.mean), ("std", self.std)):
            check_channels(name, values, x)
        return self.scaling.pixels(x.detach()).reshape(x.shape[0], -1)

    def moved(self, x: Tensor, delta: Tensor) -> Tensor:
        """Inputs (n, ...) that training receives, perturbed by δ (n, d) in pixels: x + δ / std."""
        pushed = delta if self.std is None else delta / per_feature(self.std, delta)
        return x + pushed.reshape(x.shape).to(x)

    def step_size(self, steps: int) -> Values:
        """The usual length of one of ``steps`` ascent steps: 2.5 · eps / steps."""
        return times(2.5 / max(steps, 1), self.eps)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of delta from the data range (n, d); infinite without one."""
        if self.data_range is None:
            infinite = torch.full_like(x, torch.inf)
            return -infinite, infinite
        low, high = (per_feature(end, x) for end in self.data_range)
        return (low - x).clamp(max=0.0), (high - x).clamp(min=0.0)

    def check_inputs(self, x: Tensor) -> None:
        """Refuse inputs (n, ...) outside ``data_range``: their perturbation could not move there.

        Outside by rounding is inside. Without a ``data_range`` everything is.

        Raises:
            ConfigurationError: with the numbers seen, and arguments that would fit; or numbers
                that are not one a channel.
        """
        self.flat_pixels(x[:1])
        if self.data_range is None:
            return
        pixels = self.scaling.pixels(x)
        beyond = outside(pixels, self.data_range)
        if bool(beyond.any()):
            raise ConfigurationError(
                describe_outside(pixels, self.data_range, beyond, self.scaling.identity)
            )

    def relaxed(self, factor: float) -> Threat:
        """The threat with its smoothing widened by ``factor`` (itself where there is none)."""
        return self

    @abstractmethod
    def project(self, x: Tensor, delta: Tensor) -> Tensor:
        """The nearest allowed perturbation (n, d)."""

    @abstractmethod
    def random_start(self, x: Tensor) -> Tensor:
        """A random allowed perturbation (n, d), drawn from the global generator."""

    @abstractmethod
    def step(self, x: Tensor, delta: Tensor, grad: Tensor, size: Values) -> Tensor:
        """One step of projected gradient ascent of length ``size`` (n, d).

        The direction alone of each point's gradient counts; without one δ stays.
        """

    @abstractmethod
    def ascend(self, x: Tensor, delta: Tensor, grad: Tensor, size: Tensor) -> Tensor:
        """A refinement step; ``size`` (n, 1) of infinity is the fixed-point map itself.

        The direction alone of each point's gradient counts, unless the threat has a scale of its
        own; where neither says where to go δ stays.
        """

    @abstractmethod
    def merit(self, delta: Tensor, grad: Tensor) -> Tensor:
        """The term (n,) that the smoothed inner objective adds to the loss."""

    @abstractmethod
    def geometry(self, x: Tensor, delta: Tensor, grad: Tensor) -> Geometry:
        """The inner response's geometry at a maximiser."""

    @abstractmethod
    def active(self, x: Tensor, delta: Tensor) -> Tensor:
        """The share (n,) of each point's constraints of the ball that are active, in [0, 1]."""

    def distance(self, x: Tensor, move: Tensor) -> Tensor:
        """Length (n,) of a move of delta relative to the radius of the set."""
        return row_norm(move).squeeze(1) / self.radius(x)

    def stationarity(self, x: Tensor, delta: Tensor, grad: Tensor) -> Tensor:
        """Distance (n,) that the fixed-point map still moves delta, relative to its radius.

        Infinite where the gradient is exactly zero: there nothing says whether δ is a maximum.
        """
        size = torch.full_like(grad[:, :1], torch.inf)
        moved = self.distance(x, self.ascend(x, delta, grad, size) - delta)
        return torch.where((grad != 0).any(dim=1), moved, torch.inf)

    def radius(self, x: Tensor) -> float:
        """The largest length of a perturbation of points like x (n, d)."""
        return largest(self.eps)


def _positive(values: Values) -> bool:
    return all(v > 0 for v in (values if isinstance(values, tuple) else (values,)))


def _ordered(given: Any) -> tuple[Values, Values]:
    """(low, high) of a data range, each a number or one a channel, low below high."""
    pair = given if isinstance(given, (tuple, list)) else ()
    ends = tuple(as_values("data_range", end) for end in pair)
    if len(ends) == 2:
        low, high = (end if isinstance(end, tuple) else (end,) for end in ends)
        channels = max(len(low), len(high))
        low, high = (end * channels if len(end) == 1 else end for end in (low, high))
        if len(low) == len(high) and all(a < b for a, b in zip(low, high, strict=True)):
            return ends
    raise ConfigurationError(f"data_range={given!r} must be (low, high)")
