"""The remaining training points, each checked against its digest whenever it is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.progress import Bar, blocks, no_bar
from lightning_muter.lightning.removals import refuse_missing
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.points import digests_of, refuse_changed
from lightning_muter.models import Beside, ModelView
from lightning_muter.parallel import Group
from lightning_muter.unlearning.objective import RobustObjective
from lightning_muter.unlearning.points import Batch
from lightning_muter.unlearning.rebase import Remaining

__all__ = ["RemainingPoints", "places_of", "read_once"]

_BATCH = 512
#: of a reading that keeps all rows
_READ = 2048


def places_of(memory: UnlearningMemory, points: TrainingPoints, bar: Bar) -> Tensor:
    """The row (n,) of each training point in today's data set, in one pass over it.

    Raises:
        RemovalError: a point that is left has no row; all of them are named.
    """
    found = bar(blocks(range(len(points)), _BATCH), "finding the points", len(points), len)
    return _rows(memory, [one for some in found for one in points.digests(memory.key, some)])


def read_once(
    memory: UnlearningMemory, points: TrainingPoints, view: ModelView, bar: Bar
) -> list[Batch]:
    """The remaining points in the order of today's data set, in one reading of it.

    What is digested is what is kept, so that no row can change between the two.

    Raises:
        RemovalError: a point that is left has no row; all of them are named.
    """
    place, dtype, digests, kept = view.device, view.parameters[0].dtype, [], []
    for block in bar(blocks(range(len(points)), _READ), "the points", len(points), len):
        with torch.inference_mode(False):
            x, targets, beside = points.batch(block)
        digests += digests_of(memory.key, x, targets, beside)
        kept.append((x.to(place, dtype), targets.to(place), beside.to(place, dtype)))
    owners = torch.full((len(points),), -1, dtype=torch.long)
    rows, left = _rows(memory, digests), torch.nonzero(memory.known.living).flatten()
    owners[rows[left]] = left
    batches = []
    for (x, targets, beside), named in zip(kept, torch.split(owners, _READ), strict=True):
        own = named >= 0
        if not bool(own.all()):
            where = own.to(x.device)
            x, targets, named = x[where], targets[where], named[own]
            beside = beside.part(where)
        weights = memory.weights[named.to(memory.weights.device)].to(x.device)
        batches.append(Batch(x, targets, weights, named.to(x.device), beside))
    return batches


def _rows(memory: UnlearningMemory, digests: list[bytes]) -> Tensor:
    """The row (n,) of each training point in a data set of these digests."""
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
        rows = [one for _, x, y, more in self._blocks(order) for one in digests_of(key, x, y, more)]
        names = [-1] * memory.n
        for new, old in enumerate(order):
            names[old] = new
        digests = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
        return Remaining(
            batches=lambda: self.batches(view, names),
            digests=digests.reshape(len(order), -1),
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
