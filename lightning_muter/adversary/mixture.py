"""An adversary that mixes two local maximisers, smoothly, instead of jumping between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.adversary.maximiser import InnerMaximum
from lightning_muter.threats import Threat

__all__ = ["Mixture", "mix"]

_SAME = 1e-3


@dataclass(frozen=True)
class Mixture:
    """A second maximiser, the weights (n,) of both, and the soft maximum (n,) of their losses."""

    rival: InnerMaximum
    first: Tensor
    second: Tensor
    value: Tensor

    def part(self, some: slice) -> Mixture:
        """Some of the points."""
        return Mixture(self.rival.part(some), self.first[some], self.second[some], self.value[some])


def mix(threat: Threat, x: Tensor, inner: InnerMaximum, rival: InnerMaximum) -> Mixture:
    """Weights softmax(l / T) of two maximisers; a rival that is the same one has no weight.

    The value T log Σ exp(l_k / T) lies between the maximum and the maximum plus T log 2; its
    gradient in ω is Σ π_k ∇l_k, its Hessian Σ π_k D_k + Cov_π(∇l_k) / T. Source: ours
    (docs/theory.md).
    """
    temperature = threat.temperature
    assert temperature is not None
    losses = torch.stack([i.losses + threat.merit(i.delta, i.grad) for i in (inner, rival)])
    same = threat.distance(x, inner.delta - rival.delta) <= _SAME
    losses[1] = torch.where(same, -torch.inf, losses[1])
    first, second = torch.softmax(losses / temperature, dim=0)
    return Mixture(rival, first, second, temperature * torch.logsumexp(losses / temperature, dim=0))
