"""Threats: the geometry of the set that the adversary may choose from.

Source: the inner responses of L2 and L-infinity balls are ours (docs/theory.md).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError

__all__ = ["Geometry", "L2Ball", "LinfBall", "Threat"]

_TINY = 1e-30


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1, keepdim=True)


def _norm(a: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    return norm


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
        """One step of projected gradient ascent of length ``size`` (n, d)."""

    @abstractmethod
    def ascend(self, x: Tensor, delta: Tensor, grad: Tensor, size: Tensor) -> Tensor:
        """A refinement step; ``size`` (n, 1) of infinity is the fixed-point map itself."""

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
        return _norm(move).squeeze(1) / self._radius(x)

    def stationarity(self, x: Tensor, delta: Tensor, grad: Tensor) -> Tensor:
        """Distance (n,) that the fixed-point map still moves delta, relative to its radius."""
        size = torch.full_like(grad[:, :1], torch.inf)
        return self.distance(x, self.ascend(x, delta, grad, size) - delta)

    def _radius(self, x: Tensor) -> float:
        return self.eps


@dataclass(frozen=True)
class L2Ball(Threat):
    """All perturbations of Euclidean norm at most ``eps`` over the flattened input.

    Source: ours; K = μI - ∂δδ on the tangent space of the sphere, μ = ‖g_F‖/‖δ_F‖.

    Example:
        >>> import torch
        >>> L2Ball(eps=1.0).project(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    norm = "L2"

    def project(self, x: Tensor, delta: Tensor) -> Tensor:
        if self.data_range is None:
            return delta * (self.eps / _norm(delta).clamp(min=_TINY)).clamp(max=1.0)
        low, high = self.bounds(x)
        clipped = delta.clamp(low, high)
        outside = _norm(clipped) > self.eps
        if not bool(outside.any()):
            return clipped
        return torch.where(outside, self._scale_to_sphere(delta, low, high), clipped)

    def _scale_to_sphere(self, v: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """clip(c v, low, high) with the c that puts it on the sphere, by its active set.

        c grows as coordinates reach their bound; the set can only grow, so this ends.
        """
        held = torch.zeros_like(v, dtype=torch.bool)
        while True:
            fixed = torch.where(held, torch.where(v > 0, high, low), torch.zeros_like(v))
            rest = (self.eps**2 - _dot(fixed, fixed)).clamp(min=0.0).sqrt()
            free = torch.where(held, torch.zeros_like(v), v)
            scaled = free * (rest / _norm(free).clamp(min=_TINY))
            beyond = ((scaled > high) | (scaled < low)) & ~held
            if not bool(beyond.any()):
                return fixed + scaled
            held = held | beyond

    def random_start(self, x: Tensor) -> Tensor:
        direction = torch.randn_like(x)
        radius = self.eps * torch.rand_like(x[:, :1]) ** (1.0 / x.shape[1])
        return self.project(x, direction / _norm(direction).clamp(min=_TINY) * radius)

    def step(self, x: Tensor, delta: Tensor, grad: Tensor, size: float) -> Tensor:
        return self.project(x, delta + size * grad / _norm(grad).clamp(min=_TINY))

    def ascend(self, x: Tensor, delta: Tensor, grad: Tensor, size: Tensor) -> Tensor:
        unit = grad * (self.eps / _norm(grad).clamp(min=_TINY))
        whole = torch.isinf(size)
        if self.data_range is None and bool(whole.all()):
            return unit
        v = torch.where(whole, unit, delta + torch.where(whole, 1.0, size) * unit)
        if self.data_range is None:
            return self.project(x, v)
        # the fixed-point map goes to the farthest point along the gradient, on the sphere if the
        # box lets it: scale up where clipping fell short of it
        low, high = self.bounds(x)
        return torch.where(whole, self._scale_to_sphere(v, low, high), self.project(x, v))

    def merit(self, delta: Tensor, grad: Tensor) -> Tensor:
        return torch.zeros_like(delta[:, 0])

    def active(self, x: Tensor, delta: Tensor) -> Tensor:
        return (_norm(delta).squeeze(1) >= self.eps * (1 - 1e-4)).to(delta)

    def geometry(self, x: Tensor, delta: Tensor, grad: Tensor) -> Geometry:
        free = torch.ones_like(delta)
        if self.data_range is not None:
            low, high = self.bounds(x)
            slack = 1e-6 * self.eps
            held = ((delta >= high - slack) & (grad > 0)) | ((delta <= low + slack) & (grad < 0))
            free = (~held).to(delta)
        on_sphere = self.active(x, delta).unsqueeze(1)
        delta_free, grad_free = delta * free, grad * free
        norm = _norm(delta_free)
        mu = _norm(grad_free) / norm.clamp(min=_TINY) * on_sphere
        normal = delta_free / norm.clamp(min=_TINY) * on_sphere
        # a point on the sphere without a gradient has no defined multiplier: it stays
        free = free * ((on_sphere == 0) | (mu > _TINY)).to(free)
        return Geometry(mu.expand_as(delta).contiguous(), free, normal)


@dataclass(frozen=True)
class LinfBall(Threat):
    """All perturbations of absolute value at most ``eps`` in every coordinate.

    The sign response is smoothed: δ_j = ε g_j / sqrt(g_j² + τ²), the exact maximiser of
    l(x + δ) + τ Σ_j sqrt(ε² - δ_j²), with τ_i = ``smoothing`` · rms(g_i), or the absolute
    ``bandwidth`` for one fixed smoothed objective.

    Source: ours; K = Λ - ∂δδ, Λ_jj = (g_j² + τ²)^(3/2) / (ε τ²).

    Example:
        >>> import torch
        >>> LinfBall(eps=0.1).project(torch.zeros(1, 2), torch.tensor([[3.0, -0.05]]))
        tensor([[ 0.1000, -0.0500]])
    """

    norm = "Linf"

    smoothing: float = 0.02
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.smoothing > 0:
            raise ConfigurationError(f"smoothing={self.smoothing!r} must be positive")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ConfigurationError(f"bandwidth={self.bandwidth!r} must be positive or None")

    def relaxed(self, factor: float) -> Threat:
        bandwidth = None if self.bandwidth is None else self.bandwidth * factor
        return replace(self, smoothing=self.smoothing * factor, bandwidth=bandwidth)

    def tau(self, grad: Tensor) -> Tensor:
        """The bandwidth of each point (n, 1)."""
        if self.bandwidth is not None:
            return torch.full_like(grad[:, :1], self.bandwidth)
        rms = grad.square().mean(dim=1, keepdim=True).sqrt()
        return (self.smoothing * rms).clamp(min=_TINY)

    def project(self, x: Tensor, delta: Tensor) -> Tensor:
        low, high = self.bounds(x)
        return delta.clamp(-self.eps, self.eps).clamp(low, high)

    def random_start(self, x: Tensor) -> Tensor:
        return self.project(x, torch.empty_like(x).uniform_(-self.eps, self.eps))

    def step(self, x: Tensor, delta: Tensor, grad: Tensor, size: float) -> Tensor:
        return self.project(x, delta + size * grad.sign())

    def ascend(self, x: Tensor, delta: Tensor, grad: Tensor, size: Tensor) -> Tensor:
        target = self.eps * grad / torch.hypot(grad, self.tau(grad))
        low, high = self.bounds(x)
        return delta + size.clamp(max=1.0) * (target.clamp(low, high) - delta)

    def merit(self, delta: Tensor, grad: Tensor) -> Tensor:
        height = (self.eps**2 - delta.square()).clamp(min=0.0).sqrt()
        return self.tau(grad).squeeze(1) * height.sum(dim=1)

    def active(self, x: Tensor, delta: Tensor) -> Tensor:
        low, high = self.bounds(x)
        limit = torch.where(delta > 0, high, -low).clamp(max=self.eps)
        return (delta.abs() >= 0.99 * limit).to(delta).mean(dim=1)

    def geometry(self, x: Tensor, delta: Tensor, grad: Tensor) -> Geometry:
        tau = self.tau(grad)
        low, high = self.bounds(x)
        target = self.eps * grad / torch.hypot(grad, tau)
        held = (target >= high) | (target <= low)
        shift = torch.hypot(grad, tau) ** 3 / (self.eps * tau**2)
        return Geometry(shift, (~held).to(delta), torch.zeros_like(delta))

    def _radius(self, x: Tensor) -> float:
        return self.eps * math.sqrt(x.shape[1])
