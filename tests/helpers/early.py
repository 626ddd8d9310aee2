"""A logistic regression that stops long before its optimum, by steps through the same batches."""

from __future__ import annotations

import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import L2Ball, MUterCallback, Trainer

ROWS = 40


class Early(pl.LightningModule):
    """Logistic regression by gradient descent that stops long before its optimum."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 1, bias=False, dtype=torch.float64)
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]).squeeze(1), batch[1])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=0.01)
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.02, weight_decay=0.01)
        heavy = torch.optim.SGD(self.parameters(), lr=0.004, momentum=0.8, weight_decay=0.01)
        return [heavy], [torch.optim.lr_scheduler.ExponentialLR(heavy, gamma=0.97)]


def data(keep: list[int] | None = None) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(0, -1.5, 6, dtype=torch.float64)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64) * scale
    y = (x @ torch.ones(6, dtype=torch.float64) + 0.1 > 0).double()
    rows = list(range(ROWS)) if keep is None else keep
    return TensorDataset(x[rows], y[rows])


def fit(
    keep: list[int] | None = None, optimizer: str = "sgd", **options: object
) -> tuple[Trainer, Early]:
    """Small steps through the same batches in the same order: Retrain has no noise of its own."""
    model, points = Early(optimizer), data(keep)
    callback = MUterCallback(
        L2Ball(0.1), head="head", loss="logistic", **{"attack_steps": 5, **options}
    )
    trainer = Trainer(max_epochs=20, callbacks=[callback], **QUIET)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*log_every_n_steps.*")
        trainer.fit(model, DataLoader(points, batch_size=2))
    return trainer, model
