"""Margins of points, clean and under attack: what the audits look at."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.models import ModelView, measuring
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import unweighted

__all__ = ["margins", "robust_margins"]


def margins(view: ModelView, x: Tensor, targets: Tensor) -> Tensor:
    """z_y - log Σ_{j≠y} exp z_j of each point (n,), float64: the log-odds of the true label.

    Args:
        view: of a classifier.
        x: points (n, ...).
        targets: their labels (n,).

    Raises:
        ConfigurationError: the loss is no classifier's.
    """
    level = view.loss.level
    if level is None:
        raise ConfigurationError(
            f"loss={view.loss.name!r} has no margins: the audits need a classifier's loss, "
            "cross_entropy or logistic"
        )
    with measuring(view.module), torch.no_grad():
        return -level(view.logits(x), targets).double()


def robust_margins(view: ModelView, problem: PointProblem, x: Tensor, targets: Tensor) -> Tensor:
    """The margins (n,) at the maximisers that the memory's own problem finds."""
    with measuring(view.module):
        inner = problem.perturb(view, unweighted(x, targets))
    return margins(view, problem.threat.moved(x, inner.delta), targets)
