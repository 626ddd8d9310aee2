"""Torch's loss modules as losses of a point: closed forms, what is refused, and whole runs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET, memory_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    TRADES,
    ConfigurationError,
    L2Ball,
    MUterCallback,
    RemovalDataModule,
    Trainer,
    UnlearningMemory,
    total_hessian,
)
from lightning_muter.objectives.resolve import resolve_loss
from lightning_muter.objectives.torch_losses import TorchLoss

N, D, C = 60, 5, 3


def targets(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64)
    return {"classes": x.argmax(dim=1), "labels": (x > 0.3).double(), "numbers": x}[kind]


CASES: dict[str, tuple[nn.Module, str]] = {
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), "classes"),
    "cross entropy": (nn.CrossEntropyLoss(), "classes"),
    "labels": (nn.BCEWithLogitsLoss(), "labels"),
    "weighted labels": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.5])), "labels"),
    "several outputs": (nn.MSELoss(), "numbers"),
    "a sum of labels": (nn.BCEWithLogitsLoss(reduction="sum"), "labels"),
    "a sum of outputs": (nn.MSELoss(reduction="sum"), "numbers"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mean_of_point_losses_with_its_derivatives(case: str) -> None:
    module, kind = CASES[case]
    y, loss = targets(kind), resolve_loss(module)
    z = torch.randn(N, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    total = loss(z, y).sum() if loss.summed else loss(z, y).mean()
    torch.testing.assert_close(total, module.double()(z, y), rtol=1e-12, atol=0)
    r, curvature = loss.derivatives(z, y)
    s = curvature.dense()
    for i in range(4):

        def one(point: Tensor, i: int = i) -> Tensor:
            return module(point[None], y[i : i + 1])

        gradient = torch.autograd.functional.jacobian(one, z[i])
        hessian = torch.autograd.functional.hessian(one, z[i])
        torch.testing.assert_close(r[i], gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(s[i], hessian, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_value_that_is_read_back(case: str) -> None:
    value = TorchLoss.of(CASES[case][0])
    assert TorchLoss.from_dict(value.to_dict()) == value
    with pytest.raises((ValueError, KeyError)):
        TorchLoss.from_dict({**value.to_dict(), "other": 1})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "no sum over points"),
        (nn.HuberLoss(), "expected one of"),
        (nn.BCELoss(), "expected one of"),
    ],
)
def test_what_is_no_mean_over_points_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MUterCallback(L2Ball(0.3), head="head", loss=module)


def test_a_module_that_reduces_nothing_is_a_function() -> None:
    y = targets("classes")
    z = torch.randn(N, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = resolve_loss(nn.CrossEntropyLoss(reduction="none"))
    torch.testing.assert_close(loss(z, y), resolve_loss("cross_entropy")(z, y))


class Net(pl.LightningModule):
    """A linear head on what it is given, trained with a loss object of its own."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion, self.head = criterion, nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=0.05, weight_decay=2e-2)


def data(kind: str, gone: tuple[int, ...] = ()) -> TensorDataset:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kept = [i for i in range(N) if i not in gone]
    return TensorDataset(x[kept], targets(kind)[kept])


def trained(case: str, gone: tuple[int, ...] = (), **options: Any) -> tuple[Any, ...]:
    module, kind = CASES[case]
    torch.manual_seed(0)
    net, points = Net(module).double(), data(kind, gone)
    threat = L2Ball(0.2, temperature=0.05) if case == "several outputs" else L2Ball(0.2)
    callback = MUterCallback(threat, head="head", loss=module, newton_steps=25, **options)
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    trainer.fit(net, DataLoader(points, batch_size=20))
    return trainer, callback, net, points


@pytest.mark.parametrize("case", ["smoothed", "labels", "weighted labels", "several outputs"])
def test_a_run_ends_near_its_retrain(case: str, tmp_path: Any) -> None:
    gone = (8, 17)
    trainer, callback, net, points = trained(case, memory_dir=str(tmp_path))
    truth = memory_of(trained(case, gone)[1]).omega
    none = torch.linalg.vector_norm(memory_of(callback).omega - truth)
    trainer.unlearn(RemovalDataModule(points, indices=list(gone)))
    left = torch.linalg.vector_norm(memory_of(callback).omega - truth)
    assert left < 0.1 * none
    found = UnlearningMemory.load(tmp_path)  # the loss is rebuilt from its own arguments
    assert found.settings == memory_of(callback).settings


