"""What is measured of an unlearned model: pure functions, and metrics that accumulate.

Definitions and sources are in docs/metrics.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities.data import dim_zero_cat

from lightning_muter.errors import ConfigurationError

__all__ = [
    "LikelihoodRatioAUC",
    "LossThresholdAUC",
    "OutputDivergence",
    "auc",
    "confidence",
    "likelihood_ratio_scores",
    "output_divergence",
]


def output_divergence(reference: Tensor, outputs: Tensor, loss: str) -> Tensor:
    """KL(reference ‖ outputs) of each point (n,), in nats.

    Categorical for "cross_entropy", Bernoulli for "logistic", Gaussians of unit variance for
    "squared" (half the squared difference).

    Args:
        reference: outputs (n, C) of the model to compare with.
        outputs: outputs (n, C) of the model in question.
        loss: the named loss that gives the outputs their meaning.

    Raises:
        ConfigurationError: the loss has no such meaning.

    Example:
        >>> import torch
        >>> output_divergence(torch.zeros(1, 2), torch.zeros(1, 2), "cross_entropy")
        tensor([0.])
    """
    if loss == "cross_entropy":
        p, q = F.log_softmax(reference, dim=1), F.log_softmax(outputs, dim=1)
        return (p.exp() * (p - q)).sum(dim=1)
    a, b = reference.reshape(len(reference)), outputs.reshape(len(outputs))
    if loss == "logistic":
        p = torch.sigmoid(a)
        return p * (F.logsigmoid(a) - F.logsigmoid(b)) + (1 - p) * (
            F.logsigmoid(-a) - F.logsigmoid(-b)
        )
    if loss == "squared":
        return 0.5 * (a - b).square()
    raise ConfigurationError(
        f"loss={loss!r} gives outputs no distribution; expected cross_entropy, logistic or squared"
    )


def confidence(losses: Tensor) -> Tensor:
    """log p/(1 - p) of the true label from its negative log-likelihood (n,): nearly Gaussian.

    Source: Carlini et al., Membership inference attacks from first principles, 2022.
    """
    return -losses - torch.log(-torch.expm1(-losses.clamp(min=1e-12)))


def likelihood_ratio_scores(target: Tensor, shadows: Tensor, member: Tensor) -> Tensor:
    """How far each point's confidence lies above that of models that never saw it (n,).

    The offline likelihood-ratio attack: (φ - mean)/std over the shadow models without the point,
    with one std for all points where the shadows are few.

    Args:
        target: confidence (n,) under the model that is attacked.
        shadows: confidence (k, n) under the shadow models.
        member: which shadow models (k, n) were trained on the point.

    Source: Carlini et al., 2022, the offline variant.
    """
    out = (~member).to(shadows)
    count = out.sum(dim=0).clamp(min=1)
    mean = (shadows * out).sum(dim=0) / count
    spread = ((shadows - mean).square() * out).sum() / (out.sum() - len(mean)).clamp(min=1)
    return (target - mean) / spread.sqrt().clamp(min=1e-12)


def auc(members: Tensor, others: Tensor) -> float:
    """The probability that a member scores above another point; 0.5 is no leak.

    Example:
        >>> import torch
        >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.5]))
        0.75
    """
    # ranks, since the metric would squash scores outside [0, 1] together
    scores = torch.cat([members, others])
    values, ranks = torch.unique(scores, return_inverse=True)
    target = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).long()
    unit = (ranks.double() + 1) / (len(values) + 2)
    return float(binary_auroc(unit, target.to(unit.device)))


class OutputDivergence(Metric):
    """Mean of `output_divergence` over points.

    Example:
        >>> import torch
        >>> metric = OutputDivergence("squared")
        >>> metric.update(torch.tensor([[1.0]]), torch.tensor([[3.0]]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    full_state_update = False
    total: Tensor
    points: Tensor

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.loss = loss
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("points", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reference: Tensor, outputs: Tensor) -> None:
        """Outputs (n, C) of both models on the same points."""
        self.total += output_divergence(reference, outputs, self.loss).double().sum()
        self.points += len(outputs)

    def compute(self) -> Tensor:
        """The mean, in nats."""
        return self.total / self.points


class _Scores(Metric):
    full_state_update = False
    members: list[Tensor]
    others: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("members", [], dist_reduce_fx="cat")
        self.add_state("others", [], dist_reduce_fx="cat")

    def _append(self, scores: Tensor, member: bool) -> None:
        (self.members if member else self.others).append(scores.detach())

    def compute(self) -> Tensor:
        """The AUC of the attack; 0.5 is no leak."""
        return torch.tensor(auc(dim_zero_cat(self.members), dim_zero_cat(self.others)))


class LossThresholdAUC(_Scores):
    """Membership inference by the loss alone: a member's is lower.

    Source: Yeom et al., Privacy risk in machine learning, 2018.
    """

    def update(self, losses: Tensor, member: bool) -> None:
        """Losses (n,) of forgotten points (member) or of points never seen."""
        self._append(-losses, member)


class LikelihoodRatioAUC(_Scores):
    """Membership inference by `likelihood_ratio_scores`."""

    def update(self, target: Tensor, shadows: Tensor, trained_on: Tensor, member: bool) -> None:
        """Confidences (n,), (k, n) and membership (k, n) of forgotten or unseen points."""
        self._append(likelihood_ratio_scores(target, shadows, trained_on), member)
