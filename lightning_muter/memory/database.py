"""memory.sqlite: its schema, its connections, and rows that are checked before they are used."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from lightning_muter.errors import MemoryFormatError
from lightning_muter.memory import files
from lightning_muter.memory.records import Meta, RequestRow

__all__ = [
    "COMPANIONS",
    "FORMAT_VERSION",
    "NAME",
    "UNFINISHED",
    "append",
    "build",
    "compact",
    "empty_log",
    "has_log",
    "last_chain",
    "put",
    "put_all",
    "read_meta",
    "read_requests",
    "reading",
    "transaction",
]

NAME = "memory.sqlite"
UNFINISHED = "memory.sqlite.new"  # a database that is being built
COMPANIONS = ("-wal", "-shm", "-journal")  # what sqlite lays beside a database
FORMAT_VERSION = 3
_WAIT = 10.0  # seconds for which another connection is waited for
_LOG_WAIT = 0.2  # seconds for which readers are waited for to empty the log after a commit
_ERASURE_WAIT = 2.0  # and where what it holds has to go
_META = (
    "CREATE TABLE meta (id INTEGER PRIMARY KEY, memory_id TEXT, generation INTEGER, "
    "model_generation INTEGER, base TEXT, base_size INTEGER, base_blake2b BLOB, key BLOB, "
    "facts TEXT, sizes TEXT, current BLOB, requests INTEGER, chain BLOB, checksum BLOB)"
)
_REQUESTS = (
    "CREATE TABLE requests (number INTEGER PRIMARY KEY, entry TEXT, facts TEXT, tensors BLOB, "
    "chain BLOB)"
)
_SCHEMA = [("table", "meta", "meta", _META), ("table", "requests", "requests", _REQUESTS)]
_META_KINDS = (str, int, (int, type(None)), str, int, bytes, bytes, str, str, bytes, int, bytes)
_REQUEST_KINDS = (int, str, str, bytes, bytes)


# --- connections --------------------------------------------------------------------------------


@contextmanager
def _connected(path: Path, query: str) -> Iterator[sqlite3.Connection]:
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
    """
    _check_files(path)
    alone = not has_log(path) and not os.access(path.parent, os.W_OK)
    with _connected(path, "mode=ro&immutable=1" if alone else "mode=ro") as connection:
        connection.execute("BEGIN")
        _check_schema(connection, path)
        yield connection


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != FORMAT_VERSION:
        raise MemoryFormatError(
            f"{path} is of format version {version}, {FORMAT_VERSION} is expected: use the "
            "lightning-muter release that wrote it, or rebuild the memory"
        )
    found = connection.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    ).fetchall()
    if found != _SCHEMA:
        raise MemoryFormatError(
            f"{path} holds other tables, views or triggers than a memory has: it was altered; "
            "restore a backup"
        )


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction, on the disk when the block has ended; an error in it changes nothing.

    Raises:
        MemoryFormatError: the database is missing, damaged or of another format.
        sqlite3.Error: it could not be written.
    """
    _check_files(path)
    with _connected(path, "mode=rw") as connection:
        _check_schema(connection, path)
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
    with _connected(path, "mode=rw") as connection:
        _check_schema(connection, path)
        yield connection


def _checkpoint(connection: sqlite3.Connection, wait: float) -> None:
    with suppress(sqlite3.Error):  # a reader may be in the way: the log stays, and is read
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * wait)}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def build(folder: Path, meta: Meta, rows: Sequence[RequestRow]) -> None:
    """Build a database aside and put it into the place of whatever is there, in one step."""
    unfinished, path = folder / UNFINISHED, folder / NAME
    for name in (unfinished, *(folder / (UNFINISHED + one) for one in COMPANIONS)):
        files.remove(name)
    with files.private(unfinished):
        pass
    with _connected(unfinished, "mode=rw") as connection:
        connection.execute("BEGIN IMMEDIATE")
        for _, _, _, sql in _SCHEMA:
            connection.execute(sql)
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        append(connection, rows)
        put(connection, meta)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode=WAL")
    files.sync(unfinished)
    for companion in COMPANIONS:  # a log that a lost database left would be taken for this one's
        path.with_name(path.name + companion).unlink(missing_ok=True)
    os.replace(unfinished, path)
    files.sync_folder(folder)


# --- rows ---------------------------------------------------------------------------------------


def append(connection: sqlite3.Connection, rows: Sequence[RequestRow]) -> None:
    """Add rows to the ledger."""
    connection.executemany("INSERT INTO requests VALUES (?, ?, ?, ?, ?)", map(astuple, rows))


def put(connection: sqlite3.Connection, meta: Meta) -> None:
    """Put the row that says what the memory is into the place of the one before."""
    values = (1, *astuple(meta), meta.seal())
    places = ", ".join("?" * len(values))
    connection.execute("DELETE FROM meta")
    connection.execute(f"INSERT INTO meta VALUES ({places})", values)


def put_all(connection: sqlite3.Connection, meta: Meta, rows: Sequence[RequestRow]) -> None:
    """Put a memory into the place of all that was there."""
    connection.execute("DELETE FROM requests")
    append(connection, rows)
    put(connection, meta)


def read_meta(connection: sqlite3.Connection) -> Meta:
    """The row that says what the memory is, every field of it checked.

    Raises:
        MemoryFormatError: it is missing, doubled or altered.
    """
    found = connection.execute("SELECT * FROM meta LIMIT 2").fetchall()
    if len(found) != 1 or found[0][0] != 1:
        raise MemoryFormatError(
            f"memory.sqlite says {len(found)} times what the memory is, once is expected: restore "
            "a backup"
        )
    _, *values, seal = found[0]
    names = [one.name for one in fields(Meta)]
    _check_kinds("the memory", dict(zip(names, values, strict=True)), _META_KINDS)
    meta = Meta(*values)
    if seal != meta.seal():
        raise MemoryFormatError(
            "memory.sqlite does not agree with its checksum: it was altered; restore a backup, or "
            "rebuild the memory with the settings that you want"
        )
    meta.check()
    return meta


def last_chain(connection: sqlite3.Connection, meta: Meta) -> bytes:
    """The chain that a next request follows.

    Raises:
        MemoryFormatError: the last request is not the one that the memory knows.
    """
    query = "SELECT number, chain FROM requests ORDER BY number DESC LIMIT 1"
    found = connection.execute(query).fetchone()
    if found != (None if meta.requests == 0 else (meta.requests, meta.chain)):
        raise MemoryFormatError(
            f"the last request in memory.sqlite is not number {meta.requests}, which the memory "
            "served last: requests were altered, removed or added; restore a backup"
        )
    return meta.chain


def read_requests(connection: sqlite3.Connection) -> list[RequestRow]:
    """The rows of the ledger in their order; whether they follow one another is not looked at.

    Raises:
        MemoryFormatError: a column is of another type.
    """
    found = connection.execute("SELECT * FROM requests ORDER BY number").fetchall()
    names = [one.name for one in fields(RequestRow)]
    for values in found:
        _check_kinds("a request", dict(zip(names, values, strict=True)), _REQUEST_KINDS)
    return [RequestRow(*values) for values in found]


def _check_kinds(what: str, values: dict[str, Any], kinds: Sequence[Any]) -> None:
    wrong = [
        name
        for (name, value), kind in zip(values.items(), kinds, strict=True)
        if not isinstance(value, kind)
    ]
    if wrong:
        raise MemoryFormatError(
            f"the columns {wrong} of {what} in memory.sqlite are of another type than was "
            "written: it was altered; restore a backup"
        )
