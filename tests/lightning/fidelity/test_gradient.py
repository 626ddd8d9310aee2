"""The loss and the outputs: what training differentiates is what the memory does, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Data, Net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import train, zero_head

from lightning_muter import ConfigurationError


class Step(Net):
    """A `Net` whose training loss is any function of the module and its batch."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self, *batch)


def _trades(module: Net, x: Tensor, y: Tensor) -> Tensor:
    noisy = module(x + 0.3)
    clean = module(x)
    return F.cross_entropy(clean, y) + 3 * F.kl_div(
        noisy.log_softmax(1), clean.softmax(1), reduction="batchmean"
    )


def _penalised(module: Net, x: Tensor, y: Tensor) -> Tensor:
    weights = module.classifier.weight.square().sum()
    return F.cross_entropy(module(x), y) + 0.5 * 0.07 * weights


LOSSES = {
    "smoothing": lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.2),
    "class weights": lambda m, x, y: F.cross_entropy(m(x), y, torch.tensor([1.0, 4, 1]).double()),
    "trades": _trades,
    "focal": lambda m, x, y: (
        (1 - (-(v := F.cross_entropy(m(x), y, reduction="none"))).exp()) ** 2 * v
    ).mean(),
    "inputs changed": lambda m, x, y: F.cross_entropy(m(x * 0.9), y),
    "mixup": lambda m, x, y: F.cross_entropy(m(0.5 * (x + x.flip(0))), y),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_another_loss_is_refused_in_the_first_epoch(name: str, accumulate: int) -> None:
    """From a head of zeros, where the values of the losses are equal."""
    model = zero_head(Step(LOSSES[name]))
    with pytest.raises(ConfigurationError, match="relative difference"):
        train(model, trainer={"accumulate_grad_batches": accumulate, "max_epochs": 5})
    assert model.trainer.current_epoch == 0


def test_a_loss_that_changes_later_is_refused_then() -> None:
    def warmed(m: Net, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y, label_smoothing=0.1 * (m.current_epoch >= 2))

    model = Step(warmed)
    with pytest.raises(ConfigurationError, match="another one"):
        train(model, trainer={"max_epochs": 5})
    assert model.trainer.current_epoch == 2


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum"), "sums the loss"),
        (lambda m, x, y: 0.5 * F.cross_entropy(m(x), y), "0.5 times the mean"),
        (_penalised, r"L2 penalty of its own, 0.07/2"),
    ],
)
def test_the_diagnosis_says_what_the_loss_is(loss: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        train(Step(loss))


def test_a_penalty_of_the_loss_s_own_is_declared_by_weight_decay() -> None:
    def penalised(m: Net, x: Tensor, y: Tensor) -> Tensor:
        squares = sum(p.square().sum() for p in m.classifier.parameters())
        return F.cross_entropy(m(x), y) + 0.5 * 0.07 * squares

    callback = train(Step(penalised), weight_decay=0.08)  # the optimizer's 0.01 and the loss's
    assert callback.memory is not None and callback.memory.settings.weight_decay == 0.08
    with pytest.raises(ConfigurationError, match="declared weight_decay"):
        train(weight_decay=0.08)
    train(weight_decay=0.08, newton_steps=2)  # which lead to the declared objective's optimum


@pytest.mark.parametrize("strict", [True, False])
def test_dropout_in_the_trained_path_is_no_memory_s(strict: bool) -> None:
    class Dropped(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.backbone(x), 0.5, training=self.training)
            return self.classifier(h)

    if strict:
        with pytest.raises(ConfigurationError, match="train mode") as caught:
            train(Dropped())
        assert "relative difference 0," not in str(caught.value)  # from the eval mode's gradient
        return
    with pytest.warns(UserWarning, match="train mode"):
        callback = train(Dropped(), strict=False)
    assert len(callback.findings) == 1 and callback.memory is not None
    assert callback.memory.warnings == tuple(callback.findings)


class Returns(Net):
    """A `Net` that returns a function of its head's outputs, and trains on that."""

    def __init__(self, after: Any) -> None:
        super().__init__()
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(x))


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z.softmax(1),
        lambda z: z.log_softmax(1),
        lambda z: 30 * z,
        lambda z: z / 2 + 0.1,
        lambda z: F.normalize(z, dim=1),
        lambda z: z.flip(1),
    ],
)
def test_outputs_that_are_not_the_head_s_are_refused_before_training(after: Any) -> None:
    model = Returns(after)
    before = model.classifier.weight.detach().clone()
    with pytest.raises(ConfigurationError, match="does not return the head's outputs"):
        train(model)
    torch.testing.assert_close(model.classifier.weight.detach(), before.double())


