"""Metrics of unlearning against scikit-learn, torch.distributions and cases done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from lightning_muter import ConfigurationError, L2Ball
from lightning_muter.evaluation import (
    LikelihoodRatioAUC,
    LossThresholdAUC,
    OutputDivergence,
    auc,
    likelihood_ratio_scores,
    output_divergence,
)
from lightning_muter.evaluation.judge import gaps, strongest_loss
from lightning_muter.evaluation.metrics import confidence
from lightning_muter.objectives.resolve import resolve_loss


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_divergence_is_that_of_torch_distributions() -> None:
    a, b = torch.randn(2, 7, 4).double()
    expected = kl_divergence(Categorical(logits=a), Categorical(logits=b))
    torch.testing.assert_close(output_divergence(a, b, "cross_entropy"), expected)
    a, b = torch.randn(2, 7, 1).double()
    expected = kl_divergence(Bernoulli(logits=a), Bernoulli(logits=b)).squeeze(1)
    torch.testing.assert_close(output_divergence(a, b, "logistic"), expected)
    expected = kl_divergence(Normal(a, 1.0), Normal(b, 1.0)).squeeze(1)
    torch.testing.assert_close(output_divergence(a, b, "squared"), expected)
    with pytest.raises(ConfigurationError, match="hinge"):
        output_divergence(a, b, "hinge")


def test_divergence_accumulates_over_uneven_batches() -> None:
    a, b = torch.randn(2, 7, 4)
    metric = OutputDivergence("cross_entropy")
    for part in (slice(0, 5), slice(5, 7)):
        metric.update(a[part], b[part])
    expected = output_divergence(a, b, "cross_entropy").mean()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-6)
    metric.reset()
    assert float(metric.total) == 0


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_scikit_learns(ties: bool) -> None:
    members, others = 40 * torch.randn(30) + 7, 40 * torch.randn(50)
    if ties:
        members, others = (members / 20).round(), (others / 20).round()
    labels = [1] * 30 + [0] * 50
    expected = roc_auc_score(labels, torch.cat([members, others]).tolist())
    assert auc(members, others) == pytest.approx(expected)
    metric = LossThresholdAUC()
    for part in torch.split(-members, 8):
        metric.update(part, True)
    metric.update(-others, False)
    assert float(metric.compute()) == pytest.approx(expected)


def test_confidence_is_the_logit_of_the_likelihood() -> None:
    p = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(confidence(-p.log()), torch.log(p / (1 - p)))


def test_likelihood_ratio_by_hand() -> None:
    """Two points, three shadows: point 0 was seen by the last one, which must not count."""
    shadows = torch.tensor([[1.0, 0.0], [3.0, 2.0], [99.0, 4.0]])
    member = torch.tensor([[False, False], [False, False], [True, False]])
    # means 2 and 2; squared deviations 1 + 1 + 4 + 0 + 4 = 10 over (5 - 2) degrees of freedom
    std = math.sqrt(10 / 3)
    got = likelihood_ratio_scores(torch.tensor([5.0, 2.0]), shadows, member)
    torch.testing.assert_close(got, torch.tensor([3.0 / std, 0.0]))


def test_likelihood_ratio_finds_members_that_the_loss_hides() -> None:
    difficulty = 5 * torch.randn(200)
    shadows = difficulty + 0.3 * torch.randn(8, 200)
    target = difficulty + 0.3 * torch.randn(200)
    target[:100] += 1.0  # members: a little above what others give them
    unseen = torch.zeros(8, 200, dtype=torch.bool)
    metric = LikelihoodRatioAUC()
    metric.update(target[:100], shadows[:, :100], unseen[:, :100], True)
    metric.update(target[100:], shadows[:, 100:], unseen[:, 100:], False)
    assert float(metric.compute()) > 0.95
    assert auc(target[:100], target[100:]) < 0.7


def test_the_strong_attack_reaches_the_closed_form_of_a_linear_model() -> None:
    model = torch.nn.Linear(6, 1, bias=False).double()
    x, y, eps = torch.randn(40, 6).double(), torch.randint(0, 2, (40,)), 0.4
    loss = resolve_loss("logistic")
    w = model.weight.detach().squeeze(0)
    margin = (2 * y - 1) * (x @ w) - eps * w.norm()
    worst, correct = strongest_loss(model, loss, L2Ball(eps), (x, y), 30, 2)
    expected = torch.nn.functional.softplus(-margin)
    torch.testing.assert_close(worst, expected, rtol=1e-6, atol=1e-8)
    assert correct.tolist() == (margin > 0).tolist()


def test_gaps_are_signed_and_of_scores_alone() -> None:
    found = {"clean_test": 0.9, "kl": 3.0, "mia_auc": 0.5}
    target = {"clean_test": 0.8, "kl": 0.0, "mia_auc": 0.6}
    assert gaps(found, target) == pytest.approx({"gap_clean_test": 0.1, "gap_mia_auc": -0.1})
