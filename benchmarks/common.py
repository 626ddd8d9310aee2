"""Data and modules that the benchmark scripts share."""

from __future__ import annotations

import argparse
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter.evaluation import Cell, Table


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with ``--data``, the folder that holds mnist.npz."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", default=os.environ.get("LIGHTNING_MUTER_DATA", "data"))
    return parser


def cifar10(data: str, count: int) -> tuple[Tensor, Tensor]:
    """The first training images in [0, 1] (count, 3, 32, 32) float32, and their labels."""
    with np.load(Path(data) / "cifar10_jpeg.npz") as file:
        stream, ends, labels = (file[f"train_{k}"] for k in ("jpeg", "offsets", "labels"))
    files = (io.BytesIO(stream[ends[i] : ends[i + 1]].tobytes()) for i in range(count))
    images = np.stack([np.asarray(Image.open(one).convert("RGB")) for one in files])
    return torch.tensor(images).permute(0, 3, 1, 2) / 255, torch.tensor(labels[:count]).long()


def mnist(data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [0, 1] (n, 28, 28) float64 and labels, train and test."""
    with np.load(Path(data) / "mnist.npz") as file:
        train, test = file["train_images"], file["test_images"]
        labels = [torch.tensor(file[k]).long() for k in ("train_labels", "test_labels")]
    images = [torch.tensor(x).double() / 255 for x in (train, test)]
    return images[0], labels[0], images[1], labels[1]


def one_or_seven(data: str) -> tuple[Tensor, Tensor]:
    """MNIST-b: digits 1 (0) and 7 (1), flattened."""
    x, y, _, _ = mnist(data)
    keep = (y == 1) | (y == 7)
    return x[keep].reshape(-1, 784), (y[keep] == 7).long()


def one_or_seven_28(folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits 1 (0) and 7 (1), flattened: train and test."""
    x, y, tx, ty = mnist(folder)
    keep, test = (y == 1) | (y == 7), (ty == 1) | (ty == 7)
    return (
        x[keep].reshape(-1, 784),
        (y[keep] == 7).long(),
        tx[test].reshape(-1, 784),
        (ty[test] == 7).long(),
    )


def keep(row: dict[str, Any], file: Path | None) -> None:
    """Print a row of a distance, and add it to a table of the documentation."""
    print(json.dumps(row), flush=True)
    if file is None:
        return
    seed, removed, share = row["seed"], row["removed"], row["removed"] / row["n"]
    step = row["step"].replace(" ", "_")
    table, values = Table(file), {step: row["relative_to_none"], "none": 1.0}
    new = {k: v for k, v in values.items() if not table.has(seed, removed, k)}
    table.add(Cell(seed, removed, share, k, "distance_relative", v) for k, v in new.items())


class Points(pl.LightningDataModule):
    """A TensorDataset's train loader."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int = 128) -> None:
        super().__init__()
        self.dataset, self.size = TensorDataset(x, y), batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.dataset, batch_size=self.size, shuffle=True)


class Logistic(pl.LightningModule):
    """Logistic regression without a bias."""

    def __init__(self, lr: float = 0.1, weight_decay: float = 1e-3, features: int = 784) -> None:
        super().__init__()
        self.head = nn.Linear(features, 1, bias=False)
        self.lr, self.weight_decay = lr, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]).squeeze(1), batch[1].to(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
