"""U-LiRA: was a point unlearned, or never trained on? The strongest per-point membership test.

Source: Hayes et al., Inexact unlearning needs more careful evaluations to avoid a false sense of
privacy, 2024; on margins, robust ones included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_muter.evaluation.metrics import auc

__all__ = ["UnlearningLiRA", "unlearning_scores"]

_SPREAD = 1e-3


def unlearning_scores(target: Tensor, unlearned: Tensor, retrained: Tensor) -> Tensor:
    """log N(target; unlearned) - log N(target; retrained) of each point (n,).

    Args:
        target: margins (n,) under the model that is attacked.
        unlearned: margins (k, n) under models that unlearned the points.
        retrained: margins (j, n) under models that never saw them.

    Example:
        >>> import torch
        >>> two = torch.tensor([[0.0], [2.0]])
        >>> unlearning_scores(torch.tensor([2.0]), two + 1, two) > 0
        tensor([True])
    """
    return _log_density(target, unlearned) - _log_density(target, retrained)


def _log_density(target: Tensor, models: Tensor) -> Tensor:
    mean, std = models.double().mean(dim=0), models.double().std(dim=0)
    std = std.clamp(min=_SPREAD * (1 + mean.abs()))
    return -0.5 * ((target - mean) / std).square() - std.log()


class UnlearningLiRA(Metric):
    """AUC of `unlearning_scores` over points and target models; 0.5 is a perfect unlearner's."""

    full_state_update = False
    unlearned: list[Tensor]
    retrained: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("unlearned", [], dist_reduce_fx="cat")
        self.add_state("retrained", [], dist_reduce_fx="cat")

    def update(
        self, target: Tensor, unlearned: Tensor, retrained: Tensor, was_unlearned: bool
    ) -> None:
        """One model that is attacked: margins (n,), and those of the shadows (k, n), (j, n)."""
        scores = unlearning_scores(target, unlearned, retrained).detach()
        (self.unlearned if was_unlearned else self.retrained).append(scores)

    def compute(self) -> Tensor:
        """The AUC."""
        return torch.tensor(auc(dim_zero_cat(self.unlearned), dim_zero_cat(self.retrained)))
