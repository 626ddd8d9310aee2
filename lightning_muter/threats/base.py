"""A threat as a set, and what its constraint does to the inner problem.

Source: the inner responses of L2 and L-infinity balls are ours (docs/theory.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.linalg.rows import row_norm
from lightning_muter.threats.data_range import describe_outside, outside

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
    """A constraint set around each input; all methods take flattened points (n, d).

    Attributes:
        eps: the radius, on the scale of the tensors that the model receives.
        data_range: (low, high) of valid inputs; None for no such bound.
        temperature: the adversary mixes its maximiser and the one on the other side by a softmax
            of their losses at this temperature; None for the hard maximum. A loss that is even in
            the residual, as in ridge regression, has a kink where the two tie, and a trained
            model sits on many of them: it is stationary at a temperature only.
    """

    #: what attack libraries call the geometry
    norm: ClassVar[str]

    eps: float
    data_range: tuple[float, float] | None = None
    temperature: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigurationError(f"temperature={self.temperature!r} must be positive or None")
        if not self.eps > 0:
            raise ConfigurationError(f"eps={self.eps!r} must be positive: use no threat at all")
        if self.data_range is not None:
            object.__setattr__(self, "data_range", tuple(self.data_range))
            low, high = self.data_range
            if not low < high:
                raise ConfigurationError(f"data_range={self.data_range!r} must be (low, high)")

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of delta from the data range (n, d); infinite without one."""
        if self.data_range is None:
            infinite = torch.full_like(x, torch.inf)
            return -infinite, infinite
        low, high = self.data_range
        return (low - x).clamp(max=0.0), (high - x).clamp(min=0.0)

    def check_inputs(self, x: Tensor) -> None:
        """Refuse inputs (n, ...) outside ``data_range``: their perturbation could not move there.

        Outside by rounding is inside. Without a ``data_range`` everything is.

        Raises:
            ConfigurationError: with the numbers seen, and data ranges that would fit.
        """
        if self.data_range is None:
            return
        beyond = outside(x, self.data_range)
        if bool(beyond.any()):
            raise ConfigurationError(describe_outside(x, self.data_range, beyond))

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
    def step(self, x: Tensor, delta: Tensor, grad: Tensor, size: float) -> Tensor:
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
        return row_norm(move).squeeze(1) / self._radius(x)

    def stationarity(self, x: Tensor, delta: Tensor, grad: Tensor) -> Tensor:
        """Distance (n,) that the fixed-point map still moves delta, relative to its radius.

        Infinite where the gradient is exactly zero: there nothing says whether δ is a maximum.
        """
        size = torch.full_like(grad[:, :1], torch.inf)
        moved = self.distance(x, self.ascend(x, delta, grad, size) - delta)
        return torch.where((grad != 0).any(dim=1), moved, torch.inf)

    def _radius(self, x: Tensor) -> float:
        return self.eps
