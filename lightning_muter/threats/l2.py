"""The Euclidean ball."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.linalg.rows import direction, dot, row_norm
from lightning_muter.threats.base import LEAST_MULTIPLIER, Geometry, Threat
from lightning_muter.threats.pixels import Values, per_feature

__all__ = ["L2Ball"]


@dataclass(frozen=True)
class L2Ball(Threat):
    """All perturbations of Euclidean norm at most ``eps`` over the flattened input.

    The arguments are those of `Threat`; ``eps`` is one number.

    Source: ours; K = μI - ∂δδ on the tangent space of the sphere, μ = ‖g_F‖/‖δ_F‖.

    Example:
        >>> import torch
        >>> L2Ball(eps=1.0).project(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    norm = "L2"

    eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eps, tuple):
            raise ConfigurationError(
                f"eps={self.eps!r}: a Euclidean ball has one radius over all channels together; "
                "give one number, or a LinfBall, whose eps may be one a channel"
            )

    def project(self, x: Tensor, delta: Tensor) -> Tensor:
        if self.data_range is None:
            return delta * (self.eps / row_norm(delta)).clamp(max=1.0)
        low, high = self.bounds(x)
        clipped = delta.clamp(low, high)
        outside = (row_norm(clipped) > self.eps).squeeze(1)
        if not bool(outside.any()):
            return clipped
        rows = slice(None) if bool(outside.all()) else outside
        clipped[rows] = self._scale_to_sphere(delta[rows], low[rows], high[rows])
        return clipped

    def _scale_to_sphere(self, v: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """clip(c v, low, high) with the c that puts it on the sphere, by its active set.

        c grows as coordinates reach their bound; the set can only grow, so this ends.
        """
        size, room = v.abs(), torch.where(v > 0, high, -low)
        held = torch.zeros_like(v, dtype=torch.bool)
        limits = torch.finfo(v.dtype)
        while True:
            taken, free = room.where(held, 0.0), row_norm(size.masked_fill(held, 0.0))
            rest = (self.eps**2 - dot(taken, taken)).clamp(min=0.0).sqrt()
            scale = (rest / free.clamp(min=limits.tiny)).clamp(max=limits.max)
            beyond = size * scale > room
            if not bool((beyond > held).any()):
                return torch.where(held, room.copysign(v), v * scale)
            held |= beyond

    def random_start(self, x: Tensor) -> Tensor:
        towards = direction(torch.randn_like(x))
        radius = self.eps * torch.rand_like(x[:, :1]) ** (1.0 / x.shape[1])
        return self.project(x, towards * radius)

    def step(self, x: Tensor, delta: Tensor, grad: Tensor, size: Values) -> Tensor:
        return self.project(x, delta + per_feature(size, x) * direction(grad))

    def ascend(self, x: Tensor, delta: Tensor, grad: Tensor, size: Tensor) -> Tensor:
        unit, farthest = direction(grad, self.eps), torch.isinf(size)
        whole = (farthest & unit.any(dim=1, keepdim=True)).squeeze(1)
        if bool(whole.all()):
            return self._farthest(x, unit)
        step = torch.where(farthest, torch.ones_like(size), size) * unit
        found = self.project(x, delta + step)
        if bool(whole.any()):
            found[whole] = self._farthest(x[whole], unit[whole])
        return found

    def _farthest(self, x: Tensor, unit: Tensor) -> Tensor:
        """The fixed-point map: as far along directions (n, d) of length ε as the box lets it.

        That is on the sphere: scaled up where clipping would fall short of it.
        """
        return unit if self.data_range is None else self._scale_to_sphere(unit, *self.bounds(x))

    def merit(self, delta: Tensor, grad: Tensor) -> Tensor:
        return delta.new_zeros(delta.shape[0])

    def active(self, x: Tensor, delta: Tensor) -> Tensor:
        return self._reached(row_norm(delta)).squeeze(1)

    def _reached(self, length: Tensor) -> Tensor:
        """1 where a length (n, 1) is the radius, else 0."""
        return (length >= self.eps * (1 - 1e-4)).to(length)

    def geometry(self, x: Tensor, delta: Tensor, grad: Tensor) -> Geometry:
        free, delta_free, grad_free = torch.ones_like(delta), delta, grad
        length = size = row_norm(delta)
        if self.data_range is not None:
            low, high = self.bounds(x)
            slack = 1e-6 * self.eps
            held = ((delta >= high - slack) & (grad > 0)) | ((delta <= low + slack) & (grad < 0))
            free = (~held).to(delta)
            delta_free, grad_free = delta * free, grad * free
            length = row_norm(delta_free)
        on_sphere = self._reached(size)
        inverse = torch.where(length > 0, on_sphere / length, 0.0)
        mu, normal = row_norm(grad_free) * inverse, delta_free * inverse
        # a point on the sphere without a gradient has no defined multiplier: it stays
        free = free * ((on_sphere == 0) | (mu > LEAST_MULTIPLIER)).to(free)
        return Geometry(mu.expand_as(delta).contiguous(), free, normal)
