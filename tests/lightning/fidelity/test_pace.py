"""What a Retrain has as many of, epochs or steps, and where a request then ends."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET, memory_of
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import L2Ball, MUterCallback, RemovalDataModule, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*|.*many workers")
N, GONE = 40, [3, 11, 20, 31]


class Linear(pl.LightningModule):
    """A linear map, whose robust squared loss at a tiny radius is quadratic."""

    def __init__(self, lr: float, reduction: str) -> None:
        super().__init__()
        self.head, self.lr = nn.Linear(4, 1), lr
        self.criterion = nn.MSELoss(reduction=reduction)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]).squeeze(1), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), self.lr)


def points(gone: list[int] | None = None) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]).double() + 0.3 * x[:, 0] ** 2
    keep = [i for i in range(N) if i not in (gone or [])]
    return TensorDataset(x[keep], y[keep])


def run(
    gone: list[int] | None = None, size: int = N, reduction: str = "mean", **trainer: Any
) -> tuple[Trainer, MUterCallback, pl.LightningModule]:
    torch.manual_seed(0)
    model = Linear(0.005 if reduction == "mean" else 0.005 / N, reduction).double()
    callback = MUterCallback(L2Ball(1e-7), head="head", loss="criterion", horizon="training")
    made = Trainer(callbacks=[callback], **{**QUIET, **trainer})
    made.fit(model, DataLoader(points(gone), batch_size=size))
    return made, callback, model


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_full_batches_are_as_many_steps(reduction: str) -> None:
    trainer, callback, _ = run(reduction=reduction, max_epochs=60)
    before = memory_of(callback)
    truth = memory_of(run(GONE, reduction=reduction, max_epochs=60)[1]).omega
    trainer.unlearn(RemovalDataModule(points(), indices=GONE[:1]))
    trainer.unlearn(RemovalDataModule(points(), indices=GONE[1:]))
    none = float((before.omega - truth).norm())
    assert float((memory_of(callback).omega - truth).norm()) < 0.02 * none
    assert before.start is not None
    assert before.start.flow.pace == ("steps" if reduction == "mean" else "epochs")
    # a rebase keeps the length that the training of the points left has
    trainer.rebase(points(GONE))
    share = (N - len(GONE)) / N if reduction == "mean" else 1.0
    assert before.settings.horizon is not None
    after = memory_of(callback).settings.horizon
    assert after == pytest.approx(before.settings.horizon / share)


def test_a_number_of_steps_is_as_many_steps() -> None:
    for options in ({"max_steps": 60, "max_epochs": -1}, {"max_steps": 7, "max_epochs": 60}):
        memory = memory_of(run(size=10, **options)[1])
        assert memory.start is not None and memory.start.flow.pace == "steps"
    memory = memory_of(run(size=10, max_epochs=3, max_steps=1000)[1])
    assert memory.start is not None and memory.start.flow.pace == "epochs"


def test_a_training_that_stops_early_is_as_long_as_it_was() -> None:
    class Scored(Linear):
        def on_train_epoch_end(self) -> None:
            self.log("score", float(self.current_epoch))

    torch.manual_seed(0)
    stopping = EarlyStopping("score", patience=2, check_on_train_epoch_end=True)
    callback = MUterCallback(L2Ball(1e-7), head="head", loss="criterion", horizon="training")
    trainer = Trainer(max_epochs=60, callbacks=[stopping, callback], **QUIET)
    trainer.fit(Scored(0.005, "mean").double(), DataLoader(points(), batch_size=10))
    memory = memory_of(callback)  # epochs 0, 1 and 2, of four steps each
    assert memory.settings.horizon == pytest.approx(3 * 4 * 0.005 / N)
    assert memory.start is not None and memory.start.flow.pace == "epochs"
