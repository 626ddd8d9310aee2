"""TRADES' own loss for a training step, beside torch's functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muter import TRADES, ConfigurationError


def batch() -> tuple[nn.Module, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    return nn.Linear(4, 3).double(), [x, torch.tensor([0, 2, 1, 1, 0]), x + 0.1]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_at_the_clean_point_is_the_one_that_is_given(smoothing: float) -> None:
    model, (x, y, adversarial) = batch()
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    divergence = F.kl_div(
        F.log_softmax(model(adversarial), dim=1), F.softmax(model(x), dim=1), reduction="batchmean"
    )
    expected = criterion(model(x), y) + 3.0 * divergence
    found = TRADES(beta=3.0).loss(model, [x, y, adversarial], criterion)
    torch.testing.assert_close(found, expected)
    if smoothing == 0:
        torch.testing.assert_close(TRADES(beta=3.0).loss(model, [x, y, adversarial]), expected)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("cross_entropy", "must be a loss module"),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "sum of weights"),
        (nn.CrossEntropyLoss(reduction="sum"), "reduction='mean'"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, expected: str) -> None:
    model, handed = batch()
    with pytest.raises(ConfigurationError, match=expected):
        TRADES().loss(model, handed, loss)


def test_a_batch_without_perturbed_inputs_says_who_makes_them() -> None:
    model, handed = batch()
    with pytest.raises(ConfigurationError, match="2 entries.*objective=.*validation"):
        TRADES().loss(model, handed[:2])
