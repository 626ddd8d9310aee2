"""The rows of memory.sqlite: written as they are sealed, checked before they are used."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from lightning_muter.errors import MemoryFormatError
from lightning_muter.memory import files
from lightning_muter.memory.connections import connected
from lightning_muter.memory.records import Meta, RequestRow
from lightning_muter.memory.schema import COMPANIONS, FORMAT_VERSION, NAME, SCHEMA, UNFINISHED

__all__ = ["append", "build", "last_chain", "put", "put_all", "read_meta", "read_requests"]

_META_KINDS = (str, int, (int, type(None)), str, int, bytes, bytes, str, str, bytes, int, bytes)
_REQUEST_KINDS = (int, str, str, bytes, bytes)


def build(folder: Path, meta: Meta, rows: Sequence[RequestRow]) -> None:
    """Build a database aside and put it into the place of whatever is there, in one step."""
    unfinished, path = folder / UNFINISHED, folder / NAME
    for name in (unfinished, *(folder / (UNFINISHED + one) for one in COMPANIONS)):
        files.remove(name)
    with files.private(unfinished):
        pass
    with connected(unfinished, "mode=rw") as connection:
        connection.execute("BEGIN IMMEDIATE")
        for _, _, _, sql in SCHEMA:
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
