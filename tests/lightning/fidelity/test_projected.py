"""Trained weights that something else than the optimizer moves."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import Net
from torch.optim import SGD
from training import train

from lightning_muter import ConfigurationError
from lightning_muter.lightning.fidelity.projected import ProjectedWeights

BOX = 0.1


class BeforeBatches(Net):
    """Weights that are put back into a box before each batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.classifier.weight.data.clamp_(-BOX, BOX)


class AfterSteps(Net):
    """The same after each batch."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.classifier.weight.data.clamp_(-BOX, BOX)


class AtFirst(Net):
    """Weights that are begun anew after the first batch of each epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.classifier.weight.data.mul_(0.5)


@pytest.mark.parametrize("module", [BeforeBatches, AfterSteps], ids=lambda m: m.__name__)
@pytest.mark.parametrize("epochs", [1, 4])
def test_newton_steps_would_leave_the_set_that_training_stays_in(
    module: type[Net], epochs: int
) -> None:
    with pytest.raises(
        ConfigurationError, match=r"projection.*newton_steps lead to an optimum out"
    ):
        train(module(), newton_steps=5, trainer={"max_epochs": epochs})


@pytest.mark.parametrize("module", [BeforeBatches, AfterSteps], ids=lambda m: m.__name__)
def test_with_strict_false_it_is_a_finding(module: type[Net]) -> None:
    with pytest.warns(UserWarning, match="projection"):
        callback = train(module(), newton_steps=5, strict=False)
    assert any("projection" in one for one in callback.findings)


@pytest.mark.parametrize("module", [BeforeBatches, AfterSteps], ids=lambda m: m.__name__)
def test_without_newton_steps_the_distance_says_so(module: type[Net]) -> None:
    callback = train(module(), method="muter")
    assert callback.findings == [] and callback.memory is not None
    assert callback.memory.summary["distance_to_optimum"] > 0.1


def test_moves_now_and_then_and_a_set_that_is_never_left_are_none() -> None:
    class Wide(Net):
        def on_train_batch_end(self, *args: Any) -> None:
            self.classifier.weight.data.clamp_(-50, 50)

    for module in (AtFirst(), Wide()):
        assert train(module, newton_steps=5, trainer={"max_epochs": 3}).findings == []


def test_a_move_is_measured_from_where_the_optimizer_left() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer, watch = SGD([weight], lr=0.5), ProjectedWeights([weight])
    for due in (True, True, False):
        weight.grad = torch.tensor([0.0, 2.0], dtype=torch.float64)
        watch.before_step(optimizer, due)
        optimizer.step()
        weight.data[1] += 0.25
    with pytest.raises(ConfigurationError, match=r"by 0\.25 between a step \(of 1\)"):
        watch.check()
    watch.close()
    assert not optimizer._optimizer_step_post_hooks


def test_the_user_s_own_hooks_after_a_step_go_on() -> None:
    """Both looks wait for one step, and so does a hook that was there before."""

    class Hooked(AfterSteps):
        heard = 0

        def configure_optimizers(self) -> SGD:
            optimizer = SGD(self.parameters(), lr=0.1)
            optimizer.register_step_post_hook(self.hear)
            return optimizer

        def hear(self, *_: Any) -> None:
            self.heard += 1

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.classifier.weight.data.clamp_(-BOX, BOX)

    for steps in (0, 5):
        model = Hooked()
        expected = pytest.warns(UserWarning, match="projection") if steps else nullcontext()
        with expected:
            train(model, newton_steps=steps, strict=False, trainer={"max_epochs": 2})
        assert model.heard == model.trainer.global_step > 0
        assert len(model.trainer.optimizers[0]._optimizer_step_post_hooks) == 1
