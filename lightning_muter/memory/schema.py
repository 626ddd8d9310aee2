"""memory.sqlite: its name, its format and its tables."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from lightning_muter.errors import MemoryFormatError

__all__ = ["COMPANIONS", "FORMAT_VERSION", "NAME", "SCHEMA", "UNFINISHED", "check_schema"]

NAME = "memory.sqlite"
UNFINISHED = "memory.sqlite.new"  # a database that is being built
COMPANIONS = ("-wal", "-shm", "-journal")  # what sqlite lays beside a database
FORMAT_VERSION = 5
_META = (
    "CREATE TABLE meta (id INTEGER PRIMARY KEY, memory_id TEXT, generation INTEGER, "
    "model_generation INTEGER, base TEXT, base_size INTEGER, base_blake2b BLOB, key BLOB, "
    "facts TEXT, sizes TEXT, current BLOB, requests INTEGER, chain BLOB, checksum BLOB)"
)
_REQUESTS = (
    "CREATE TABLE requests (number INTEGER PRIMARY KEY, entry TEXT, facts TEXT, tensors BLOB, "
    "chain BLOB)"
)
SCHEMA = [("table", "meta", "meta", _META), ("table", "requests", "requests", _REQUESTS)]


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a database of another format, and one with other tables, views or triggers.

    Raises:
        MemoryFormatError: with the way out.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != FORMAT_VERSION:
        raise MemoryFormatError(
            f"{path} is of format version {version}, {FORMAT_VERSION} is expected: use the "
            "lightning-muter release that wrote it, or rebuild the memory"
        )
    found = connection.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    ).fetchall()
    if found != SCHEMA:
        raise MemoryFormatError(
            f"{path} holds other tables, views or triggers than a memory has: it was altered; "
            "restore a backup"
        )
