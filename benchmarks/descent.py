"""Adversarial training of many small networks at once by gradient descent: nothing of the package.

What small_networks.py trains to an optimum is trained here as users train: so many steps of
gradient descent with momentum on all points, with a rate that falls to a hundredth, each at the
perturbations that so many steps of ascent find from δ = 0. No value of F is asked for: where a
point has several maximisers and the ascent jumps from one to another as ω moves, F jumps too, and
descent slides along the jump.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from small_networks import Layers, Networks, first
from torch import Tensor

MOMENTUM = 0.9
#: of the rate, at the end of a training
LEAST = 1e-2
#: steps of ascent between two looks at which points are done, and what the map moves those by
ROUND, DONE = 3, 1e-10


@dataclass(frozen=True)
class Perturbed:
    """Perturbations of points in several networks.

    Attributes:
        u: (k, n, units), δ = W₁ᵀ u.
        level: that the adversary raised (k, n).
        moved: how far the fixed point's map would move δ, over ε (k, n).
    """

    u: Tensor
    level: Tensor
    moved: Tensor


@dataclass
class _Ascent:
    """Points on their way: u and W₁ W₁ᵀ u, what the map makes of them, and the level."""

    base: Tensor
    side: Tensor
    u: Tensor
    seen: Tensor
    image: Tensor
    beyond: Tensor
    level: Tensor
    share: Tensor

    def rows(self, chosen: Tensor) -> _Ascent:
        """Some points of each problem, by their numbers (k, m)."""
        return _Ascent(*(_rows(own, chosen) for own in vars(self).values()))

    def put(self, chosen: Tensor, some: _Ascent) -> None:
        """Take these points' new places."""
        for name, own in vars(self).items():
            if name not in ("base", "side"):
                wide = _wide(chosen, own)
                setattr(self, name, own.scatter(1, wide, getattr(some, name)))

    @property
    def left(self) -> Tensor:
        """The square of how far the map moves δ (k, n)."""
        way = (self.image - self.u) * (self.beyond - self.seen)
        return way.sum(dim=2).clamp(min=0)


def _wide(chosen: Tensor, values: Tensor) -> Tensor:
    return chosen if values.ndim == 2 else chosen.unsqueeze(2).expand(-1, -1, values.shape[2])


def _rows(values: Tensor, chosen: Tensor) -> Tensor:
    return values.gather(1, _wide(chosen, values))


def perturbed(net: Networks, layers: Layers, x: Tensor, side: Tensor, steps: int) -> Perturbed:
    """Ascent from δ = 0: the map ε ∇a / ‖∇a‖, part of the way where the level fell."""
    base, gram = first(layers, x)
    side = side.expand(base.shape[:2])

    def on_sphere(u: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        size = net.eps * (u * seen).sum(dim=2, keepdim=True).clamp(min=1e-300).rsqrt()
        return size * u, size * seen

    def looked(base: Tensor, side: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, sent = net.up(layers, base + seen)
        slope = net.down(layers, sent, side)[0]
        return side * z, *on_sphere(slope, slope @ gram)

    def advance(at: _Ascent) -> None:
        part = at.share.unsqueeze(2)
        u, seen = on_sphere(at.u.lerp(at.image, part), at.seen.lerp(at.beyond, part))
        height, image, beyond = looked(at.base, at.side, seen)
        risen = height >= at.level
        chosen = risen.unsqueeze(2)
        at.u, at.seen = torch.where(chosen, u, at.u), torch.where(chosen, seen, at.seen)
        at.image = torch.where(chosen, image, at.image)
        at.beyond = torch.where(chosen, beyond, at.beyond)
        at.level = torch.where(risen, height, at.level)
        at.share = torch.where(risen, (2 * at.share).clamp(max=1), at.share / 2)

    _, u, seen = looked(base, side, torch.zeros_like(base))
    level, image, beyond = looked(base, side, seen)
    every = _Ascent(base, side, u, seen, image, beyond, level, torch.ones_like(level))
    for k in range(0, steps - 1, ROUND):
        open_ = every.left > (DONE * net.eps) ** 2
        width = int(open_.sum(dim=1).max())
        if width == 0:
            break
        chosen = open_.to(torch.uint8).argsort(dim=1, descending=True)[:, :width]
        some = every.rows(chosen)
        for _ in range(min(ROUND, steps - 1 - k)):
            advance(some)
        every.put(chosen, some)
    return Perturbed(every.u, every.level, every.left.sqrt() / net.eps)


def received(net: Networks, layers: Layers, x: Tensor, u: Tensor) -> Tensor:
    """The smallest |t| that a unit receives (k, n): 0 on a kink of a ReLU network."""
    base, gram = first(layers, x)
    found = [base + u @ gram]
    for weight, bias in layers[1:-1]:
        found.append(net.activation.value(found[-1]) @ weight.mT + bias)
    return torch.cat(found, dim=2).abs().amin(dim=2)


def gradients(
    net: Networks, omega: Tensor, x: Tensor, y: Tensor, weight: Tensor, steps: int
) -> Tensor:
    """∇F / Σ w (k, p) of each problem at ω (k, p), points weighted (k, n)."""
    layers, side = net.layers(omega), 1.0 - 2.0 * y
    u = perturbed(net, layers, x, side, steps).u
    base, gram = first(layers, x)
    z, seen = net.up(layers, base + u @ gram)
    down = net.down(layers, seen, weight * side * (side * z).sigmoid())
    found = net.gradient(layers, x, u, seen, down)
    return found / weight.sum(dim=1, keepdim=True) + net.decay * omega


@dataclass(frozen=True)
class Training:
    """A training's length and rate.

    Attributes:
        rate: of the first step; the last one's is a hundredth of it.
        steps: of descent.
        ascent: steps of the adversary.
    """

    rate: float
    steps: int
    ascent: int

    def ended(self, net: Networks, start: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """ω (k, p) from starts (k, p)."""
        omega, velocity = start, torch.zeros_like(start)
        for k in range(self.steps):
            velocity = MOMENTUM * velocity + gradients(net, omega, x, y, weight, self.ascent)
            omega = omega - self.rate * LEAST ** (k / self.steps) * velocity
        return omega
