"""A memory's folder: what was written is read, by one writer at a time, and can be left behind."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import store_cases as cases
import torch

from lightning_muter.errors import MemoryFormatError, StateError
from lightning_muter.memory import base_file
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.records import Request
from lightning_muter.memory.tensors import TensorSpec

DTYPES = [torch.float64, torch.float32, torch.int64, torch.uint8, torch.bool]


def made(folder: Path, requests: int = 3) -> MemoryStore:
    store = MemoryStore(folder)
    store.create(cases.content(requests, requests), cases.model(requests))
    return store


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_memory_reads_back(tmp_path: Path) -> None:
    store = made(tmp_path / "deep" / "memory")
    assert store.exists() and store.model_generation() == 3
    assert cases.same(cases.read(store.folder), cases.content(3, 3))
    assert store.commit(3, cases.current(4), [cases.request(4)]) == 4
    assert cases.same(cases.read(store.folder), cases.content(4, 4))
    assert store.commit(4, cases.current(6), [cases.request(5), cases.request(6)]) == 5
    assert [one.entry["request"] for one in cases.read(store.folder).requests] == [1, 2, 3, 4, 5, 6]


def test_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {f"{k}": torch.ones(2, 3, dtype=kind) for k, kind in enumerate(DTYPES)}
    wide = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "turned": wide.T}
    tensors |= {"column": wide[:, 1], "all": wide}
    content = replace(cases.content(), requests=(Request({}, [], tensors), Request({}, [], {})))
    store = MemoryStore(tmp_path)
    store.create(content)
    assert cases.same(cases.read(tmp_path), content)
    bad = [Request({}, [], {"x": torch.zeros(1, dtype=torch.complex64)})]
    with pytest.raises(StateError, match="complex64"):
        store.commit(0, cases.current(1), bad)
    assert cases.same(cases.read(tmp_path), content)


def test_the_tensors_are_what_the_caller_expects(tmp_path: Path) -> None:
    made(tmp_path)
    for base in ({}, {**cases.BASE, "more": TensorSpec(torch.float64, ("p",))}):
        with pytest.raises(MemoryFormatError, match="missing, too many"):
            MemoryStore(tmp_path).read(base, cases.CURRENT)
    other = {**cases.CURRENT, "omega": TensorSpec(torch.float64, ("n",))}
    with pytest.raises(MemoryFormatError, match="omega"):
        MemoryStore(tmp_path).read(cases.BASE, other)


def test_a_memory_that_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    store = made(tmp_path)
    with pytest.raises(StateError, match="overwrite=True"):
        MemoryStore(tmp_path).create(cases.content())
    assert cases.same(cases.read(tmp_path), cases.content(3, 3))
    other = replace(cases.content(1, 1), memory_id="ab" * 8)
    MemoryStore(tmp_path).create(other, cases.model(1), overwrite=True)
    assert cases.same(cases.read(tmp_path), other)
    assert len(list(tmp_path.glob("base-*"))) == 1
    with pytest.raises(StateError, match="another memory"):
        store.commit(1, cases.current(2), [cases.request(2)])
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert checkpoint["lightning_muter"] == {"memory": "ab" * 8, "generation": 1}


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_the_old_memory_stays_until_the_new_one_is_complete(
    kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(tmp_path)
    before = names(tmp_path)

    def half(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise kind("no space left")

    def late(*args: Any) -> None:
        raise kind("no space left")

    for place, how in (("base_file.save_file", half), ("database.put", late)):
        monkeypatch.setattr(f"lightning_muter.memory.{place}", how)
        for write in (
            lambda: store.create(cases.content(), overwrite=True),
            lambda: store.replace(3, cases.content(4, 0)),
            lambda: MemoryStore(tmp_path / "new").create(cases.content()),
        ):
            with pytest.raises(StateError if kind is OSError else kind):
                write()
        monkeypatch.undo()
        assert cases.same(cases.read(tmp_path), cases.content(3, 3))
        assert names(tmp_path) - {"memory.sqlite-wal", "memory.sqlite-shm", "new"} == before
        assert names(tmp_path / "new") == {"memory.lock"}


def test_what_json_cannot_keep_is_refused_before_a_file_is_touched(tmp_path: Path) -> None:
    store = made(tmp_path)
    with pytest.raises(TypeError):
        store.commit(3, cases.current(4), [Request({"x": object()}, [], {})])
    with pytest.raises(TypeError):
        store.replace(3, replace(cases.content(4), facts={"x": object()}))
    assert cases.same(cases.read(tmp_path), cases.content(3, 3))


def test_a_stale_memory_is_refused(tmp_path: Path) -> None:
    first, second = made(tmp_path), MemoryStore(tmp_path)
    second.read(cases.BASE, cases.CURRENT)
    first.commit(3, cases.current(4), [cases.request(4)])
    for write in (
        lambda: second.commit(3, cases.current(4), [cases.request(4)]),
        lambda: second.replace(3, cases.content(4)),
        lambda: second.write_model(3, cases.model(3)),
    ):
        with pytest.raises(StateError, match=r"generation 4.*generation 3.*load the memory again"):
            write()
    assert cases.same(cases.read(tmp_path), cases.content(4, 4))
    with pytest.raises(StateError, match="omega"):
        second.commit(4, cases.current(5, p=4), [cases.request(5)])
    with pytest.raises(StateError, match="another memory"):
        second.replace(4, replace(cases.content(5), memory_id="0" * 8))
    assert second.commit(4, cases.current(5), [cases.request(5)]) == 5


def test_nothing_of_what_was_replaced_is_in_the_folder(tmp_path: Path) -> None:
    secret = [bytes(torch.randint(256, (48,), dtype=torch.uint8).tolist()) for _ in range(3)]
    rows, old, key = secret
    factor = torch.tensor(list(rows * 300), dtype=torch.uint8)
    content = replace(cases.content(), key=key)
    content.base["digests"] = torch.tensor(list(old + old[:32]), dtype=torch.uint8).reshape(5, 16)
    store = MemoryStore(tmp_path)
    store.create(content)
    for g in range(6):
        entry = {"request": g + 1, "indices": [987_654_321]}
        store.commit(g, cases.current(g + 1), [Request(entry, [], {"rows": factor})])

    def found(pattern: bytes) -> list[str]:
        return [path.name for path in tmp_path.iterdir() if pattern in path.read_bytes()]

    patterns = [rows, old, key, b"987654321"]
    assert all(found(one) for one in patterns)
    assert store.replace(6, cases.content(7)) == 7
    assert [found(one) for one in patterns] == [[], [], [], []]
    cases.check_whole(cases.read(tmp_path))


def test_a_replacement_that_was_not_cleaned_up_is_by_the_next_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(tmp_path)
    store.commit(3, cases.current(4), [replace(cases.request(4), entry={"x": "q" * 9000})])
    reader = sqlite3.connect(tmp_path / "memory.sqlite")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM meta").fetchall()
    monkeypatch.setattr("lightning_muter.memory.connections._ERASURE_WAIT", 0.01)
    assert store.replace(4, cases.content(5)) == 5
    assert b"q" * 100 in (tmp_path / "memory.sqlite").read_bytes()
    cases.check_whole(cases.read(tmp_path))
    reader.close()
    with store.writing():
        pass
    assert not any(b"q" * 100 in path.read_bytes() for path in tmp_path.iterdir())


def test_strays_of_a_crash_are_removed(tmp_path: Path) -> None:
    store = made(tmp_path)
    stray = tmp_path / f"base-{'0' * 32}.safetensors"
    (tmp_path / "base.new").mkdir()
    for path in (stray, tmp_path / "base.new" / ".tmpx", tmp_path / "memory.sqlite.new-wal"):
        path.write_bytes(b"stray")
    (tmp_path / "model.ckpt.new").write_bytes(b"stray")
    (tmp_path / "mine.new").write_bytes(b"no stray")
    kept = {"memory.sqlite", "model.ckpt", "memory.lock", "mine.new"}
    with store.writing():
        base = next(tmp_path.glob("base-*")).name
        assert names(tmp_path) - {"memory.sqlite-wal", "memory.sqlite-shm"} == {*kept, base}
    assert base != stray.name and cases.same(cases.read(tmp_path), cases.content(3, 3))


def test_bases_of_a_damaged_memory_are_kept(tmp_path: Path) -> None:
    store = made(tmp_path)
    stray = tmp_path / f"base-{'0' * 32}.safetensors"
    stray.write_bytes(b"")
    (tmp_path / "memory.sqlite").write_bytes(b"damaged" * 100)
    with store.writing():
        assert len(list(tmp_path.glob("base-*"))) == 2
    with pytest.raises(MemoryFormatError, match="backup"):
        store.commit(3, cases.current(4), [cases.request(4)])
    store.create(cases.content(), overwrite=True)
    assert cases.same(cases.read(tmp_path), cases.content())
    assert len(list(tmp_path.glob("base-*"))) == 1


def test_a_clean_up_that_fails_is_no_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(tmp_path)

    def fail(*args: Any, **options: Any) -> None:
        raise PermissionError("held by another process")

    monkeypatch.setattr(Path, "unlink", fail)
    monkeypatch.setattr("shutil.rmtree", fail)
    monkeypatch.setattr("lightning_muter.memory.connections._cleaning", fail)
    assert store.commit(3, cases.current(4), [cases.request(4)]) == 4
    assert store.replace(4, cases.content(5)) == 5
    monkeypatch.undo()
    cases.check_whole(cases.read(tmp_path))
    assert len(list(tmp_path.glob("base-*"))) == 2
    assert store.commit(5, cases.current(6), [cases.request(6)]) == 6
    assert len(list(tmp_path.glob("base-*"))) == 1


def test_a_reader_whose_base_is_gone_takes_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, load = made(tmp_path), base_file.load
    left = [5, 4, 3]

    def slow(folder: Path, base: base_file.BaseFile) -> Any:
        if left:
            generation = store._meta().generation
            left.pop()
            store.replace(generation, cases.content(generation + 1))
        return load(folder, base)

    monkeypatch.setattr(base_file, "load", slow)
    found = cases.read(tmp_path)
    assert found.generation == 6
    cases.check_whole(found)
    store.replace(6, cases.content(7))
    assert int(found.base["matrix"][0, 0]) == 6  # what was read stays
    next(tmp_path.glob("base-*")).unlink()
    with pytest.raises(MemoryFormatError, match="missing"):
        cases.read(tmp_path)


def test_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    before = os.umask(0)
    try:
        store = made(folder)
        store.commit(3, cases.current(4), [cases.request(4)])
        store.repair_model({"head.weight": torch.zeros(3)})
        store.replace(4, cases.content(5))
        cases.read(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    finally:
        os.umask(before)


def test_reading_changes_no_file_and_makes_none_where_no_memory_is(tmp_path: Path) -> None:
    with pytest.raises(MemoryFormatError, match="no memory.sqlite"):
        cases.read(tmp_path)
    with pytest.raises(MemoryFormatError, match="no memory.sqlite"):
        cases.read(tmp_path / "nowhere")
    with pytest.raises(MemoryFormatError):
        MemoryStore(tmp_path / "nowhere").commit(0, cases.current(1), [])
    assert not MemoryStore(tmp_path).exists() and names(tmp_path) == set()
    made(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cases.read(tmp_path)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    before = names(tmp_path)
    assert cases.same(cases.read(tmp_path), cases.content(3, 3))
    assert names(tmp_path) == before


def test_a_folder_that_cannot_be_written_and_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(tmp_path / "memory")
    reader = sqlite3.connect(store.folder / "memory.sqlite")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM meta").fetchall()
    store.commit(3, cases.current(4), [cases.request(4)])
    copy = cases.copy_of(store.folder, tmp_path / "copy")
    reader.close()
    (copy / "memory.sqlite-shm").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        with pytest.raises(StateError, match="copy the folder"):
            cases.read(copy)
    assert cases.same(cases.read(copy), cases.content(4, 4))


def test_an_older_format_names_the_way_out(tmp_path: Path) -> None:
    for name in ("manifest.json", "ledger.jsonl", "state-000001-0123abcd.safetensors"):
        (tmp_path / name).write_text("{}")
    store = MemoryStore(tmp_path)
    assert store.exists()
    for read in (
        lambda: cases.read(tmp_path),
        lambda: store.commit(0, cases.current(1), []),
        store.model_generation,
    ):
        with pytest.raises(MemoryFormatError, match=r"lightning-muter 0\.1.*rebuild"):
            read()
    with pytest.raises(StateError, match="overwrite"):
        store.create(cases.content())
    store.create(cases.content(), overwrite=True)
    assert cases.same(cases.read(tmp_path), cases.content())
    assert not list(tmp_path.glob("*.json*")) and not list(tmp_path.glob("state-*"))


def test_a_copy_by_hand_is_a_memory(tmp_path: Path) -> None:
    store = made(tmp_path / "memory")
    store.commit(3, cases.current(4), [cases.request(4)])
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (tmp_path / "memory").iterdir():
        if path.name.endswith((".sqlite", ".safetensors")):
            (copy / path.name).write_bytes(path.read_bytes())
    assert cases.same(cases.read(copy), cases.content(4, 4))
