"""Where a served memory goes: the disk, the callback, the model; all of it, or nothing."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import NamedTuple

from torch import nn

from lightning_muter.errors import ConfigurationError, MuterError, StateError
from lightning_muter.lightning.keeper import MemoryKeeper
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.kept_model import bring_model_up_to_date
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import ModelView
from lightning_muter.parallel import Group

__all__ = ["Committed", "Destination"]


class Committed(NamedTuple):
    """The memory as it is kept, and the seconds that writing it took."""

    memory: UnlearningMemory
    seconds: float


@dataclass(frozen=True)
class Destination:
    """The folder (or None) and the callback (or None) that a memory belongs to.

    Attributes:
        store: the folder that is kept current.
        keeper: the callback whose memory moves.
        group: the processes of the call.
        held: the memory that this process has in hand; None where it is read from the folder.
    """

    store: MemoryStore | None
    keeper: MemoryKeeper | None
    group: Group
    held: UnlearningMemory | None

    @classmethod
    def of(
        cls,
        memory: UnlearningMemory | str | os.PathLike[str] | None,
        keeper: MemoryKeeper | None,
        group: Group,
    ) -> Destination:
        """What ``trainer.unlearn(memory=...)`` names: a memory, its folder, or the callback's.

        Raises:
            StateError: there is no memory.
            ConfigurationError: ``memory`` is neither a memory nor a path.
        """
        if isinstance(memory, UnlearningMemory):
            return cls(None, None, group, memory)
        if memory is not None:
            if not isinstance(memory, (str, os.PathLike)):
                raise ConfigurationError(
                    f"memory={memory!r} must be an UnlearningMemory or the path of its folder"
                )
            return cls(MemoryStore(memory), None, group, None)
        if keeper is None or keeper.memory is None:
            raise StateError(
                "there is no memory yet: fit with a MUterCallback first, or give memory='its "
                "folder'"
            )
        held = keeper.memory
        store = None if keeper.folder is None else MemoryStore(keeper.folder, held.memory_id)
        return cls(store, keeper, group, held)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one writer of the folder, from the reading of the memory to the commit.

        Raises:
            StateError: another process writes it; with its host, process and command.
        """
        with ExitStack() as stack:
            with self.group.together():
                if self.store is not None and self.group.first:
                    stack.enter_context(self.store.writing())
                    bring_model_up_to_date(self.store)
            yield

    def newest(self, keeper: MemoryKeeper | None, module: nn.Module) -> UnlearningMemory:
        """The memory in hand, or the folder's where another process has served requests since."""
        if self.store is None or (
            self.held is not None
            and self.store.newest() == (self.held.memory_id, self.held.generation)
        ):
            assert self.held is not None  # without a folder there is one
            return self.held
        # a callback's loss may be an attribute's name until there is a module
        settings = None if keeper is None else keeper.settings.of(module)
        return UnlearningMemory.read(self.store, settings)

    def check_model(self, newest: UnlearningMemory, view: ModelView) -> None:
        """Refuse a module that is neither the newest memory's nor that of the one in hand.

        Raises:
            StateError: with what differs.
        """
        try:
            newest.check_model(view)
        except StateError:
            if self.held is None or self.held is newest:
                raise
            self.held.check_model(view)

    def adopt(self, newest: UnlearningMemory, view: ModelView) -> None:
        """Take a memory that is committed already: its ω goes into the model."""
        if self.keeper is not None:
            self.keeper.memory = newest
        view.set(newest.omega)

    def commit(self, memory: UnlearningMemory, view: ModelView) -> Committed:
        """Append a memory's requests to the folder, and put its ω into the model."""
        return self._keep(memory.annotated({"time": _now()}), UnlearningMemory.commit, view)

    def replace(self, memory: UnlearningMemory, view: ModelView) -> Committed:
        """Put a rebased memory into the place of the one it came from, and ω into the model."""
        whole = memory if self.store is None else memory.whole()
        return self._keep(whole.dated(_now()), UnlearningMemory.replace_in, view)

    def _keep(
        self,
        memory: UnlearningMemory,
        write: Callable[[UnlearningMemory, MemoryStore], UnlearningMemory],
        view: ModelView,
    ) -> Committed:
        """The disk comes first, as the only step that can fail: a failed write changes nothing."""
        start = time.perf_counter()
        generation = memory.generation
        with self.group.together():
            if self.store is not None and self.group.first:
                generation = write(memory, self.store).generation
        memory = replace(memory, pending=(), generation=self.group.broadcast(generation))
        if self.store is not None and self.group.first:
            self._refresh_model(self.store, memory)
        seconds = time.perf_counter() - start
        memory = memory.shared(self.group)  # of what was whole for the folder, a share serves on
        self.adopt(memory, view)
        return Committed(memory, seconds)

    def _refresh_model(self, store: MemoryStore, memory: UnlearningMemory) -> None:
        """The folder's model.ckpt follows the memory, which is committed whatever happens here."""
        try:
            store.repair_model(memory.state())
        except MuterError as error:
            warnings.warn(
                "the memory is committed, but model.ckpt beside it is still the model before: "
                f"{error}",
                stacklevel=4,
            )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
