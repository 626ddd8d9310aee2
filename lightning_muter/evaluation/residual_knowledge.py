"""Residual knowledge: are forgotten points recognised again next to where they were?

Source: Hsu et al., The unseen threat: residual knowledge in machine unlearning under perturbed
samples, 2025; as ratios of sums over points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.evaluation.margins import margins
from lightning_muter.models import ModelView
from lightning_muter.threats import Threat

__all__ = ["Recognition", "recognition"]


@dataclass(frozen=True)
class Recognition:
    """How often perturbations of points are classified as the points' labels.

    Attributes:
        rate: the share of perturbations (n,) that are.
        again: the share of all points that are wrong where they are, and right at some of their
            perturbations.
    """

    rate: Tensor
    again: float

    def residual(self, retrained: Recognition) -> float:
        """Σ rate / Σ Retrain's rate: above 1 the points are known better than to a Retrain."""
        return float(self.rate.sum() / retrained.rate.sum().clamp(min=1e-12))


def recognition(
    view: ModelView, threat: Threat, x: Tensor, targets: Tensor, draws: int = 20, seed: int = 0
) -> Recognition:
    """`Recognition` of points under random perturbations within a threat's set.

    Args:
        view: of a classifier, at the parameters to look at.
        threat: the set, small against the distance between points.
        x: points (n, ...).
        targets: their labels (n,).
        draws: perturbations a point.
        seed: of the perturbations, so that two models are shown the same ones.
    """
    pixels, right = threat.flat_pixels(x), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(draws):
            moved = threat.moved(x, threat.random_start(pixels))
            right.append(margins(view, moved, targets) > 0)
    found = torch.stack(right)
    again = (margins(view, x, targets) <= 0) & found.any(dim=0)
    return Recognition(found.double().mean(dim=0), float(again.double().mean()))
