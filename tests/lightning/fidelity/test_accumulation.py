"""What a step sums: every point's gradient is one here, so that the shares are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muter import ConfigurationError
from lightning_muter.lightning.fidelity.accumulation import Accumulation
from lightning_muter.lightning.fidelity.difference import Comparison

SIZES = (16, 9)


@dataclass
class Training:
    """Of a trainer and a module what is asked."""

    accumulate_grad_batches: int = 1
    is_last_batch: bool = False
    automatic_optimization: bool = True


def accumulation(training: Any, summed: bool = False) -> Accumulation:
    return Accumulation(training, training, summed)


def one_as(factor: float) -> Comparison:
    """Training's gradient as a multiple of the package's own."""
    own = torch.ones(3, dtype=torch.float64)
    omega: tuple[Tensor, ...] = (torch.zeros(3, dtype=torch.float64),)
    return Comparison(factor * own, own, omega, 16, 1e-6, 0.0)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_lightning_divides_by_the_batches_of_a_step(summed: bool, every: int) -> None:
    found, step = accumulation(Training(every), summed), 0.0
    for size in SIZES[:every]:
        found.begin(size)
        left = (size if summed else 1) / every  # what a batch's backward adds
        step += left
        assert found.scale * left == pytest.approx(1.0)
    assert found.share() == pytest.approx(step)
    found.stepped()
    assert found.share() == 0.0


@pytest.mark.parametrize("summed", [False, True])
def test_a_module_that_steps_by_hand_divides_its_losses(summed: bool) -> None:
    found, step = accumulation(Training(automatic_optimization=False), summed), 0.0
    for size in SIZES:
        found.begin(size)
        left = (size if summed else 1) / 2
        step += left
        assert found.divides(one_as(found.scale * left))
    assert found.share() == pytest.approx(step)


def test_a_module_divides_by_one_number_and_lightning_s_never() -> None:
    found = accumulation(Training(automatic_optimization=False))
    assert not found.divides(one_as(0.3)) and not found.divides(one_as(2.0))
    assert found.divides(one_as(0.5)) and not found.divides(one_as(0.25))
    assert not accumulation(Training()).divides(one_as(0.5))


@pytest.mark.parametrize("batches", [1, 3])
def test_a_divisor_that_is_not_the_number_of_batches_is_refused_once(batches: int) -> None:
    training = Training(automatic_optimization=False)
    found = accumulation(training)
    for _ in range(batches):
        found.begin(16)
    assert found.divides(one_as(0.5))
    with pytest.raises(ConfigurationError, match=f"divides its loss by 2, .* after {batches} "):
        found.share()
    assert found.share() == batches


def test_an_epoch_may_end_before_a_step_is_full() -> None:
    found = accumulation(Training(is_last_batch=True, automatic_optimization=False))
    found.begin(16)
    assert found.divides(one_as(0.5)) and found.share() == 0.5
