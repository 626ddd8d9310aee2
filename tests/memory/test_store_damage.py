"""Whatever was altered in a memory's folder is refused, or changes nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import store_cases as cases

from lightning_muter.errors import MemoryFormatError, StateError
from lightning_muter.memory import connections, database, schema
from lightning_muter.memory.base_file import BaseFile
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.records import RequestRow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "memory"
    MemoryStore(place).create(cases.content(8, 8))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_damaged_bytes(seed: int, folder: Path) -> None:
    damage, refused = cases.Damage(folder, seed), 0
    for _ in range(1000):
        damage.bytes()
        refused += cases.refused_or_same(folder, cases.content(8, 8))
        damage.restore()
    assert refused > 500


@pytest.mark.slow
def test_damaged_rows(folder: Path) -> None:
    damage, refused = cases.Damage(folder, 7), 0
    for _ in range(1000):
        damage.rows()
        refused += cases.refused_or_same(folder, cases.content(8, 8))
        damage.restore()
    assert refused > 850


def test_a_damaged_log_is_the_state_before_its_commit(folder: Path, tmp_path: Path) -> None:
    reader = sqlite3.connect(folder / schema.NAME)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM meta").fetchall()
    MemoryStore(folder).commit(8, cases.current(9), [cases.request(9)])
    copy, draw = cases.copy_of(folder, tmp_path / "copy"), random.Random(3)
    reader.close()
    log, seen = copy / "memory.sqlite-wal", set()
    intact = log.read_bytes()
    for at in [0, len(intact), *draw.choices(range(len(intact)), k=100)]:
        log.write_bytes(intact[:at] + bytes(8) + intact[at + 8 :] if at % 2 else intact[:at])
        (copy / "memory.sqlite-shm").unlink(missing_ok=True)
        found = cases.read(copy)
        cases.check_whole(found)
        seen.add(found.generation)
    assert seen == {8, 9}


def resealed(folder: Path, **change: Any) -> None:
    """The database with other fields and a checksum that fits them."""
    with connections.transaction(folder / schema.NAME) as connection:
        database.put(connection, replace(database.read_meta(connection), **change))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("base", name) for name in ("", ".", "../x", "/etc/passwd", "memory.sqlite", "base-0")),
        *(("base_size", one) for one in (-1, 0, 2**62)),
        *(("facts", one) for one in ("", "{", "[]", "3", "null", "[" * 200_000, "\udc80")),
        *(("sizes", one) for one in ("{}", "[]", '{"p": 3}', '{"p": 0, "n": 5}', '{"p": "3"}')),
        *(("sizes", f'{{"p": {one}, "n": 5}}') for one in ("true", "1e400", "3.0", "10" * 40)),
        *(
            ("current", one)
            for one in (b"", b"x" * 64, b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"{}")
        ),
        *(("memory_id", one) for one in ("", "../..", "x" * 8)),
        *(("generation", one) for one in (-1, -(2**63))),
        *(("model_generation", one) for one in (-1, 9)),
        *(("requests", one) for one in (0, 7, 9, -1)),
        ("chain", b""),
        ("key", None),
        ("base_blake2b", "0" * 32),
    ],
)
def test_a_resealed_field_gives_no_raw_error(field: str, value: Any, folder: Path) -> None:
    try:
        resealed(folder, **{field: value})
    except UnicodeEncodeError:  # sqlite keeps no such text
        return
    with pytest.raises(MemoryFormatError):
        cases.read(folder)
    with pytest.raises((MemoryFormatError, StateError)):
        MemoryStore(folder).commit(8, cases.current(9, p=4), [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("entry", one) for one in ("", "[]", "null", "{", "[" * 200_000)),
        *(("facts", one) for one in ("", "{}", "[3]", "null", "{")),
        *(("tensors", one) for one in (b"", b"x" * 64, b"\xff" * 8)),
    ],
)
def test_a_resealed_request_gives_no_raw_error(field: str, value: Any, folder: Path) -> None:
    path = folder / schema.NAME
    with connections.transaction(path) as connection:
        meta = database.read_meta(connection)
        *rows, last = database.read_requests(connection)
        last = replace(last, **{field: value})
        last = replace(last, chain=RequestRow.link(last, rows[-1].chain))
        database.put_all(connection, replace(meta, chain=last.chain), [*rows, last])
    with pytest.raises(MemoryFormatError):
        cases.read(folder)


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE more (x)",
        "CREATE VIEW more AS SELECT 1",
        "CREATE TRIGGER more AFTER INSERT ON requests BEGIN DELETE FROM requests; END",
        "CREATE INDEX more ON requests (entry)",
        "DROP TABLE requests",
        "ALTER TABLE meta ADD COLUMN more",
        "ALTER TABLE meta RENAME TO other",
        "DELETE FROM meta",
        "INSERT INTO meta SELECT 2, memory_id, generation, model_generation, base, base_size, "
        "base_blake2b, key, facts, sizes, current, requests, chain, checksum FROM meta",
        "UPDATE meta SET id = 2",
    ],
)
def test_other_schemas_are_refused(sql: str, folder: Path) -> None:
    connection = sqlite3.connect(folder / schema.NAME)
    with connection:
        connection.execute(sql)
    connection.close()
    with pytest.raises(MemoryFormatError):
        cases.read(folder)
    with pytest.raises(MemoryFormatError):
        MemoryStore(folder).commit(8, cases.current(9), [cases.request(9)])


def test_another_format_version_names_the_way_out(folder: Path) -> None:
    connection = sqlite3.connect(folder / schema.NAME)
    connection.execute("PRAGMA user_version = 6")
    connection.close()
    with pytest.raises(MemoryFormatError, match="version 6, 5 is expected.*release that wrote it"):
        cases.read(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4096, b"SQLite format 3\x00", b"{}", b"\xff"])
def test_other_files_in_the_databases_place(content: bytes, folder: Path) -> None:
    (folder / schema.NAME).write_bytes(content)
    with pytest.raises(MemoryFormatError):
        cases.read(folder)
    with pytest.raises(StateError, match="overwrite"):
        MemoryStore(folder).create(cases.content())


def a_pipe(path: Path, old: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path, old: Path) -> None:
    path.mkdir()


def a_link(path: Path, old: Path) -> None:
    path.symlink_to(old)


def a_broken_link(path: Path, old: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("thing", [a_pipe, a_folder, a_link, a_broken_link])
@pytest.mark.parametrize("name", ["memory.sqlite", "base", "memory.sqlite-wal", "memory.lock"])
def test_what_is_no_file_is_refused_and_never_waited_for(
    name: str, thing: Callable[[Path, Path], None], folder: Path
) -> None:
    path = next(folder.glob("base-*")) if name == "base" else folder / name
    old = folder.parent / "outside"
    if path.exists():
        shutil.move(path, old)
    else:
        old.write_bytes(b"")
    thing(path, old)
    if name != "memory.lock":
        with pytest.raises(MemoryFormatError):
            cases.read(folder)
    if name != "base":
        with pytest.raises((MemoryFormatError, StateError)):
            MemoryStore(folder).commit(8, cases.current(9), [cases.request(9)])


def test_a_base_of_another_memory(folder: Path, tmp_path: Path) -> None:
    MemoryStore(tmp_path / "other").create(cases.content(8, 7))
    other, own = (next(one.glob("base-*")) for one in (tmp_path / "other", folder))
    own.write_bytes(other.read_bytes())
    with pytest.raises(MemoryFormatError, match="truncated or altered"):
        cases.read(folder)
    with pytest.raises(MemoryFormatError, match="none that a memory writes"):
        BaseFile("../" + own.name, 1, b"").check()


def test_facts_survive(folder: Path) -> None:
    facts = {"a": float("-inf"), "é\u2028": [None, True, 1e300], "deep": {"x": {"y": []}}}
    MemoryStore(folder).create(replace(cases.content(), facts=facts), overwrite=True)
    assert json.dumps(cases.read(folder).facts) == json.dumps(facts)
