"""The remaining training points, each checked against its digest whenever it is read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.progress import Bar, blocks, no_bar
from lightning_muter.lightning.removals import refuse_missing
from lightning_muter.memory.blocks import BLOCK, block_digest, rows_of_digests
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.points import digests_of, refuse_changed
from lightning_muter.models import Beside, ModelView
from lightning_muter.parallel import Group
from lightning_muter.unlearning.objective import RobustObjective
from lightning_muter.unlearning.points import Batch
from lightning_muter.unlearning.rebase import Remaining

__all__ = ["RemainingPoints", "places_of", "read_once"]

#: points that are read at a time: as many blocks as a module's batch is wide, or of a reading that
#: keeps them all
_BATCH, _READ = BLOCK, 4 * BLOCK


def places_of(memory: UnlearningMemory, points: TrainingPoints, bar: Bar) -> Tensor:
    """The row (n,) of each training point in today's data set, in one pass over it.

    Raises:
        RemovalError: a point that is left has no row; all of them are named.
    """
    found = [rows_of_digests([])]
    parts = _parts(points, _BATCH, "finding the points", bar)
    found += [memory.recognised(*part) for part in parts]
    return _rows(memory, torch.cat(found))


def read_once(memory: UnlearningMemory, points: TrainingPoints, view: ModelView, bar: Bar) -> Batch:
    """The remaining points, in an order that means nothing, in one reading of today's data set.

    What is digested is what is kept, so that no row can change between the two. What forward
    takes beside x is digested alone.

    Raises:
        RemovalError: a point that is left has no row; all of them are named.
        ConfigurationError: rows of different shapes.
    """
    kept: list[Tensor] = []
    digests = [rows_of_digests([])]
    for start, x, targets, beside in _parts(points, _READ, "the points", bar):
        kept = kept or [_room(len(points), one) for one in (x, targets)]
        x, targets = (_put(one, into, start) for one, into in zip((x, targets), kept, strict=True))
        digests.append(memory.recognised(start, x, targets, beside))
    rows, left = _rows(memory, torch.cat(digests)), torch.nonzero(memory.known.living).flatten()
    owners = torch.full((len(points),), -1, dtype=torch.long)
    owners[rows[left]] = left
    stays = owners >= 0
    x, targets, owners = (_in_front(column, stays) for column in (*kept, owners))
    place, dtype = view.device, view.parameters[0].dtype
    weights = memory.weights[owners.to(memory.weights.device)].to(place)
    return Batch(x.to(place, dtype), targets.to(place), weights, owners.to(place))


def _room(n: int, part: Tensor) -> Tensor:
    """Memory for n rows like those of a part.

    It is numpy's, which asks the system for large pages: most of the time that 80 MB take otherwise
    is the page faults of their first use.
    """
    shape = n, *part.shape[1:]
    flat = np.empty(math.prod(shape) * part.element_size(), dtype=np.uint8)
    return torch.from_numpy(flat).view(part.dtype).reshape(shape)


def _put(part: Tensor, into: Tensor, start: int) -> Tensor:
    """The rows of a part where they are kept."""
    if part.shape[1:] != into.shape[1:]:
        raise ConfigurationError(
            f"the points have rows of shape {tuple(into.shape[1:])} and {tuple(part.shape[1:])}: a "
            "linear model reads one shape; give a data set, or a collate_fn, that makes them alike"
        )
    return into[start : start + len(part)].copy_(part)


def _in_front(column: Tensor, stays: Tensor) -> Tensor:
    """The rows (m, ...) that stay: the last of them take the places of those that go."""
    m = int(stays.sum())
    free, movers = torch.nonzero(~stays[:m]).flatten(), m + torch.nonzero(stays[m:]).flatten()
    column[free] = column[movers]
    return column[:m]


def _parts(
    points: TrainingPoints, size: int, what: str, bar: Bar
) -> Iterator[tuple[int, Tensor, Tensor, Beside]]:
    """The rows of today's data set, and where each part of them begins."""
    for block in bar(blocks(range(len(points)), size), what, len(points), len):
        with torch.inference_mode(False):
            x, targets, beside = points.lying(block)
        yield block.start, x, targets, beside


def _rows(memory: UnlearningMemory, digests: Tensor) -> Tensor:
    """The row (n,) of each training point in a data set of these digests (m, 16)."""
    places = memory.known.places(digests)
    left = torch.nonzero(memory.known.living).flatten()
    refuse_missing(left[places.rows[left] < 0].tolist(), len(left), "left")
    if places.new:
        warnings.warn(
            f"{places.new} rows of the data set are new since training: the memory does not know "
            "them, and they have no part in corrector, bound or Retrain",
            stacklevel=5,
        )
    return places.rows


@dataclass(frozen=True)
class RemainingPoints:
    """This process's share of the points that a memory has not forgotten.

    A bound or a correction over rows that were blanked or replaced since training would be one of
    another problem.

    Attributes:
        memory: that forgot the others.
        points: today's data set.
        places: the row (n,) of each training point in it.
        group: the processes.
        bar: shows how far a pass is.
    """

    memory: UnlearningMemory
    points: TrainingPoints
    places: Tensor
    group: Group
    bar: Bar = no_bar

    def batches(self, view: ModelView, names: Sequence[int] | None = None) -> Iterator[Batch]:
        """The rows where, and in the precision that, the module computes.

        Args:
            view: of the module.
            names: the index (n,) that each training point goes by; its own by default.

        Raises:
            RemovalError: a row is not what the memory was built on.
        """
        for block, x, targets, beside in self._read():
            refuse_changed(self.memory.changed(block, x, targets, beside))
            known = block if names is None else [names[i] for i in block]
            yield Batch(
                x.to(view.device, view.dtype),
                targets.to(view.device),
                self.memory.weights[block].to(view.device),
                torch.tensor(known, device=view.device),
                beside.to(view.device, view.dtype),
            )

    def objective(self, view: ModelView) -> RobustObjective:
        """The robust objective over the remaining points of all processes."""
        problem = self.memory.settings.problem()
        batches, empty = lambda: self.batches(view), self.memory.settings.empty_sum
        return RobustObjective(view, problem, batches, self.group, empty)

    def numbered(self, view: ModelView, key: bytes) -> Remaining:
        """The remaining points in the order of their rows, their digests under a new key."""
        memory = self.memory
        order = sorted(memory.remaining, key=self.places.tolist().__getitem__)
        rows: list[bytes] = []
        together: list[bytes] = []
        for _, x, targets, beside in self._blocks(order):
            rows += digests_of(key, x, targets, beside)
            together.append(block_digest(key, x, targets, beside))
        names = [-1] * memory.n
        for new, old in enumerate(order):
            names[old] = new
        return Remaining(
            batches=lambda: self.batches(view, names),
            digests=rows_of_digests(rows),
            blocks=rows_of_digests(together),
            weights=memory.weights[order],
            key=key,
            ids=None if memory.ids is None else memory.ids[order],
        )

    def _read(self) -> Iterator[tuple[list[int], Tensor, Tensor, Beside]]:
        return self._blocks(self.group.share(self.memory.remaining))

    def _blocks(self, points: list[int]) -> Iterator[tuple[list[int], Tensor, Tensor, Beside]]:
        parts = blocks(range(len(points)), _BATCH)
        for part in self.bar(parts, "the remaining points", len(points), len):
            block = [points[i] for i in part]
            with torch.inference_mode(False):
                x, targets, beside = self.points.batch(self.places[block].tolist())
            yield block, x, targets, beside
