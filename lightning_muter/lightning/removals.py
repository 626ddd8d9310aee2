"""The batches of a request, read by the package itself and not through a trainer's loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from lightning_muter.arguments import integer
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.errors import RemovalError
from lightning_muter.lightning.data import RemovalDataModule, TrainingPoints
from lightning_muter.lightning.flavour import pl
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.points import (
    check_batch,
    check_free,
    check_named,
    digests_of,
    listing,
    passed_over,
    training_indices,
)
from lightning_muter.unlearning.serving import RemovalBatch

__all__ = [
    "Asked",
    "check_removals",
    "check_served",
    "points_in",
    "refuse_missing",
    "removal_batches",
]

_BLOCK = 512
_NO_LOADER = pl.LightningDataModule.predict_dataloader  # where a datamodule defines none


@dataclass(frozen=True)
class Asked:
    """What a call asks to forget, as far as it is known before its batches are read.

    Attributes:
        removals: what is read; None where training indices alone are named.
        points: today's data set, where there is one.
        indices: the training indices that are asked for, those passed over left out.
        already: those that are passed over.
        places: the row (n,) of each training point in today's data set, where it was looked for.
    """

    removals: Any
    points: TrainingPoints | None = None
    indices: tuple[int, ...] = ()
    already: tuple[int, ...] = ()
    places: Tensor | None = None

    @property
    def by_index(self) -> bool:
        """Whether ``removals`` are training indices alone, which rows need no data for."""
        return self.removals is None


def listed_indices(removals: Any) -> list[int]:
    """The training indices that a plain list of integers names; [] where it is none."""
    flat = removals.tolist() if hasattr(removals, "tolist") else removals
    if not isinstance(flat, (list, tuple, range, set, frozenset)):
        return []
    named = isinstance(flat, Iterable) and all(integer(one) is not None for one in flat)
    return training_indices(flat) if named else []


def check_listed(memory: UnlearningMemory, indices: list[int], over: Tensor | None) -> Asked:
    """Refuse indices that the memory cannot forget without their data; what they ask otherwise.

    Args:
        memory: that is asked.
        indices: of training points.
        over: points (n,) that are left out where they are asked for; None for none.

    Raises:
        RemovalError: with the offending indices, or the memory keeps no rows.
    """
    if not isinstance(memory.curvature, RowsCurvature):
        raise RemovalError(
            f"a plain list of {len(indices)} indices names points whose data is not given, and "
            "this memory keeps no row of each: give a RemovalDataModule(data, indices=[...]), or "
            "build the memory with representation='rows'"
        )
    outside = [i for i in indices if not 0 <= i < memory.n]
    if outside:
        raise RemovalError(
            f"indices {listing(outside)} are out of range: the memory has {memory.n} training "
            f"points, 0 to {memory.n - 1}"
        )
    check_named(indices)
    asked, already = _apart(indices, over)
    check_free(asked, memory.removed, memory.weights)
    return Asked(None, indices=asked, already=already)


def check_removals(
    memory: UnlearningMemory, removals: RemovalDataModule, over: Tensor | None
) -> Asked:
    """Refuse the whole call before its first request; what it asks for otherwise.

    Contents come before what was forgotten already: a data set that lost rows since has other
    points at the same positions.

    Args:
        memory: that is asked.
        removals: the request.
        over: points (n,) that are left out where they are asked for; None for none.

    Raises:
        RemovalError: with the offending indices.
    """
    points = removals.training_points(memory.settings.batch)
    read: RemovalBatch | None = None
    if removals.ids is not None:
        names = memory.owned(removals.ids)
        positions = _positions(memory, points, names)
    else:
        positions = removals.indices
        points.check_positions(positions)
        check_named(positions)
        read, digests = _read(memory, points, removals)
        names = _names(memory, points, positions, digests)
        _check_fixed(memory, removals, positions, names)
        read = None if read is None else read._replace(index=names)
    indices, already = _apart(names, over)
    check_free(indices, memory.removed, memory.weights)
    return Asked(removals.located(points, positions, names, read), points, indices, already)


def _apart(names: Sequence[int], over: Tensor | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The points to forget, and those that are passed over."""
    pairs = list(zip(names, passed_over(names, over), strict=True))
    return tuple(i for i, out in pairs if not out), tuple(i for i, out in pairs if out)


def _read(
    memory: UnlearningMemory, points: TrainingPoints, removals: RemovalDataModule
) -> tuple[RemovalBatch | None, list[bytes]]:
    """The rows of a request that is one batch, and the digests of any request's."""
    if removals.at_once:
        with torch.inference_mode(False):
            x, targets, beside = points.batch(removals.indices)
            check_batch(x, targets)
            # the data set may use the place again, and what was digested is what is served
            x, targets, beside = x.clone(), targets.clone(), beside.copied()
        digests = digests_of(memory.key, x, targets, beside)
        return RemovalBatch(x, targets, None, beside.entries(), digests), digests
    digests = []
    for first in range(0, len(removals.indices), _BLOCK):
        x, targets, beside = points.batch(removals.indices[first : first + _BLOCK])
        check_batch(x, targets)
        digests += digests_of(memory.key, x, targets, beside)
    return None, digests


