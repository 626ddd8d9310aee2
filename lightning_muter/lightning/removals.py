"""The batches of a request, read by the package itself and not through a trainer's loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset

from lightning_muter.errors import RemovalError
from lightning_muter.lightning.data import RemovalDataModule, TrainingPoints
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.points import check_free, check_range, listing

__all__ = ["check_removals", "check_served", "removal_batches"]

_BLOCK = 512


def check_removals(memory: UnlearningMemory, removals: RemovalDataModule) -> TrainingPoints:
    """Refuse the whole call before its first request; the training points otherwise.

    Contents come before what was forgotten already: a data set that lost rows since has other
    points at the same positions, and that is what is wrong then.

    Raises:
        RemovalError: with the offending indices.
    """
    check_range(removals.indices, memory.n)
    points = removals.training_points()
    if len(points) != memory.n:
        raise RemovalError(
            f"the data set has {len(points)} points, the memory was built on {memory.n}: give the "
            "data set of training, with the forgotten points still in it"
        )
    for first in range(0, len(removals.indices), _BLOCK):
        indices = removals.indices[first : first + _BLOCK]
        memory.check_content(indices, *points.batch(indices))
    check_free(removals.indices, memory.removed, memory.weights)
    return points


@contextmanager
def removal_batches(removals: Any, trainer: pl.Trainer) -> Iterator[Iterator[Any]]:
    """The batches of a datamodule's predict loader, of a loader, or of several.

    The trainer's own settings (``limit_predict_batches``, ``fast_dev_run``, callbacks, precision)
    are about its loops and have no part in this; a datamodule can look at the trainer as usual.

    Raises:
        RemovalError: no loader was given.
    """
    if not callable(getattr(removals, "predict_dataloader", None)):
        yield _batches(removals)
        return
    attached = removals.trainer
    removals.trainer = attached if attached is not None else trainer
    try:
        removals.prepare_data()
        removals.setup("predict")
        yield _batches(removals.predict_dataloader())
        removals.teardown("predict")
    finally:
        removals.trainer = attached


def _batches(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, DataLoader):
        return _whole(loaders)
    if isinstance(loaders, (list, tuple)) and all(isinstance(one, DataLoader) for one in loaders):
        return chain.from_iterable(_whole(one) for one in loaders)
    if isinstance(loaders, (str, bytes, dict)) or not isinstance(loaders, Iterable):
        raise RemovalError(
            f"the points to forget are a {type(loaders).__name__}; expected is a "
            "RemovalDataModule(data, indices=[...]), or a DataLoader of the points themselves"
        )
    return iter(loaders)


def _whole(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader, refused where it leaves points of its own out."""
    if loader.drop_last and not isinstance(loader.dataset, IterableDataset):
        left_out = len(loader.sampler) % (loader.batch_size or 1)  # type: ignore[arg-type]
        if left_out:
            raise RemovalError(
                f"the loader has drop_last=True and would leave {left_out} points out of the "
                "request: give drop_last=False"
            )
    return iter(loader)


def check_served(removals: Any, served: list[int]) -> None:
    """Refuse a call that served other points than it was asked for.

    Raises:
        RemovalError: with the points that are missing or too many.
    """
    if not served:
        raise RemovalError("the removal data had no batch: name at least one point to forget")
    if isinstance(removals, RemovalDataModule) and served != removals.indices:
        missing = sorted(set(removals.indices) - set(served))
        added = sorted(set(served) - set(removals.indices))
        raise RemovalError(
            f"the request served other points than it names: missing {listing(missing)}, not "
            f"asked for {listing(added)}; nothing was changed. Its predict_dataloader must yield "
            "each index once, in order"
        )
