"""Data of the experiments: files from a folder, scikit-learn's own, or torchvision's download."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    of the data file; ``points`` keeps so many training points, drawn at random, and ``test_points``
    the first of the test.
    """

    def __init__(
        self,
        batch_size: int = 128,
        targets: str = "class",
        path: str | None = None,
        points: int | None = None,
        test_points: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.targets, self.path = batch_size, targets, path
        self.points, self.test_points = points, test_points
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
            test_x, test_y = test_x[: self.test_points], test_y[: self.test_points]
            if self.targets == "sign":
                y, test_y = 2.0 * y.double() - 1, 2.0 * test_y.double() - 1
            self._parts = [x, y, test_x, test_y]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        dataset = TensorDataset(*self._parts[:2])
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*self._parts[2:]), batch_size=500)


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


class CIFAR10(Arrays):
    """Images (n, 3, 32, 32) in [0, 1] of some classes, numbered in the order given.

    ``flip`` mirrors half of each training batch, for pretraining: what is to be forgotten must
    not pass through random transforms.
    """

    def __init__(
        self,
        classes: Sequence[int] = tuple(range(10)),
        flip: bool = False,
        batch_size: int = 128,
        path: str | None = None,
        points: int | None = None,
        test_points: int | None = None,
    ) -> None:
        super().__init__(batch_size, "class", path, points, test_points)
        self.classes, self.flip = list(classes), flip

    def read(self) -> list[Tensor]:
        found = []
        for images, labels in self._images():
            for_class = {c: k for k, c in enumerate(self.classes)}
            found += [images.float() / 255, torch.tensor([for_class[int(c)] for c in labels])]
        return found

    def _images(self) -> list[tuple[Tensor, Tensor]]:
        source = file("cifar10_jpeg.npz", self.path)
        if source is not None:
            with np.load(source) as arrays:
                return [self._decode(arrays, kind) for kind in ("train", "test")]
        from torchvision.datasets import CIFAR10 as Download

        sets = [Download("data", train=train, download=True) for train in (True, False)]
        both = [(torch.tensor(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for s in sets]
        keep = [torch.isin(labels, torch.tensor(self.classes)) for _, labels in both]
        return [(x[k], y[k]) for (x, y), k in zip(both, keep, strict=True)]

    def _decode(self, arrays: Any, kind: str) -> tuple[Tensor, Tensor]:
        from PIL import Image

        stream, ends = arrays[f"{kind}_jpeg"], arrays[f"{kind}_offsets"]
        labels = arrays[f"{kind}_labels"]
        wanted = np.flatnonzero(np.isin(labels, self.classes))
        files = (io.BytesIO(stream[ends[i] : ends[i + 1]].tobytes()) for i in wanted)
        images = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
        return torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(labels[wanted])

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        if self.flip and self.trainer is not None and self.trainer.training:
            mirrored = torch.rand(len(batch[0]), 1, 1, 1, device=batch[0].device) < 0.5
            batch[0] = torch.where(mirrored, batch[0].flip(3), batch[0])
        return batch


class Digits(Arrays):
    """scikit-learn's 8×8 digits, flattened, in [0, 1]; every fifth is for the test."""

    def read(self) -> list[Tensor]:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images / 16.0), torch.tensor(labels).long()
        test = torch.arange(len(x)) % 5 == 0
        return [x[~test], y[~test], x[test], y[test]]
