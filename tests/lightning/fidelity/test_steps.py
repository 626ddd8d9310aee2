"""The path, the frozen part and averaged weights."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import Data, Net
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import train

from lightning_muter import ConfigurationError, UnlearningMemory

averaging = getattr(pl.callbacks, "WeightAveraging", None)


class Sgd(Net):
    """A `Net` with any optimizer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = {"lr": 0.1, **options}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), **self.options)


def test_clipping_is_refused_with_the_horizon_of_training() -> None:
    for options in ({}, {"gradient_clip_algorithm": "value"}):
        clipped = {"gradient_clip_val": 0.01, "max_epochs": 4, **options}
        with pytest.raises(ConfigurationError, match="clipping"):
            train(Sgd(), horizon="training", trainer=clipped)
        train(Sgd(), trainer=clipped)  # newton_steps or the full step do not rely on the path
    train(Sgd(), horizon="training", trainer={"gradient_clip_val": 1e3})  # never clips


class Counted(Sgd):
    """It counts the batches that it was trained on."""

    steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return super().training_step(batch, batch_idx)


def test_a_learning_rate_of_0_is_refused_before_the_first_batch() -> None:
    model = Counted(lr=0.0)
    with pytest.raises(ConfigurationError, match="lr=0 and no scheduler"):
        train(model, horizon="training", trainer={"max_epochs": 4})
    assert model.steps == 0


def test_a_scheduler_may_start_at_a_learning_rate_of_0() -> None:
    class Warmup(Counted):
        def configure_optimizers(self) -> Any:
            sgd = super().configure_optimizers()
            warmup = torch.optim.lr_scheduler.LambdaLR(sgd, lambda epoch: min(epoch / 2, 1.0))
            return [sgd], [warmup]

    model = Warmup(lr=0.1)
    train(model, horizon="training", trainer={"max_epochs": 4})
    assert model.steps > 0 and model.trainer.current_epoch == 4


def test_noise_in_the_gradients_and_weights_that_are_set_are_refused() -> None:
    class Noise(Sgd):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            for p in self.classifier.parameters():
                p.grad.add_(torch.randn_like(p.grad))

    class Clamped(Sgd):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.classifier.weight.data.clamp_(-0.1, 0.1)

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(0.9)
            return loss

    class Shrinking(Sgd):
        def configure_optimizers(self) -> Any:
            return Own(self.parameters(), lr=0.1)

    for model in (Noise(), Clamped(), Shrinking()):
        with pytest.raises(ConfigurationError, match="horizon='training', but"):
            train(model, horizon="training", trainer={"max_epochs": 3})
        assert model.trainer.current_epoch == 0


def test_rates_of_other_parameters_and_other_optimizers_do_not_matter() -> None:
    class Groups(Net):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": self.backbone.parameters(), "lr": 1e-4, "weight_decay": 0.3},
                {"params": self.classifier.parameters(), "lr": 0.2},
            ]
            return torch.optim.SGD(groups, weight_decay=0.01)

    callback = train(Groups(), horizon="training")
    assert callback.memory is not None
    assert callback.memory.settings.horizon == pytest.approx(3 * 0.2 / 41)
    assert callback.memory.settings.weight_decay == 0.01


def test_decays_that_disagree_are_refused_before_training() -> None:
    class Decays(Net):
        def configure_optimizers(self) -> Any:
            head = self.classifier
            groups = [{"params": [head.weight], "weight_decay": 0.1}, {"params": [head.bias]}]
            return torch.optim.SGD(groups, lr=0.1)

    model = Decays()
    with pytest.raises(ConfigurationError, match="weight decays"):
        train(model)
    assert model.trainer.global_step == 0


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01},
        {"momentum": 0.8, "nesterov": True},
    ],
)
def test_momentum_and_a_schedule_are_plain_sgd(options: dict[str, Any]) -> None:
    class Scheduled(Sgd):
        def configure_optimizers(self) -> Any:
            sgd = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
            return [sgd], [{"scheduler": schedule, "interval": "step"}]

    callback = train(Scheduled(**options), horizon="training", trainer={"max_epochs": 3})
    rate = 0.1 * (1 - options.get("dampening", 0)) / 0.2
    expected = rate * sum(0.9**k for k in range(9)) / 41
    assert callback.memory is not None
    assert callback.memory.settings.horizon == pytest.approx(expected)


