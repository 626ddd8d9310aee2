"""Who may read and write a memory's folder: anyone, and one process at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning_muter.errors import MemoryFormatError, StateError
from lightning_muter.memory import connections, database, leftovers, older_format, schema
from lightning_muter.memory.faults import damage, other_memory, write_errors
from lightning_muter.memory.lock import locked
from lightning_muter.memory.records import Meta

__all__ = ["FolderAccess"]

_LOCK = "memory.lock"


class FolderAccess:
    """A folder, its lock, and the memory that is expected in it.

    Args:
        folder: a memory's; it need not be there yet.
        memory_id: of the memory that is expected; None takes the first that is read or created.
    """

    def __init__(self, folder: str | os.PathLike[str], memory_id: str | None = None) -> None:
        self.folder = Path(folder)
        self._database = self.folder / schema.NAME
        self._writer: tuple[int, int] | None = None  # the process and thread that hold the lock
        self._memory_id = memory_id

    @contextmanager
    def writing(self, timeout: float = 10.0) -> Iterator[None]:
        """Be the one writer of the folder; what a crash left there is removed or finished first.

        Args:
            timeout: seconds to wait for another writer.

        Raises:
            StateError: another process is writing; with its host, process and command.
        """
        if not self.folder.is_dir():
            raise MemoryFormatError(
                f"{self.folder} is no folder: give the one that a MUterCallback(memory_dir=...) "
                "wrote"
            )
        with ExitStack() as stack:
            with write_errors(self.folder):
                stack.enter_context(locked(self.folder / _LOCK, timeout))
            self._writer = _here()
            try:
                leftovers.tidy(self.folder)
                yield
            finally:
                self._writer = None

    @contextmanager
    def _as_writer(self) -> Iterator[None]:
        """Be the writer for one operation, as part of a longer one where this object is it."""
        if self._writer == _here():
            yield
        else:
            with self.writing():
                yield

    def facts(self) -> dict[str, Any]:
        """Settings, fingerprint, summary and warnings, without the tensors.

        Raises:
            MemoryFormatError: the database is missing, damaged or of another format.
        """
        return self._meta().read_facts()

    def _meta(self) -> Meta:
        older_format.refuse(self.folder, self._database)
        with damage(self.folder), connections.reading(self._database) as connection:
            return database.read_meta(connection)

    def _check_newest(self, meta: Meta, expected: int) -> None:
        if self._memory_id not in (None, meta.memory_id):
            raise other_memory(self.folder)
        if meta.generation != expected:
            raise StateError(
                f"{self.folder} is at generation {meta.generation}, this memory was read at "
                f"generation {expected}: another process changed it meanwhile. Nothing was "
                "changed; load the memory again and repeat the request"
            )


def _here() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()
