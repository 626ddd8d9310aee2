"""Data of the experiments: files from a folder, scikit-learn's own, or torchvision's download."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

#: the folder of data files, where no path is given (`lightning-muter evaluate --data` sets it)
VARIABLE = "MUTER_DATA"


def file(name: str, path: str | None) -> Path | None:
    """A data file in ``path``, or in the folder of the environment variable."""
    folder = path or os.environ.get(VARIABLE)
    found = Path(folder) / name if folder else None
    return found if found is not None and found.exists() else None


class Arrays(pl.LightningDataModule, ABC):
    """Train and test tensors; a subclass reads them in ``read``.

    ``targets="sign"`` makes -1 and 1 of two classes, for ridge regression; ``path`` is the folder
    of the data file; ``points`` keeps so many training points, drawn at random.
    """

    def __init__(
        self,
        batch_size: int = 128,
        targets: str = "class",
        path: str | None = None,
        points: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.targets, self.path, self.points = batch_size, targets, path, points
        self._parts: list[Tensor] = []

    @abstractmethod
    def read(self) -> list[Tensor]:
        """Training inputs and labels, test inputs and labels."""

    def setup(self, stage: str) -> None:
        if not self._parts:
            x, y, test_x, test_y = self.read()
            if self.points is not None:
                some = torch.randperm(len(x))[: self.points]
                x, y = x[some], y[some]
            if self.targets == "sign":
                y, test_y = 2.0 * y.double() - 1, 2.0 * test_y.double() - 1
            self._parts = [x, y, test_x, test_y]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        dataset = TensorDataset(*self._parts[:2])
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*self._parts[2:]), batch_size=4096)


class MNISTb(Arrays):
    """Digits 1 (label 0) and 7 (label 1), flattened, in [0, 1]."""

    def read(self) -> list[Tensor]:
        found = []
        for images, labels in self._images():
            keep = (labels == 1) | (labels == 7)
            found += [images[keep].reshape(-1, 784).double() / 255, (labels[keep] == 7).long()]
        return found

    def _images(self) -> list[tuple[Tensor, Tensor]]:
        source = file("mnist.npz", self.path)
        if source is not None:
            with np.load(source) as arrays:
                return [
                    (torch.tensor(arrays[f"{k}_images"]), torch.tensor(arrays[f"{k}_labels"]))
                    for k in ("train", "test")
                ]
        from torchvision.datasets import MNIST

        sets = [MNIST("data", train=train, download=True) for train in (True, False)]
        return [(s.data, s.targets) for s in sets]


class Covtype(Arrays):
    """The 10,000-row sample, shuffled once, type 2 (15%) against the rest, columns in [0, 1]."""

    def read(self) -> list[Tensor]:
        source = file("covtype10k.npz", self.path)
        if source is None:
            raise FileNotFoundError(f"covtype10k.npz: say --data, or set {VARIABLE}")
        with np.load(source) as arrays:
            x = torch.tensor(arrays["features"]).double()
            y = (torch.tensor(arrays["cover_type"]) == 2).long()
        low, high = x.amin(dim=0), x.amax(dim=0)
        x = (x - low) / (high - low).clamp(min=1)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, test = order[:8000], order[8000:]
        return [x[train], y[train], x[test], y[test]]


class Digits(Arrays):
    """scikit-learn's 8×8 digits, flattened, in [0, 1]; every fifth is for the test."""

    def read(self) -> list[Tensor]:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images / 16.0), torch.tensor(labels).long()
        test = torch.arange(len(x)) % 5 == 0
        return [x[~test], y[~test], x[test], y[test]]
