"""Training points by index, and the removal data module."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

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

from lightning_muter.arguments import integer
from lightning_muter.errors import ConfigurationError, RemovalError
from lightning_muter.lightning.flavour import pl, refuse_other
from lightning_muter.memory.ids import id_texts
from lightning_muter.memory.points import digests_of, listing, training_indices
from lightning_muter.models import BatchForm, Beside
from lightning_muter.models.batches import FOUND, Where
from lightning_muter.unlearning.points import Batch, unweighted
from lightning_muter.unlearning.serving import RemovalBatch

__all__ = ["RemovalDataModule", "TrainingPoints", "training_points"]

_BLOCK = 512

Collate = Callable[[list[Any]], Any]


class TrainingPoints:
    """A map-style data set read by index in batches, untouched by shuffling or samplers.

    ``loader`` is the one that it came with, where there was one.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Collate | None = None,
        form: BatchForm = FOUND,
        loader: DataLoader[Any] | None = None,
    ) -> None:
        named = getattr(type(dataset), "__getitem__", None) not in (None, Dataset.__getitem__)
        if not named or not hasattr(dataset, "__len__"):
            raise ConfigurationError(
                f"{type(dataset).__name__} has no length or no index: a point to forget is named "
                "by its index, so the training data must be a map-style Dataset"
            )
        self.dataset = dataset
        self.collate = collate or default_collate
        self.form = form
        self.loader = loader

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def _columns(self) -> tuple[Tensor, ...] | None:
        """The tensors whose rows the points are, where they need no collating."""
        if type(self.dataset) is TensorDataset and self.collate is default_collate:
            return self.dataset.tensors
        return None

    def settled(self) -> TrainingPoints:
        """The same points; of the entries that forward could take, those that there are."""
        if not self.form.taken or not len(self):
            return self
        return TrainingPoints(self.dataset, self.collate, self.form.within(self.collated([0])))

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Beside]:
        """Inputs and targets of some points, and what else forward takes of them."""
        return self.form.read(self.collated(indices))

    def lying(self, block: range) -> tuple[Tensor, Tensor, Beside]:
        """As `batch`, of neighbours: the data set's own memory where they lie in it, to read."""
        columns = self._columns
        if columns is None:
            return self.batch(block)
        return self.form.read([one[block.start : block.stop] for one in columns])

    def finite(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Beside]:
        """As `batch`, of points whose inputs are numbers.

        Raises:
            ConfigurationError: with the points whose inputs are NaN or infinite.
        """
        x, targets, beside = self.batch(indices)
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            whole = torch.isfinite(x).reshape(len(x), -1).all(dim=1).tolist()
            bad = [i for i, good in zip(indices, whole, strict=True) if not good]
            raise ConfigurationError(
                f"training points {listing(bad)} have NaN or infinite inputs: mend them, or take "
                "them out of the data set (a sampler that leaves them out is not enough)"
            )
        return x, targets, beside

    def collated(self, indices: Sequence[int]) -> Any:
        """Some points as a batch in the loader's own shape."""
        columns = self._columns
        if columns is not None:
            return [_taken(tensor, indices) for tensor in columns]  # no Python loop
        points = [self.dataset[i] for i in indices]
        if self.collate is not default_collate:
            return self.collate(points)
        try:
            return default_collate(points)
        except TypeError as error:
            raise ConfigurationError(
                f"default_collate makes no batch of the data set's {type(points[0]).__name__} "
                f"({error}): give the datamodule, whose loader has the collate_fn"
            ) from error

    def known_targets(self) -> Tensor | None:
        """All targets, where they lie in one tensor and no point need be read for them."""
        dataset, positions = self.dataset, None
        if not self.form.is_pair(()):
            return None
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
            x, targets, beside = self.finite(some)
            named = torch.tensor(some, device=device)
            batch = unweighted(x.to(device), targets.to(device), beside.to(device))
            batch = replace(batch, indices=named)
            if weights is not None:
                batch = replace(batch, weights=weights[some].to(batch.weights))
            yield batch

    def digests(self, key: bytes, indices: Sequence[int]) -> list[bytes]:
        """Keyed digests of some points, read in blocks."""
        found: list[bytes] = []
        for start in range(0, len(indices), _BLOCK):
            with torch.inference_mode(False):
                found += digests_of(key, *self.batch(indices[start : start + _BLOCK]))
        return found

    def check_positions(self, indices: Sequence[int]) -> None:
        """Refuse positions that the data set does not have.

        Raises:
            RemovalError: with the offending values.
        """
        n = len(self)
        outside = [i for i in indices if not 0 <= i < n]
        if outside:
            whose = ""
            if isinstance(self.dataset, Subset):
                whose = " (positions in the Subset that was given, not in its base data set)"
            raise RemovalError(
                f"indices {listing(outside)} are out of range: the data set has {n} "
                f"points, 0 to {n - 1}{whose}"
            )

    def check(self) -> None:
        """Refuse random augmentation and values that no derivative survives.

        Raises:
            ConfigurationError: the same index gives different tensors, or NaN.
        """
        if len(self) == 0:
            raise ConfigurationError("the training data set is empty")
        for i in sorted({0, len(self) // 2, len(self) - 1}):
            first, second = self.finite([i])[0], self.finite([i])[0]
            if not torch.equal(first, second):
                raise ConfigurationError(
                    f"training point {i} gives different tensors when read twice: random "
                    "augmentation has no fixed points to forget; remove the random transforms"
                )


def _taken(tensor: Tensor, indices: Sequence[int]) -> Tensor:
    """Rows of a tensor in memory of their own; those next to each other without a look-up."""
    if isinstance(indices, range) and indices.step == 1:
        return tensor[indices.start : indices.stop].clone()
    return tensor[list(indices)]


def training_points(
    source: pl.LightningDataModule | Dataset[Any], form: BatchForm = FOUND
) -> TrainingPoints:
    """The training points of a datamodule (by its own train loader) or of a data set."""
    if not isinstance(source, pl.LightningDataModule):
        return TrainingPoints(source, form=form)
    source.prepare_data()
    source.setup("fit")
    loader = source.train_dataloader()
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(
            f"train_dataloader gave a {type(loader).__name__}; one DataLoader is needed"
        )
    return TrainingPoints(loader.dataset, loader.collate_fn, form, loader)


class _Indexed(Dataset[int]):
    """Positions of a request; `removal` makes the batch of some of them."""

    def __init__(self, points: TrainingPoints, indices: list[int], names: list[int] | None) -> None:
        self.points, self.indices = points, indices
        self.names = indices if names is None else names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> int:
        return range(len(self))[position]

    def removal(self, positions: Sequence[int]) -> RemovalBatch:
        x, targets, beside = self.points.batch([self.indices[k] for k in positions])
        names = torch.tensor([self.names[k] for k in positions])
        return RemovalBatch(x, targets, names, beside.entries())


def _keys(ids: Sequence[str | int]) -> list[str]:
    keys = id_texts([ids] if isinstance(ids, (str, int)) else ids)
    twice = [key for key, times in Counter(keys).items() if times > 1]
    if twice:
        raise RemovalError(f"ids {listing(twice)} occur twice in the request: name each once")
    return keys


class RemovalDataModule(pl.LightningDataModule):
    """The training points to forget, as (input, target, index) batches; a batch is a request.

    The data set may have lost rows since training, gained some, or been reordered. The row at a
    position is looked up by its content, and the memory's own index is what is recorded.

    Args:
        datamodule_or_dataset: where the model's training data comes from today.
        indices: positions in the data set that is given; of a `Subset` its own, not those of its
            base data set.
        batch_size: points a request; 1 forgets one after the other, None all at once.
        ids: keys in the place of indices, as ``MUterCallback(ids=...)`` was given them; all points
            of a key are forgotten.
        batch: where a batch's input and target are, as ``MUterCallback(batch=...)`` was told; only
            a predict loop of one's own needs it, since ``trainer.unlearn`` asks the memory.

    Raises:
        RemovalError: no index, one that is no integer, or one outside the data set (when the data
            is set up); a key that is none; both indices and ids, or neither.

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
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        ids: Sequence[str | int] | None = None,
        batch: Where | None = None,
    ) -> None:
        super().__init__()
        if (indices is None) == (ids is None):
            raise RemovalError("give one of indices=[...] and ids=[...]: they name the points")
        refuse_other(datamodule=datamodule_or_dataset)
        self.source = datamodule_or_dataset
        self.indices = [] if indices is None else training_indices(indices)
        self.ids = None if ids is None else _keys(ids)
        if not self.indices and not self.ids:
            raise RemovalError("the request is empty: name at least one training index or id")
        self._form = BatchForm.of(batch)
        self._points: TrainingPoints | None = None
        self._names: list[int] | None = None
        self._read: RemovalBatch | None = None
        self._all = batch_size is None
        size = max(len(self.indices), 1) if batch_size is None else integer(batch_size)
        if size is None or size < 1:
            raise RemovalError(f"batch_size={batch_size!r} must be at least 1, or None for all")
        self.batch_size = size

    def training_points(self, form: BatchForm | None = None) -> TrainingPoints:
        """The whole training set behind the request, its batches read by ``form``."""
        if self._points is not None:
            return self._points
        return training_points(self.source, form or self._form)

    @property
    def at_once(self) -> bool:
        """Whether all points are one request."""
        return self._all or self.batch_size >= len(self.indices)

    def located(
        self,
        points: TrainingPoints,
        positions: list[int],
        names: list[int],
        read: RemovalBatch | None = None,
    ) -> RemovalDataModule:
        """The request with its rows in a data set found.

        Args:
            points: the data set.
            positions: of the rows.
            names: the training indices that they are.
            read: all of them, where they were read already; they are not read again.
        """
        found = copy.copy(self)
        found.indices, found._names, found._points = positions, names, points
        found._read = read
        found.batch_size = len(positions) if self._all else self.batch_size
        return found

    def _refuse_ids(self) -> None:
        if self._names is None and self.ids is not None:
            raise RemovalError(
                f"ids {listing(self.ids)} are resolved by the memory: hand the request to "
                "trainer.unlearn"
            )

    def remaining(self) -> Subset[Any]:
        """The training set without the points to forget, for a Retrain of one's own."""
        self._refuse_ids()
        points, gone = self.training_points(), set(self.indices)
        return Subset(points.dataset, [i for i in range(len(points)) if i not in gone])

    def requests(self) -> Iterator[RemovalBatch]:
        """The batches of `predict_dataloader`, read without a loader's machinery."""
        if self._read is not None:
            yield self._read
            return
        self._refuse_ids()
        points = self.training_points()
        points.check_positions(self.indices)
        names = self.indices if self._names is None else self._names
        for start in range(0, len(self.indices), self.batch_size):
            some = slice(start, start + self.batch_size)
            x, targets, beside = points.batch(self.indices[some])
            yield RemovalBatch(x, targets, torch.tensor(names[some]), beside.entries())

    def predict_dataloader(self) -> DataLoader[int]:
        self._refuse_ids()
        points = self.training_points()
        points.check_positions(self.indices)
        dataset = _Indexed(points, self.indices, self._names)
        # every process sees the same request (Lightning leaves a DistributedSampler alone)
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, num_replicas=1, rank=0, shuffle=False
        )
        generator = torch.Generator()  # of its own: the global random state is the user's
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            generator=generator,
            collate_fn=dataset.removal,
        )