def test_a_short_last_round_of_accumulation_takes_its_share_of_time() -> None:
    options = {"accumulate_grad_batches": 2, "max_epochs": 2}  # rounds of 2 and 1 of 3 batches
    callback = train(Sgd(), horizon="training", trainer=options)
    assert callback.memory is not None
    assert callback.memory.settings.horizon == pytest.approx(2 * 1.5 * 0.1 / 41)
    growing = [GradientAccumulationScheduler({0: 1, 1: 3})]
    callback = train(Sgd(), before=growing, horizon="training", trainer={"max_epochs": 2})
    assert callback.memory is not None
    assert callback.memory.settings.horizon == pytest.approx((3 + 1) * 0.1 / 41)


def test_the_horizon_divides_by_the_points_that_were_trained_on() -> None:
    points = DataLoader(Data().dataset, batch_size=16, drop_last=True)
    callback = train(Sgd(), points, horizon="training", trainer={"max_epochs": 2})
    assert callback.memory is not None
    assert callback.memory.settings.horizon == pytest.approx(4 * 0.1 / 32)


# --- averaged weights ------------------------------------------------------------------------


@pytest.mark.skipif(averaging is None, reason="Lightning has no WeightAveraging")
@pytest.mark.filterwarnings("ignore:.*swa.*|.*Swapping.*")
def test_averaged_weights() -> None:
    for make in (averaging, lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1)):
        many = {"max_epochs": 4}
        model = Sgd()
        with pytest.raises(ConfigurationError, match="before MUterCallback"):
            train(model, after=[make()], trainer=many)
        assert model._trainer is None or model.trainer.global_step == 0
        callback = train(Sgd(), before=[make()], trainer=many)  # its weights are the expansion's
        assert callback.memory is not None