class Binary(Net):
    """A head of one output, trained on -1 and +1."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(6, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.softplus(-batch[1] * self(batch[0]).squeeze(1)).mean()


def test_labels_of_another_coding_are_refused_before_training() -> None:
    x, y = Data().dataset.tensors
    loader = DataLoader(TensorDataset(x, 2.0 * (y > 0) - 1), batch_size=16)
    with pytest.raises(ConfigurationError, match="0 or 1, .* are others: -1"):
        train(zero_head(Binary()), loader, loss="logistic")
    loader = DataLoader(TensorDataset(x, torch.where(y == 0, -100, y)), batch_size=16)
    with pytest.raises(ConfigurationError, match="classes 0 to 2, .* are others: -100"):
        train(loader=loader)
    loader = DataLoader(TensorDataset(x, torch.where(y == 0, torch.nan, 1.0)), batch_size=16)
    with pytest.raises(ConfigurationError, match="targets are NaN"):
        train(loader=loader, loss="squared", model=Binary())


class Manual(Net):
    """Manual optimization with two optimizers; the step comes every ``every`` batches."""

    def __init__(self, every: int = 1, divisor: int = 1, smoothing: float = 0.0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(1, 1)
        self.every, self.divisor, self.smoothing = every, divisor, smoothing

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        head, other = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1], label_smoothing=self.smoothing)
        self.manual_backward(loss / self.divisor)
        if (batch_idx + 1) % self.every == 0 or self.trainer.is_last_batch:
            head.step()
            head.zero_grad()
        other.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        head = torch.optim.SGD(self.classifier.parameters(), lr=0.1)
        return [head, torch.optim.Adam(self.other.parameters(), lr=0.1)]


@pytest.mark.parametrize(("every", "divisor"), [(1, 1), (2, 2), (2, 1)])
def test_manual_optimization_of_the_loss_is_right(every: int, divisor: int) -> None:
    callback = train(Manual(every, divisor), method="muter", horizon="training")
    assert callback.memory is not None and not callback.findings
    steps = 3 if every == 1 else 3 / divisor  # batches of 16, 16 and 9, in rounds of two
    assert callback.memory.settings.horizon == pytest.approx(0.1 * steps / 41)


@pytest.mark.parametrize(("every", "divisor", "smoothing"), [(1, 1, 0.2), (1, 2, 0), (2, 3, 0)])
def test_manual_optimization_of_another_loss_is_refused(
    every: int, divisor: int, smoothing: float
) -> None:
    with pytest.raises(ConfigurationError, match="relative difference|divides its loss"):
        train(Manual(every, divisor, smoothing))


def test_a_step_past_lightning_is_refused() -> None:
    class Past(Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            head, _ = self.optimizers(use_pl_optimizer=False)
            head.zero_grad()
            F.cross_entropy(self(batch[0]), batch[1]).backward()
            head.step()

    with pytest.raises(ConfigurationError, match="without a step that Lightning knows of"):
        train(Past())


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "32-true", "accumulate_grad_batches": 2},
        {"precision": "64-true", "gradient_clip_val": 0.01},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
def test_the_right_loss_passes_in_any_precision(options: dict[str, Any]) -> None:
    x, y = Data().dataset.tensors
    loader = DataLoader(TensorDataset(x.float(), y), batch_size=16, shuffle=True)
    callback = train(loader=loader, trainer={**options, "max_epochs": 4}, method="muter")
    assert callback.memory is not None and callback.findings == []
    assert float(callback.point_weights.sum()) == 41


def test_smoothing_is_seen_in_half_precision() -> None:
    x, y = Data().dataset.tensors
    loader = DataLoader(TensorDataset(x.float(), y), batch_size=16)
    with pytest.raises(ConfigurationError, match="relative difference"):
        train(zero_head(Step(LOSSES["smoothing"])), loader, trainer={"precision": "bf16-mixed"})


def test_a_fitted_batch_s_vanishing_gradient_is_no_difference() -> None:
    class Fitted(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=20.0)

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(12) % 3
    x = 8.0 * F.one_hot(y, 8) + 0.01 * torch.randn(12, 8, generator=generator)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    callback = train(Fitted(), loader, trainer={"max_epochs": 30, "precision": "32-true"})
    assert callback.memory is not None and not callback.findings


def test_the_user_s_hooks_and_parameters_are_left_alone() -> None:
    model = Step(LOSSES["smoothing"])
    with pytest.raises(ConfigurationError):
        train(model)
    assert not any(p._backward_hooks for p in model.parameters())
    model = Net()
    train(model)
    assert not any(p._backward_hooks for p in model.parameters())


class WeightPerturbation(Net):
    """Adversarial weight perturbation: forward and backward at ω + v, the step from ω."""

    pushed: Tensor | None = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        weight = self.classifier.weight
        self.pushed = 0.05 * torch.randn_like(weight)
        weight.data.add_(self.pushed)
        return F.cross_entropy(self(batch[0]), batch[1])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        assert self.pushed is not None
        self.classifier.weight.data.sub_(self.pushed)


class TakenBackLater(WeightPerturbation):
    """The same, taken back when the batch is over."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        Net.optimizer_step(self, *args, **kwargs)

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.pushed is not None
        self.classifier.weight.data.sub_(self.pushed)


class Projected(Net):
    """Weights that are put back into a box before each batch: a lasting change, and no refusal."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.classifier.weight.data.clamp_(-0.3, 0.3)


class TakenBackBeforeTheStep(WeightPerturbation):
    """The same, taken back where gradients are clipped."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        Net.optimizer_step(self, *args, **kwargs)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        assert self.pushed is not None
        self.classifier.weight.data.sub_(self.pushed)


@pytest.mark.parametrize(
    "module", [WeightPerturbation, TakenBackLater, TakenBackBeforeTheStep], ids=lambda m: m.__name__
)
def test_weights_that_the_step_perturbs_are_named(module: type[Net]) -> None:
    """The two gradients agree at the perturbed weights: values tell, gradients do not."""
    with pytest.raises(ConfigurationError, match="AWP"):
        train(module())


@pytest.mark.parametrize("epochs", [1, 6])
def test_weights_that_are_set_before_a_batch_are_not_taken_for_that(epochs: int) -> None:
    """In the end each step leads out of the box again, about to where the last one led."""
    assert train(Projected(), trainer={"max_epochs": epochs}).findings == []
