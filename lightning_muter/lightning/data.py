"""Training points by index, and the removal data module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from lightning_muter.errors import ConfigurationError, RemovalError
from lightning_muter.memory.points import integer, training_indices
from lightning_muter.unlearning.points import Batch, unweighted

__all__ = ["RemovalDataModule", "TrainingPoints", "training_points"]

Collate = Callable[[list[Any]], Any]


class TrainingPoints:
    """A map-style data set read by index in batches, untouched by shuffling or samplers."""

    def __init__(self, dataset: Dataset[Any], collate: Collate | None = None) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ConfigurationError(
                f"{type(dataset).__name__} has no length or no index: a point to forget is named "
                "by its index, so the training data must be a map-style Dataset"
            )
        self.dataset = dataset
        self.collate = collate or default_collate

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some points."""
        batch = self._collated(indices)
        if not isinstance(batch, (list, tuple)) or len(batch) < 2:
            raise ConfigurationError(
                f"a batch is a {type(batch).__name__}; expected (input, target) tensors"
            )
        x, targets = batch[0], batch[1]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ConfigurationError(
                f"inputs are {getattr(x, 'dtype', type(x).__name__)}; the perturbation needs "
                "floating-point tensors: convert in the data set"
            )
        if not isinstance(targets, Tensor):
            raise ConfigurationError(
                f"targets are a {type(targets).__name__}; a tensor of one target a point is "
                "expected: convert them in the data set or in collate_fn"
            )
        return x, targets

    def _collated(self, indices: Sequence[int]) -> Any:
        if type(self.dataset) is TensorDataset and self.collate is default_collate:
            return [tensor[list(indices)] for tensor in self.dataset.tensors]  # no Python loop
        return self.collate([self.dataset[i] for i in indices])

    def known_targets(self) -> Tensor | None:
        """All targets, where they lie in one tensor and no point need be read for them."""
        dataset, positions = self.dataset, None
        while type(dataset) is Subset:
            own = torch.as_tensor(list(dataset.indices))
            positions = own if positions is None else own[positions]
            dataset = dataset.dataset
        if type(dataset) is not TensorDataset or self.collate is not default_collate:
            return None
        targets = dataset.tensors[1] if len(dataset.tensors) > 1 else None
        return targets if targets is None or positions is None else targets[positions]

    def batches(
        self,
        indices: Sequence[int],
        batch_size: int,
        device: torch.device,
        weights: Tensor | None = None,
    ) -> Iterator[Batch]:
        """The points of ``indices`` in order, on ``device``.

        Args:
            indices: which points.
            batch_size: points a batch.
            device: where the batch goes.
            weights: of all points (n,); 1 each by default.
        """
        for start in range(0, len(indices), batch_size):
            some = list(indices[start : start + batch_size])
            x, targets = self.batch(some)
            batch = unweighted(x.to(device), targets.to(device))
            if weights is not None:
                batch = replace(batch, weights=weights[some].to(batch.weights))
            yield batch

    def check(self) -> None:
        """Refuse random augmentation and values that no derivative survives.

        Raises:
            ConfigurationError: the same index gives different tensors, or NaN.
        """
        if len(self) == 0:
            raise ConfigurationError("the training data set is empty")
        for i in sorted({0, len(self) // 2, len(self) - 1}):
            first, second = self.batch([i])[0], self.batch([i])[0]
            if not torch.isfinite(first).all():
                raise ConfigurationError(f"training point {i} has NaN or infinite inputs")
            if not torch.equal(first, second):
                raise ConfigurationError(
                    f"training point {i} gives different tensors when read twice: random "
                    "augmentation has no fixed points to forget; remove the random transforms"
                )


def training_points(source: pl.LightningDataModule | Dataset[Any]) -> TrainingPoints:
    """The training points of a datamodule (by its own train loader) or of a data set."""
    if not isinstance(source, pl.LightningDataModule):
        return TrainingPoints(source)
    source.prepare_data()
    source.setup("fit")
    loader = source.train_dataloader()
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(
            f"train_dataloader gave a {type(loader).__name__}; one DataLoader is needed"
        )
    return TrainingPoints(loader.dataset, loader.collate_fn)


class _Indexed(Dataset[tuple[Tensor, Tensor, int]]):
    def __init__(self, points: TrainingPoints, indices: list[int]) -> None:
        self.points, self.indices = points, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        x, target = self.points.batch([self.indices[position]])
        return x[0], target[0], self.indices[position]


class RemovalDataModule(pl.LightningDataModule):
    """The training points to forget, as (input, target, index) batches; a batch is a request.

    Args:
        datamodule_or_dataset: where the model's training data came from.
        indices: positions in the training data set.
        batch_size: points a request; 1 forgets one after the other, None all at once.

    Raises:
        RemovalError: no index, one that is no integer, or one outside the data set (when the data
            is set up).

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(5, 2), torch.zeros(5))
        >>> len(RemovalDataModule(data, indices=[0, 3]).predict_dataloader())
        1
    """

    def __init__(
        self,
        datamodule_or_dataset: pl.LightningDataModule | Dataset[Any],
        indices: Sequence[int],
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.source = datamodule_or_dataset
        self.indices = training_indices(indices)
        if not self.indices:
            raise RemovalError("indices=[] is an empty request: name at least one training index")
        size = len(self.indices) if batch_size is None else integer(batch_size)
        if size is None or size < 1:
            raise RemovalError(f"batch_size={batch_size!r} must be at least 1, or None for all")
        self.batch_size = size

    def training_points(self) -> TrainingPoints:
        """The whole training set behind the request."""
        return training_points(self.source)

    def remaining(self) -> Subset[Any]:
        """The training set without the points to forget, for a Retrain of one's own."""
        points, gone = self.training_points(), set(self.indices)
        return Subset(points.dataset, [i for i in range(len(points)) if i not in gone])

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor, int]]:
        points = self.training_points()
        outside = [i for i in self.indices if not 0 <= i < len(points)]
        if outside:
            raise RemovalError(
                f"indices {outside} are out of range: the training set has {len(points)} points"
            )
        dataset = _Indexed(points, self.indices)
        # every process sees the same request (Lightning leaves a DistributedSampler alone)
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, num_replicas=1, rank=0, shuffle=False
        )
        generator = torch.Generator()  # of its own: the global random state is the user's
        return DataLoader(dataset, batch_size=self.batch_size, sampler=sampler, generator=generator)
