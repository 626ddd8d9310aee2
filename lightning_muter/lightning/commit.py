"""Where a served memory goes: the disk, the callback, the model; all of it, or nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lightning_muter.lightning.keeper import MemoryKeeper
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import ModelView
from lightning_muter.parallel import Group

__all__ = ["Destination"]


@dataclass(frozen=True)
class Destination:
    """The folder (or None) and the callback (or None) that a memory belongs to."""

    folder: str | None
    keeper: MemoryKeeper | None
    group: Group

    def commit(self, memory: UnlearningMemory, view: ModelView) -> float:
        """Make a memory the current one and put its ω into the model; the seconds of the write.

        The disk comes first, as the only step that can fail: a failed write changes nothing.
        """
        start = time.perf_counter()
        with self.group.together():
            if self.folder is not None and self.group.first:
                memory.save(self.folder)
        seconds = time.perf_counter() - start
        if self.keeper is not None:
            self.keeper.memory = memory
        view.set(memory.omega)
        return seconds
