"""The L-infinity ball, with its smoothed sign."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.arguments import number, optional
from lightning_muter.linalg.rows import row_norm
from lightning_muter.threats.base import LEAST_MULTIPLIER, Geometry, Threat
from lightning_muter.threats.pixels import Values, per_feature

__all__ = ["LinfBall"]


@dataclass(frozen=True)
class LinfBall(Threat):
    """All perturbations of absolute value at most ``eps`` in every coordinate.

    The arguments are those of `Threat`, ``eps`` one number or one a channel, and two of its own.

    The sign response is smoothed: δ_j = ε g_j / sqrt(g_j² + τ²), the exact maximiser of
    l(x + δ) + τ Σ_j sqrt(ε² - δ_j²), with g_i the gradient of point i's loss in its input.

    Source: ours; K = Λ - ∂δδ, Λ_jj = (g_j² + τ²)^(3/2) / (ε τ²).

    Attributes:
        smoothing: τ_i as a share of the root mean square of g_i, above 0.
        bandwidth: τ itself, above 0, in the units of g (loss over ``eps``), for one fixed smoothed
            objective, in the place of ``smoothing``; None for none.

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
        width = optional("bandwidth", self.bandwidth, positive=True)
        object.__setattr__(self, "smoothing", number("smoothing", self.smoothing, positive=True))
        object.__setattr__(self, "bandwidth", width)

    def relaxed(self, factor: float) -> Threat:
        bandwidth = None if self.bandwidth is None else self.bandwidth * factor
        return replace(self, smoothing=self.smoothing * factor, bandwidth=bandwidth)

    def tau(self, grad: Tensor) -> Tensor:
        """The bandwidth of each point (n, 1); a relative one is zero where the gradient is."""
        if self.bandwidth is not None:
            return torch.full_like(grad[:, :1], self.bandwidth)
        return row_norm(grad) * (self.smoothing / math.sqrt(grad.shape[1]))

    def project(self, x: Tensor, delta: Tensor) -> Tensor:
        low, high = self.bounds(x)
        eps = self._half_widths(x)
        return delta.clamp(-eps, eps).clamp(low, high)

    def random_start(self, x: Tensor) -> Tensor:
        return self.project(x, torch.empty_like(x).uniform_(-1.0, 1.0) * self._half_widths(x))

    def step(self, x: Tensor, delta: Tensor, grad: Tensor, size: Values) -> Tensor:
        return self.project(x, delta + per_feature(size, x) * grad.sign())

    def ascend(self, x: Tensor, delta: Tensor, grad: Tensor, size: Tensor) -> Tensor:
        tau = self.tau(grad)
        low, high = self.bounds(x)
        target = torch.where(tau > 0, self._target(grad, tau), delta)
        return delta + size.clamp(max=1.0) * (target.clamp(low, high) - delta)

    def _target(self, grad: Tensor, tau: Tensor) -> Tensor:
        """The smoothed sign response ε g / sqrt(g² + τ²) (n, d), before the data range."""
        return self._half_widths(grad) * (grad / torch.hypot(grad, tau))

    def _half_widths(self, x: Tensor) -> Tensor:
        """eps of every coordinate of points like x (n, d): (d,), or one for all."""
        return torch.as_tensor(per_feature(self.eps, x), dtype=x.dtype, device=x.device)

    def merit(self, delta: Tensor, grad: Tensor) -> Tensor:
        height = (self._half_widths(delta).square() - delta.square()).clamp(min=0.0).sqrt()
        return self.tau(grad).squeeze(1) * height.sum(dim=1)

    def active(self, x: Tensor, delta: Tensor) -> Tensor:
        low, high = self.bounds(x)
        limit = torch.where(delta > 0, high, -low).minimum(self._half_widths(x))
        return (delta.abs() >= 0.99 * limit).to(delta).mean(dim=1)

    def geometry(self, x: Tensor, delta: Tensor, grad: Tensor) -> Geometry:
        tau = self.tau(grad)
        low, high = self.bounds(x)
        target = self._target(grad, tau)
        held = (target >= high) | (target <= low)
        length = torch.hypot(grad, tau)
        eps = self._half_widths(x)
        shift = torch.where(tau > 0, length * (length / tau).square() / eps, 0.0)
        # Λ is τ / ε at the least: where that is nothing the point stays, as on an L2 sphere
        free = ~held & (tau > LEAST_MULTIPLIER * eps)
        return Geometry(shift, free.to(delta), torch.zeros_like(delta))

    def radius(self, x: Tensor) -> float:
        widths = self._half_widths(x).double().expand(x.shape[1])
        return float(torch.linalg.vector_norm(widths))
