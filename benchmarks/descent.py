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


def perturbed(net: Networks, layers: Layers, x: Tensor, side: Tensor, steps: int) -> Perturbed:
    """Ascent from δ = 0: the map ε ∇a / ‖∇a‖, part of the way where the level fell."""
    base, gram = first(layers, x)
    side = side.expand(base.shape[:2])

    def on_sphere(u: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        size = net.eps * (u * seen).sum(dim=2, keepdim=True).clamp(min=1e-300).rsqrt()
        return size * u, size * seen

    def looked(seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, sent = net.up(layers, base + seen)
        slope = net.down(layers, sent, side)[0]
        return side * z, *on_sphere(slope, slope @ gram)

    _, u, seen = looked(torch.zeros_like(base))
    level, image, beyond = looked(seen)
    share = torch.ones_like(level)
    for _ in range(steps - 1):
        part = share.unsqueeze(2)
        there = on_sphere(u + part * (image - u), seen + part * (beyond - seen))
        height, *after = looked(there[1])
        risen = height >= level
        chosen = risen.unsqueeze(2)
        u, seen = (torch.where(chosen, a, b) for a, b in zip(there, (u, seen), strict=True))
        image, beyond = (
            torch.where(chosen, a, b) for a, b in zip(after, (image, beyond), strict=True)
        )
        level = torch.where(risen, height, level)
        share = torch.where(risen, (2 * share).clamp(max=1), share / 2)
    way = ((image - u) * (beyond - seen)).sum(dim=2)
    moved = way.clamp(min=0).sqrt() / net.eps
    return Perturbed(u, level, moved)


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
