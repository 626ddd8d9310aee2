"""The small problems that many tests share: a network, its data, a trainer that says nothing."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import TRADES, L2Ball, MUterCallback, Trainer, UnlearningMemory

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "precision": "64-true",
}


class Net(pl.LightningModule):
    """A tanh network with a three-class head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.Tanh())
        self.classifier = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-2)


class Traded(Net):
    """A `Net` whose training step is TRADES' own loss."""

    def __init__(self, objective: TRADES) -> None:
        super().__init__()
        self.objective = objective

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.objective.loss(self, batch)


class Data(pl.LightningDataModule):
    """Random points of three classes."""

    def __init__(self, n: int = 41, keep: list[int] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        y = torch.randint(0, 3, (n,), generator=generator)
        x = torch.randn(n, 8, generator=generator, dtype=torch.float64)
        x = x + 1.5 * F.one_hot(y, 8)
        if keep is not None:
            x, y = x[keep], y[keep]
        self.dataset = TensorDataset(x, y)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=16, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=16)


def fit(
    data: Data | None = None, trainer_class: type[pl.Trainer] = Trainer, **options: Any
) -> tuple[Any, MUterCallback, Net, Data]:
    pl.seed_everything(0, verbose=False)
    model, data = Net(), data or Data()
    callback = MUterCallback(
        **{"threat": L2Ball(0.5), "head": "classifier", "newton_steps": 15, **options}
    )
    trainer = trainer_class(max_epochs=1, callbacks=[callback], **QUIET)
    trainer.fit(model, data)
    return trainer, callback, model, data


def memory_of(callback: MUterCallback) -> UnlearningMemory:
    assert callback.memory is not None
    return callback.memory


def rows_of(seed: int, k: int, p: int) -> torch.Tensor:
    """Random rows (k, p), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, p, generator=generator, dtype=torch.float64)


def trained_on(devices: int, **options: Any) -> tuple[Trainer, MUterCallback, Data]:
    """A trainer of some processes after a fit that Newton's steps alone moved, with its memory."""
    pl.seed_everything(0)
    model, data = Net(), Data(41)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=1e-2)
    model.configure_optimizers = lambda: sgd  # type: ignore[method-assign]
    callback = MUterCallback(threat=L2Ball(0.5), head="classifier", newton_steps=2, **options)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = Trainer(
        max_epochs=1, callbacks=[callback], devices=devices, strategy=strategy, **QUIET
    )
    trainer.fit(model, data)
    return trainer, callback, data


def leave_group() -> None:
    """The end of a worker: a process that just ends can abort in the threads of gloo's group."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
