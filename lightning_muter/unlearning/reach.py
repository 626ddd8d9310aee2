"""How far a threat's perturbations move the output of a linear model, in closed form.

For weights w and a slope ρ ≥ 0 of the loss, E(ρ) = max_δ [ρ w·δ + merit(δ)] over the set; its
derivative is the move w·δ of the output itself. Source: ours (docs/certificates.md).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["BallReach", "Reach", "SmoothedSignReach"]

_ROWS = 4096


class Reach(ABC):
    """E of a set and its derivatives, at slopes ρ (n,) ≥ 0 and the weights w (F,) of the output."""

    @abstractmethod
    def value(self, rho: Tensor, w: Tensor) -> Tensor:
        """E (n,)."""

    @abstractmethod
    def slope(self, rho: Tensor, w: Tensor) -> Tensor:
        """E' = w·d (n,): how far the perturbation d moves the output."""

    @abstractmethod
    def bend(self, rho: Tensor, w: Tensor) -> Tensor:
        """E'' (n,) ≥ 0, falling in ρ."""

    @abstractmethod
    def merit(self, rho: Tensor, w: Tensor) -> Tensor:
        """What the smoothed objective adds to the loss at the perturbation (n,)."""

    @abstractmethod
    def pull(self, weights: Tensor, rho: Tensor, w: Tensor, against: Tensor) -> Tensor:
        """Σ weights_i d_i (F,) of the perturbations.

        Args:
            weights: (n,), at least 0.
            rho: slopes (n,).
            w: weights of the output (F,).
            against: (F,); where w is 0 every perturbation is a maximiser, and the one that is
                taken makes the sum of the two the shortest.
        """

    @abstractmethod
    def mixed(self, rho: Tensor, w: Tensor) -> Tensor:
        """∂_ρ∂_w E (n, F), or (1, F) where it is the same for all points."""

    @abstractmethod
    def curvature(self, weights: Tensor, rho: Tensor, w: Tensor) -> Tensor:
        """Σ weights_i ∂_ww E (F, F)."""

    @property
    @abstractmethod
    def pointed(self) -> bool:
        """Whether E has a kink at w = 0, where an optimum can sit."""

    @property
    @abstractmethod
    def rigid(self) -> bool:
        """Whether every ρ > 0 has the same perturbation, so that E is linear in it."""

    @abstractmethod
    def widened(self, factor: float) -> Reach:
        """The set with its smoothing widened by a factor, on the way to an optimum."""

    @abstractmethod
    def length(self, features: int) -> float:
        """The largest Euclidean length of a perturbation."""


@dataclass(frozen=True)
class BallReach(Reach):
    """The Euclidean ball: E = ε ρ ‖w‖."""

    eps: float

    @property
    def pointed(self) -> bool:
        return True

    @property
    def rigid(self) -> bool:
        return True

    def widened(self, factor: float) -> Reach:
        return self

    def value(self, rho: Tensor, w: Tensor) -> Tensor:
        return self.eps * float(w.norm()) * rho

    def slope(self, rho: Tensor, w: Tensor) -> Tensor:
        return torch.full_like(rho, self.eps * float(w.norm()))

    def bend(self, rho: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(rho)

    def merit(self, rho: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(rho)

    def pull(self, weights: Tensor, rho: Tensor, w: Tensor, against: Tensor) -> Tensor:
        most = self.eps * weights.sum()
        if bool((w == 0).all()):
            return -against * min(1.0, float(most) / max(float(against.norm()), 1e-300))
        return most * _unit(w)

    def mixed(self, rho: Tensor, w: Tensor) -> Tensor:
        return self.eps * _unit(w).unsqueeze(0)

    def curvature(self, weights: Tensor, rho: Tensor, w: Tensor) -> Tensor:
        unit, norm = _unit(w), w.norm()
        eye = torch.eye(len(w), dtype=w.dtype, device=w.device)
        scale = self.eps * (weights @ rho) / norm if norm > 0 else torch.zeros_like(norm)
        return scale * (eye - torch.outer(unit, unit))

    def length(self, features: int) -> float:
        return self.eps


@dataclass(frozen=True)
class SmoothedSignReach(Reach):
    """The smoothed L∞ ball of a fixed bandwidth τ: E = ε Σ_j √(ρ² w_j² + τ²)."""

    eps: float
    tau: float

    @property
    def pointed(self) -> bool:
        return False

    @property
    def rigid(self) -> bool:
        return False

    def widened(self, factor: float) -> Reach:
        return replace(self, tau=self.tau * factor)

    def _inverse(self, rho: Tensor, w: Tensor) -> Tensor:
        """1 / √(ρ² w² + τ²) (n, F)."""
        square = w.square()
        return torch.addmm(self._floor(w), rho.square().unsqueeze(1), square.unsqueeze(0)).rsqrt_()

    def _floor(self, w: Tensor) -> Tensor:
        return torch.full_like(w, self.tau**2)

    def _summed(self, rho: Tensor, w: Tensor, numerator: Tensor, cubed: bool = False) -> Tensor:
        """Σ_j numerator_j / √(ρ² w_j² + τ²) (n,), or over its cube, a block at a time."""
        found = torch.empty_like(rho)
        for some, into in zip(torch.split(rho, _ROWS), torch.split(found, _ROWS), strict=True):
            inverse = self._inverse(some, w)
            power = inverse * inverse * inverse if cubed else inverse
            into.copy_(power @ numerator)
        return found

    def value(self, rho: Tensor, w: Tensor) -> Tensor:
        ones = torch.ones_like(w)
        along = rho.square() * self._summed(rho, w, w.square())
        return self.eps * (along + self.tau**2 * self._summed(rho, w, ones))

    def slope(self, rho: Tensor, w: Tensor) -> Tensor:
        return self.eps * rho * self._summed(rho, w, w.square())

    def bend(self, rho: Tensor, w: Tensor) -> Tensor:
        return self.eps * self.tau**2 * self._summed(rho, w, w.square(), cubed=True)

    def merit(self, rho: Tensor, w: Tensor) -> Tensor:
        return self.eps * self.tau**2 * self._summed(rho, w, torch.ones_like(w))

    def pull(self, weights: Tensor, rho: Tensor, w: Tensor, against: Tensor) -> Tensor:
        total = torch.zeros_like(w)
        for some, part in zip(torch.split(weights, _ROWS), torch.split(rho, _ROWS), strict=True):
            total += (some * part) @ self._inverse(part, w)
        return self.eps * w * total

    def mixed(self, rho: Tensor, w: Tensor) -> Tensor:
        inverse = self._inverse(rho, w)
        twice = 1 + (self.tau * inverse).square()
        return self.eps * rho.unsqueeze(1) * w * inverse * twice

    def curvature(self, weights: Tensor, rho: Tensor, w: Tensor) -> Tensor:
        total = torch.zeros_like(w)
        for some, part in zip(torch.split(weights, _ROWS), torch.split(rho, _ROWS), strict=True):
            inverse = self._inverse(part, w)
            total += (some * part.square()) @ (inverse * inverse * inverse)
        return torch.diag(self.eps * self.tau**2 * total)

    def length(self, features: int) -> float:
        return self.eps * math.sqrt(features)


def _unit(w: Tensor) -> Tensor:
    """w / ‖w‖; zero where w is, which is a subgradient of the norm there."""
    norm = w.norm()
    return w / norm if norm > 0 else torch.zeros_like(w)