@pytest.mark.parametrize("case", ["smoothed", "labels", "weighted labels", "several outputs"])
def test_the_total_hessian_is_that_of_the_robust_loss(case: str) -> None:
    """Central differences of the robust gradient, δ* solved again on both sides."""
    module, kind = CASES[case][0].double(), CASES[case][1]
    torch.manual_seed(0)
    net, points = Net(module).double(), data(kind)
    batch = points[:8]

    def robust_gradient(omega: Tensor) -> Tensor:
        with torch.no_grad():
            net.head.weight.copy_(omega[: C * D].reshape(C, D))
            net.head.bias.copy_(omega[C * D :])
        x, y = batch
        delta = torch.zeros_like(x)
        for _ in range(500):
            inputs = (x + delta).requires_grad_(True)
            (g,) = torch.autograd.grad(module(net(inputs), y) * len(x), inputs)
            delta = 0.2 * g / torch.linalg.vector_norm(g, dim=1, keepdim=True)
        loss = module(net(x + delta), y) * len(x)
        found = torch.autograd.grad(loss, [net.head.weight, net.head.bias])
        return torch.cat([one.reshape(-1) for one in found])

    omega = torch.cat([net.head.weight.detach().reshape(-1), net.head.bias.detach()])
    v = torch.randn(len(omega), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    step = 1e-5
    numeric = (robust_gradient(omega + step * v) - robust_gradient(omega - step * v)) / (2 * step)
    robust_gradient(omega)
    matrix = total_hessian(net, batch, L2Ball(0.2), head="head", loss=module)
    torch.testing.assert_close(matrix @ v, numeric, rtol=1e-6, atol=1e-7)


# --- the sum over a batch --------------------------------------------------------------------


class Scaled(Net):
    """The same with another optimizer."""

    def __init__(self, criterion: nn.Module, **options: Any) -> None:
        super().__init__(criterion)
        self.options = options

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), **self.options)


def fitted(
    reduction: str, lr: float, weight_decay: float, batch_size: int = 20, drop_last: bool = True,
    accumulate: int = 1, **options: Any,
) -> UnlearningMemory:  # fmt: skip
    torch.manual_seed(0)
    module = nn.CrossEntropyLoss(label_smoothing=0.1, reduction=reduction)
    net = Scaled(module, lr=lr, weight_decay=weight_decay).double()
    callback = MUterCallback(L2Ball(0.2), head="head", loss="criterion", **options)
    trainer = Trainer(
        max_epochs=4, callbacks=[callback], accumulate_grad_batches=accumulate, **QUIET
    )
    loader = DataLoader(data("classes"), batch_size, drop_last=drop_last)
    trainer.fit(net, loader)
    return memory_of(callback)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("horizon", ["training", None])
def test_a_sum_is_the_mean_at_a_larger_rate_and_a_smaller_decay(
    accumulate: int, horizon: str | None
) -> None:
    options = {"horizon": horizon, "accumulate": accumulate}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training stopped about")
        found = fitted("sum", 0.01, 0.4, **options)
        expected = fitted("mean", 0.2, 0.02, **options)
    torch.testing.assert_close(found.omega, expected.omega)
    assert found.settings.weight_decay == pytest.approx(0.02)
    assert found.settings.horizon == pytest.approx(expected.settings.horizon)
    for one in ("gradient", "residual_gradient"):
        torch.testing.assert_close(getattr(found, one), getattr(expected, one))


def test_a_sum_without_decay_takes_batches_of_any_size() -> None:
    found = fitted("sum", 0.01, 0.0, batch_size=25, drop_last=False, horizon="training")
    # 25, 25 and 10 points a step, four epochs
    assert found.settings.horizon == pytest.approx(4 * 0.01)
    assert found.settings.weight_decay == 0.0


@pytest.mark.parametrize("batch_size", [25, 60])
def test_a_sum_with_a_decay_and_other_batches_is_refused(batch_size: int) -> None:
    with pytest.raises(ConfigurationError, match="it counts once a batch"):
        fitted("sum", 0.01, 0.4, batch_size=batch_size, drop_last=False)


def test_trades_with_a_sum_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="reduction='mean' for both"):
        MUterCallback(
            L2Ball(0.2), head="head", loss=nn.CrossEntropyLoss(reduction="sum"), objective=TRADES()
        )


@pytest.mark.parametrize("value", [2.0, -1.0])
def test_labels_that_are_no_shares_are_refused(value: float) -> None:
    net, points = Net(CASES["labels"][0]).double(), data("labels")
    points.tensors[1][5, 1] = value
    callback = MUterCallback(L2Ball(0.2), head="head", loss=CASES["labels"][0])
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    with pytest.raises(ConfigurationError, match=r"in \[0, 1\]"):
        trainer.fit(net, DataLoader(points, batch_size=20))


def test_another_smoothing_than_training_s_is_refused() -> None:
    net, points = Net(CASES["smoothed"][0]).double(), data("classes")
    callback = MUterCallback(L2Ball(0.2), head="head", loss=nn.CrossEntropyLoss())
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    with pytest.raises(ConfigurationError, match="gradient"):
        trainer.fit(net, DataLoader(points, batch_size=20))
