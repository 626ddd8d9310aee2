"""The remaining training points, each checked against its digest whenever it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.points import refuse_changed
from lightning_muter.models import ModelView
from lightning_muter.parallel import Group
from lightning_muter.unlearning.objective import RobustObjective
from lightning_muter.unlearning.points import Batch

__all__ = ["RemainingPoints"]

_BATCH = 512


@dataclass(frozen=True)
class RemainingPoints:
    """This process's share of the points that a memory has not forgotten.

    A bound or a correction over rows that were blanked or replaced since training would be one of
    another problem.
    """

    memory: UnlearningMemory
    points: TrainingPoints
    group: Group

    def check(self) -> None:
        """Read every row once, before anything is computed from them.

        Raises:
            RemovalError: rows are not what the memory was built on; all of them are named.
        """
        refuse_changed([i for block, x, y in self._read() for i in self._changed(block, x, y)])

    def batches(self, view: ModelView) -> Iterator[Batch]:
        """The rows where, and in the precision that, the module computes.

        Raises:
            RemovalError: a row is not what the memory was built on.
        """
        parameter = view.parameters[0]
        for block, x, targets in self._read():
            refuse_changed(self._changed(block, x, targets))
            weights = self.memory.weights[block].to(parameter.device)
            yield Batch(
                x.to(parameter.device, parameter.dtype), targets.to(parameter.device), weights
            )

    def objective(self, view: ModelView) -> RobustObjective:
        """The robust objective over the remaining points of all processes."""
        problem = self.memory.settings.problem()
        return RobustObjective(view, problem, lambda: self.batches(view), self.group)

    def _read(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        mine = self.group.share(self.memory.remaining)
        for first in range(0, len(mine), _BATCH):
            block = mine[first : first + _BATCH]
            with torch.inference_mode(False):
                x, targets = self.points.batch(block)
            yield block, x, targets

    def _changed(self, block: list[int], x: Tensor, targets: Tensor) -> list[int]:
        return self.memory.changed(block, x, targets)
