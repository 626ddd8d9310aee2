"""A module and a datamodule for the command line: see digits.yaml."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class DigitClassifier(pl.LightningModule):
    """A linear classifier of 8 x 8 digits."""

    def __init__(self, lr: float = 0.1, weight_decay: float = 1e-3) -> None:
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class DigitsData(pl.LightningDataModule):
    """scikit-learn's digits, every fifth image held out."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
        y = torch.tensor(labels)
        held = torch.arange(len(x)) % 5 == 0
        self.train, self.held = TensorDataset(x[~held], y[~held]), TensorDataset(x[held], y[held])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.held, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader
