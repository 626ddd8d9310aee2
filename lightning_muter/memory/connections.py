"""Connections to memory.sqlite: to read, to write in one transaction, and to clean up."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_muter.errors import MemoryFormatError, StateError
from lightning_muter.memory import files
from lightning_muter.memory.schema import COMPANIONS, check_schema

__all__ = ["compact", "connected", "empty_log", "has_log", "reading", "transaction"]

_WAIT = 10.0  # seconds for which another connection is waited for
_LOG_WAIT = 0.2  # seconds for which readers are waited for to empty the log after a commit
_ERASURE_WAIT = 2.0  # and where what it holds has to go


@contextmanager
def connected(path: Path, query: str) -> Iterator[sqlite3.Connection]:
    """A connection of one operation's length: processes and threads never share one."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{query}", uri=True, timeout=_WAIT, isolation_level=None
    )
    try:
        for pragma in (
            "trusted_schema=OFF",
            "foreign_keys=OFF",
            "synchronous=FULL",
            "secure_delete=ON",
            "temp_store=MEMORY",
            "cell_size_check=ON",
            "mmap_size=0",
        ):
            connection.execute(f"PRAGMA {pragma}")
        yield connection
    finally:
        with suppress(sqlite3.Error):
            connection.close()


def _check_files(path: Path) -> None:
    try:
        files.check_regular(path)
    except FileNotFoundError as error:
        raise MemoryFormatError(
            f"{path.parent} holds no {path.name}: give the folder that a "
            "MUterCallback(memory_dir=...) wrote"
        ) from error
    for companion in COMPANIONS:
        with suppress(FileNotFoundError):
            files.check_regular(path.with_name(path.name + companion))


def has_log(path: Path) -> bool:
    """Whether sqlite's log beside a database holds what the database itself may not yet."""
    try:
        return path.with_name(path.name + "-wal").lstat().st_size > 0
    except OSError:
        return False


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """All rows as they are at one moment, whatever a writer does meanwhile.

    A database in a folder that cannot be written is taken as it is where all of it is in the one
    file; else sqlite has to find the index of its log beside it.

    Raises:
        MemoryFormatError: the database is missing, damaged or of another format.
        StateError: it cannot be read without writing into its folder, which is not allowed.
    """
    _check_files(path)
    writable, log = os.access(path.parent, os.W_OK), has_log(path)
    if log and not writable and not path.with_name(path.name + "-shm").exists():
        raise StateError(
            f"{path.parent} cannot be written, and its {path.name}-wal holds what a writer that "
            "was cut off left: copy the folder to where it can be written, and read the copy"
        )
    alone = not log and not writable
    with connected(path, "mode=ro&immutable=1" if alone else "mode=ro") as connection:
        connection.execute("BEGIN")
        check_schema(connection, path)
        yield connection


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction, on the disk when the block has ended; an error in it changes nothing.

    Raises:
        MemoryFormatError: the database is missing, damaged or of another format.
        sqlite3.Error: it could not be written.
    """
    _check_files(path)
    with connected(path, "mode=rw") as connection:
        check_schema(connection, path)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
        _checkpoint(connection, _LOG_WAIT)


def compact(path: Path) -> None:
    """Write the database anew without what was deleted from it, and empty its log.

    Nothing that was committed depends on it: where it fails, the next writer does it.
    """
    with suppress(sqlite3.Error, OSError, MemoryFormatError), _cleaning(path) as connection:
        connection.execute("VACUUM")
    empty_log(path)


def empty_log(path: Path) -> None:
    """Move what sqlite's log holds into the database, where it deletes what was deleted."""
    with suppress(sqlite3.Error, OSError, MemoryFormatError), _cleaning(path) as connection:
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        if free:  # a replaced memory that nobody compacted
            connection.execute("VACUUM")
        _checkpoint(connection, _ERASURE_WAIT)


@contextmanager
def _cleaning(path: Path) -> Iterator[sqlite3.Connection]:
    _check_files(path)
    with connected(path, "mode=rw") as connection:
        check_schema(connection, path)
        yield connection


def _checkpoint(connection: sqlite3.Connection, wait: float) -> None:
    with suppress(sqlite3.Error):  # a reader may be in the way: the log stays, and is read
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * wait)}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
