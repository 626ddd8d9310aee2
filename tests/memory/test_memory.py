"""A memory as a value and in its folder: what was written is read, in one step after another."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_memories import forgotten, same, small_memory

from lightning_muter import MemoryFormatError, StateError, UnlearningMemory
from lightning_muter.memory import database, schema
from lightning_muter.memory.content import content_of
from lightning_muter.memory.folder import MemoryStore


def edits(value: Any) -> Iterator[Any]:
    """Other values in a field's place: near ones, and ones of another type."""
    if isinstance(value, bool) or value is None:
        yield from (not value, 0, "x")
    elif isinstance(value, (int, float)):
        yield from (value + 1, value * 10 + 1, -1, str(value), None, [value], True, 10**400)
    elif isinstance(value, str):
        yield from (value[::-1] + "0", "", value + "0", 7, None, ["x"], {"own": value}, "\x00")
    elif isinstance(value, list):
        yield from ([*value, value[0] if value else 0], value[:-1] or None, {}, "x")
    else:
        yield from ({}, [], None, {**value, "more": 1}, "x")


def mutations(content: Any) -> Iterator[Any]:
    """The content with one field changed, dropped or added, at any depth."""
    if not isinstance(content, dict):
        return
    yield {**content, "added": 1}
    for name, value in content.items():
        yield {k: v for k, v in content.items() if k != name}
        for other in edits(value):
            if json.dumps(other) != json.dumps(value):
                yield {**content, name: other}
        for inner in mutations(value):
            yield {**content, name: inner}


def test_requests_are_appended_and_read_back_bit_for_bit(tmp_path: Path) -> None:
    memory = small_memory().save(tmp_path)
    (base,) = tmp_path.glob("base-*.safetensors")
    before = base.read_bytes()
    for indices in ([1], [4, 2]):
        memory = forgotten(memory, indices).commit(MemoryStore(tmp_path, memory.memory_id))
        assert same(UnlearningMemory.load(tmp_path), memory)
    assert memory.generation == 2 and memory.pending == () and memory.remaining == [0, 3, 5]
    assert base.read_bytes() == before  # a request writes its factors, not the matrix
    assert [entry["indices"] for entry in memory.ledger] == [[1], [4, 2]]
    assert "tensor" not in repr(memory)


def test_several_requests_go_into_one_commit(tmp_path: Path) -> None:
    memory = small_memory().save(tmp_path)
    later = forgotten(forgotten(memory, [1]), [2]).annotated({"note": "two"})
    kept = later.commit(MemoryStore(tmp_path, memory.memory_id))
    assert kept.generation == 1 and [e["note"] for e in kept.ledger] == ["two", "two"]
    assert same(UnlearningMemory.load(tmp_path), kept)


def test_an_older_memory_cannot_be_committed(tmp_path: Path) -> None:
    memory = small_memory().save(tmp_path)
    store = MemoryStore(tmp_path, memory.memory_id)
    kept = forgotten(memory, [1]).commit(store)
    with pytest.raises(StateError, match="generation 1.*generation 0"):
        forgotten(memory, [2]).commit(store)
    assert same(UnlearningMemory.load(tmp_path), kept)


def test_a_folder_with_a_memory_is_not_overwritten_unasked(tmp_path: Path) -> None:
    memory = small_memory().save(tmp_path)
    kept = forgotten(memory, [1]).commit(MemoryStore(tmp_path, memory.memory_id))
    other = small_memory()
    with pytest.raises(StateError, match="holds a memory already"):
        other.save(tmp_path)
    assert same(UnlearningMemory.load(tmp_path), kept)
    assert same(UnlearningMemory.load(tmp_path), kept)
    saved = other.save(tmp_path, overwrite=True)
    assert same(UnlearningMemory.load(tmp_path), saved)


def test_a_memory_that_served_requests_is_saved_whole(tmp_path: Path) -> None:
    """The forgotten points' factors go into the matrix: a new folder starts without them."""
    memory = forgotten(forgotten(small_memory(), [1]), [3])
    saved = memory.save(tmp_path)
    found = UnlearningMemory.load(tmp_path)
    assert same(found, saved) and found.remaining == [0, 2, 4, 5]
    assert found.curvature is not None and memory.curvature is not None
    assert found.curvature.removed.empty
    torch.testing.assert_close(found.curvature.matrix, memory.curvature.matrix)
    again = forgotten(found, [0]).replace_in(MemoryStore(tmp_path, found.memory_id))
    assert same(UnlearningMemory.load(tmp_path), again) and again.generation == 1


def test_the_parameters_by_their_names() -> None:
    state = small_memory().state()
    assert {name: value.tolist() for name, value in state.items()} == {
        "head.weight": [[0.0, 1.0]],
        "head.bias": [2.0],
    }


def test_altered_settings_give_no_raw_error(tmp_path: Path) -> None:
    """Even where somebody made every checksum fit what was altered."""
    memory = small_memory().save(tmp_path)
    store = MemoryStore(tmp_path, memory.memory_id)
    content, tried = content_of(vars(memory)), 0
    for edited in mutations(content.facts["settings"]):
        generation = store.newest()[1]
        store.replace(generation, replace(content, facts={**content.facts, "settings": edited}))
        tried += 1
        try:
            found = UnlearningMemory.load(tmp_path)
        except (MemoryFormatError, ValueError) as error:  # a ConfigurationError names the way out
            assert "MUterCallback" in str(error) or isinstance(error, MemoryFormatError)
        else:
            assert found.settings.to_dict() == edited
    assert tried > 100
    flow = content.facts["flow"]
    for edited in (None, {}, {**flow, "pace": "miles"}, {**flow, "times": [1.0]},
                   {**flow, "shares": [0.5, 0.25]}, {**flow, "times": [-1.0, 2.0]},
                   {**flow, "times": ["a", "b"]}):  # fmt: skip
        facts = {**content.facts, "flow": edited}
        store.replace(store.newest()[1], replace(content, facts=facts))
        with pytest.raises(MemoryFormatError, match="is damaged"):
            UnlearningMemory.load(tmp_path)
    for name in content.facts:
        facts = {key: value for key, value in content.facts.items() if key != name}
        store.replace(store.newest()[1], replace(content, facts=facts))
        if name != "versions":
            with pytest.raises(MemoryFormatError, match="is damaged"):
                UnlearningMemory.load(tmp_path)


def test_what_json_cannot_keep_is_refused_before_a_file_is_touched(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        replace(small_memory(), summary={"x": object()}).save(tmp_path / "new")
    assert [path.name for path in tmp_path.glob("new/*")] == ["memory.lock"]


def test_a_folder_from_before_a_memory_kept_its_flow_is_of_another_format(tmp_path: Path) -> None:
    """It is not damaged: it says what wrote it, and a new memory may take its place."""
    small_memory().save(tmp_path)
    connection = sqlite3.connect(tmp_path / schema.NAME)
    with connection:
        meta = database.read_meta(connection)
        facts = {name: one for name, one in json.loads(meta.facts).items() if name != "flow"}
        database.put(connection, replace(meta, facts=json.dumps(facts)))
        connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(MemoryFormatError, match="version 3, 5 is expected.*rebuild the memory"):
        UnlearningMemory.load(tmp_path)
    with pytest.raises(StateError, match="overwrite"):
        small_memory().save(tmp_path)
    saved = small_memory().save(tmp_path, overwrite=True)
    assert same(UnlearningMemory.load(tmp_path), saved)