def test_weights_that_change_after_stage_one_are_refused() -> None:
    class Load(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.classifier.weight.data.mul_(0.5)

    with pytest.raises(ConfigurationError, match="after MUterCallback changed"):
        train(after=[Load()])


# --- the frozen part -------------------------------------------------------------------------


class Milestone(BaseFinetuning):
    """Unfreezes the backbone at the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class Head(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.classifier.parameters(), lr=0.1)


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_callback_that_will_unfreeze_is_refused_before_training(side: str) -> None:
    model = Head()
    with pytest.raises(ConfigurationError, match="Milestone freezes and unfreezes"):
        train(model, trainer={"max_epochs": 3}, **{side: [Milestone()]})
    assert model.trainer.global_step == 0


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_backbone_that_is_unfrozen_is_refused_at_once(side: str) -> None:
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.backbone.requires_grad_(True)

    model = Head()
    with pytest.raises(ConfigurationError, match=r"unfrozen while training: backbone.0.weight"):
        train(model, trainer={"max_epochs": 3}, **{side: [Unfreeze()]})
    assert model.trainer.current_epoch == 1


def test_tensors_that_change_are_named() -> None:
    class Moving(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.zeros(8))
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.batches += 1  # a counter is no part of the function
            if batch_idx == 1 and self.trainer.max_steps == 2:
                self.centre.add_(1.0)
            return super().training_step(batch, batch_idx)

    train(Moving())
    with pytest.raises(ConfigurationError, match="changed while training: centre"):
        train(Moving(), trainer={"max_steps": 2})


def test_a_head_that_is_frozen_is_refused() -> None:
    class Freeze(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.classifier.bias.requires_grad_(False)

    with pytest.raises(ConfigurationError, match="classifier.bias should be trained"):
        train(after=[Freeze()])


def test_strict_false_warns_once_and_keeps_what_it_found(tmp_path: Any) -> None:
    class Wrong(Sgd):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = nn.CrossEntropyLoss(label_smoothing=0.3)
            return loss(self(batch[0]), batch[1])

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        callback = train(
            Wrong(),
            strict=False,
            horizon="training",
            method="muter",
            memory_dir=str(tmp_path),
            trainer={"max_epochs": 3, "gradient_clip_val": 0.01},
        )
    said = [str(w.message) for w in found]
    assert len([s for s in said if "gradient clipping shortens" in s]) == 1
    assert len([s for s in said if "relative difference" in s]) == 1
    assert len(callback.findings) == 2 and callback.memory is not None
    assert set(callback.findings) < set(callback.memory.warnings)  # and what Stage I says itself
    assert UnlearningMemory.load(tmp_path).warnings == callback.memory.warnings


# --- gradients that change between backward and the step -------------------------------------


def test_gradients_clipped_in_a_hook_of_the_module_are_refused_with_a_horizon() -> None:
    class Clips(Sgd):
        def on_after_backward(self) -> None:
            nn.utils.clip_grad_norm_(self.classifier.parameters(), 0.01)

    class Manual(Sgd):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.clip_gradients(optimizer, 0.01, "norm")
            optimizer.step()

    for model in (Clips, Manual):
        with pytest.raises(ConfigurationError, match="changed between backward and the step"):
            train(model(), horizon="training")
        assert train(model()).memory is not None


def test_a_penalty_by_the_gradients_is_refused() -> None:
    class Decays(Sgd):
        def on_after_backward(self) -> None:
            weight = self.classifier.weight
            weight.grad.add_(weight.detach(), alpha=0.05)

    for options in ({}, {"horizon": "training"}):
        with pytest.raises(ConfigurationError, match="between backward and the step"):
            train(Decays(), **options)


def test_what_a_hook_adds_right_before_the_step_is_seen_after_it() -> None:
    class Decays(Sgd):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            weight = self.classifier.weight
            weight.grad.add_(weight.detach(), alpha=0.05)

    class Noise(Sgd):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.classifier.weight.grad.add_(1e-3 * torch.randn_like(self.classifier.weight))

    for options in ({}, {"newton_steps": 3}):
        with pytest.raises(ConfigurationError, match="0.05 times the weights is added"):
            train(Decays(), **options)
        assert train(Noise(), **options).findings == []


@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step"])
def test_weights_whose_gradients_are_set_to_zero_are_no_part_of_the_optimum(hook: str) -> None:
    class Frozen(Sgd):
        pass

    def silence(self: Frozen, *_: Any) -> None:
        self.classifier.weight.grad[1] = 0

    setattr(Frozen, hook, silence)
    for options in ({}, {"newton_steps": 3}):
        with pytest.raises(ConfigurationError, match="6 of 21 gradients .* set to zero"):
            train(Frozen(), **options)
    with pytest.warns(UserWarning, match="set to zero"):
        assert train(Frozen(), strict=False).findings


def test_an_optimizer_may_add_its_own_decay_in_place() -> None:
    class InPlace(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.add_(p.detach(), alpha=group["weight_decay"])
                        p.data.sub_(p.grad, alpha=group["lr"])
            return loss

    class Old(Net):
        def configure_optimizers(self) -> Any:
            return InPlace(self.parameters(), lr=0.1, weight_decay=1e-2)

    assert train(Old(), trainer={"max_epochs": 2}).findings == []


def test_a_batch_that_is_skipped_is_not_trained_on() -> None:
    class Skips(Sgd):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    points = DataLoader(Data().dataset, batch_size=16)
    with pytest.warns(UserWarning, match="returned `None`"):
        callback = train(Skips(), points, horizon="training", trainer={"max_epochs": 2})
    assert callback.point_weights is not None and callback.memory is not None
    assert torch.nonzero(callback.point_weights == 0).flatten().tolist() == list(range(16, 32))
    assert callback.memory.settings.horizon == pytest.approx(4 * 0.1 / 25)


def test_two_optimizers_of_the_trained_parameters_have_no_horizon() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            head = self.classifier
            return [torch.optim.SGD([one], lr=0.1) for one in (head.weight, head.bias)]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizers: Any = self.optimizers()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            for one in optimizers:
                one.step()
                one.zero_grad()

    with pytest.raises(ConfigurationError, match="2 optimizers of the trained parameters"):
        train(Two(), horizon="training")
    train(Two(), newton_steps=1)
