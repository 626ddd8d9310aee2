"""Linear models whose robust objective has a closed form, small enough for other solvers."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import L2Ball, LinfBall, MUterCallback, Threat, Trainer

N, FEATURES, LAMBDA = 60, 4, 0.05
L2, LINF = L2Ball(0.4), LinfBall(0.15, bandwidth=0.02)
OUTPUTS = {"logistic": 1, "squared": 1, "cross_entropy": 2}


class Linear(pl.LightningModule):
    """A linear model of one of the losses that have a closed form."""

    def __init__(self, loss: str, outputs: int | None = None, weight_decay: float = LAMBDA) -> None:
        super().__init__()
        self.loss, self.weight_decay = loss, weight_decay
        self.head = nn.Linear(FEATURES, outputs or OUTPUTS[loss])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        z, y = self(batch[0]), batch[1]
        if self.loss == "cross_entropy":
            return F.cross_entropy(z, y)
        if self.loss == "squared":
            return 0.5 * (z.squeeze(1) - y).square().mean()
        return F.binary_cross_entropy_with_logits(z.squeeze(1), y.to(z))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=self.weight_decay)


class LinearData(pl.LightningDataModule):
    """Two overlapping clouds; for regression the labels are numbers around -1 and 1."""

    def __init__(self, loss: str, n: int = N, seed: int = 3, share: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(0, 2, (n,), generator=generator)
        x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
        x = x + (y.unsqueeze(1) - 0.5) * share
        if loss == "squared":
            noise = 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
            self.dataset = TensorDataset(x, 2.0 * y - 1 + noise)
        else:
            self.dataset = TensorDataset(x, y)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=16, shuffle=True)


def fit_linear(
    loss: str = "logistic",
    threat: Threat = L2,
    module: Linear | None = None,
    data: LinearData | None = None,
    **options: Any,
) -> tuple[Trainer, MUterCallback, Linear, LinearData]:
    """A linear model near its optimum, with its memory."""
    pl.seed_everything(0, verbose=False)
    module, data = module or Linear(loss), data or LinearData(loss)
    options = {"head": "head", "loss": loss, "newton_steps": 12, "attack_steps": 3, **options}
    callback = MUterCallback(threat, **options)
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    trainer.fit(module, data)
    return trainer, callback, module, data