def _names(
    memory: UnlearningMemory,
    points: TrainingPoints,
    positions: Sequence[int],
    digests: Sequence[bytes],
) -> list[int]:
    """The training indices of rows of today's data set."""
    names = memory.known.named(digests, positions)
    if not memory.known.repeated(names):
        return names
    # a forgotten point lay there, and an equal one is left: which of them the row is, all rows tell
    everyone = range(len(points))
    found = memory.known.match(points.digests(memory.key, everyone), everyone, memory.known.living)
    better = [found.indices[i] for i in positions]
    return [i if new is None else new for i, new in zip(names, better, strict=True)]


def _check_fixed(
    memory: UnlearningMemory,
    removals: RemovalDataModule,
    positions: Sequence[int],
    names: Sequence[int],
) -> None:
    """Refuse rows that moved because the data set is split or shuffled by chance.

    Raises:
        RemovalError: set up once more, the data set has other rows at these positions.
    """
    moved = [(i, name) for i, name in zip(positions, names, strict=True) if i != name]
    if not moved or not isinstance(removals.source, pl.LightningDataModule):
        return
    again = removals.training_points(memory.settings.batch)
    rows = [i for i, _ in moved if i < len(again)]
    expected = memory.digests[[name for i, name in moved if i < len(again)]].cpu().numpy()
    found = again.digests(memory.key, rows)
    if len(rows) < len(moved) or any(
        a.tobytes() != b for a, b in zip(expected, found, strict=True)
    ):
        raise RemovalError(
            f"indices {listing([i for i, _ in moved])} are other points each time that it is set "
            "up: the datamodule splits or shuffles by chance; give random_split a generator with "
            "a seed, or name the points themselves"
        )


def _positions(memory: UnlearningMemory, points: TrainingPoints, names: Sequence[int]) -> list[int]:
    """A row of today's data set for each training point.

    Raises:
        RemovalError: a point has none.
    """
    rows = points.digests(memory.key, range(len(points)))
    where: dict[bytes, int] = {one: row for row, one in enumerate(rows)}
    wanted = memory.digests[list(names)].cpu().numpy()
    found = [where.get(one.tobytes()) for one in wanted]
    refuse_missing(
        [i for i, row in zip(names, found, strict=True) if row is None], len(names), "asked for"
    )
    return [row for row in found if row is not None]


def refuse_missing(indices: Sequence[int], total: int, which: str) -> None:
    """Raise where training points have no row.

    Raises:
        RemovalError: with the points and their number.
    """
    if indices:
        raise RemovalError(
            f"training points {listing(indices)} have no row in the data set as they were trained "
            f"({len(indices)} of {total} that are {which}): they were deleted or changed since; "
            "give the data set with them"
        )


@contextmanager
def removal_batches(removals: Any, trainer: pl.Trainer) -> Iterator[Iterator[Any]]:
    """The batches of a datamodule's predict loader, of a loader, or of several.

    The trainer's own settings (``limit_predict_batches``, ``fast_dev_run``, callbacks, precision)
    are about its loops and have no part in this; a datamodule can look at the trainer as usual.

    Raises:
        RemovalError: no loader was given, or the datamodule has none of points to forget.
    """
    if type(removals) is RemovalDataModule:  # a subclass may have hooks and loaders of its own
        yield removals.requests()
        return
    if not callable(getattr(removals, "predict_dataloader", None)):
        yield _batches(removals)
        return
    if getattr(removals.predict_dataloader, "__func__", None) is _NO_LOADER:
        raise RemovalError(
            f"{type(removals).__name__} has no predict_dataloader, which would give the points to "
            f"forget: give RemovalDataModule({type(removals).__name__}(...), indices=[...]), or a "
            "loader of the points"
        )
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
            "RemovalDataModule(data, indices=[...]), a DataLoader of the points themselves, or, "
            "where the memory keeps rows, a list of training indices"
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


def check_served(asked: Asked, served: list[int], already: list[int]) -> None:
    """Refuse a call that served other points than it was asked for.

    Raises:
        RemovalError: with the points that are missing or too many.
    """
    if not served and not already and not asked.already:
        raise RemovalError("the removal data had no batch: name at least one point to forget")
    named = asked.by_index or isinstance(asked.removals, RemovalDataModule)
    if named and tuple(served) != asked.indices:
        missing = sorted(set(asked.indices) - set(served))
        added = sorted(set(served) - set(asked.indices))
        raise RemovalError(
            f"the request served other points than it names: missing {listing(missing)}, not "
            f"asked for {listing(added)}; nothing was changed. Its predict_dataloader must yield "
            "each index once, in order"
        )


def points_in(path: Path, batch_size: int | None) -> DataLoader[Any]:
    """The points of a safetensors file with the tensors x (m, ...) and target (m, ...).

    Raises:
        RemovalError: the file has no such tensors, or cannot be read.
    """
    try:
        tensors = load_file(path)
        dataset = TensorDataset(tensors["x"], tensors["target"])
    except (OSError, SafetensorError, KeyError, AssertionError) as error:
        raise RemovalError(
            f"{path} holds no points ({type(error).__name__}: {error}): give a safetensors file "
            'with the tensors "x" and "target", one row a point, as training received them'
        ) from error
    size = len(dataset) if batch_size is None else batch_size
    return DataLoader(dataset, batch_size=size, collate_fn=_as_removal)


def _as_removal(points: list[tuple[Tensor, ...]]) -> RemovalBatch:
    x, targets = default_collate(points)
    return RemovalBatch(x, targets, None)
