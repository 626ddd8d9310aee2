"""A memory's folder: what was written is read, and whatever was altered is refused."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muter import L2Ball, MemoryFormatError, UnlearningMemory
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.memory.memory import Start
from lightning_muter.memory.store import FORMAT_VERSION
from lightning_muter.spec import Settings


def small_memory() -> UnlearningMemory:
    settings = Settings(
        method="muter",
        threat=L2Ball(0.5, data_range=(0.0, float("inf"))),
        head="head",
        parameters=None,
        loss="cross_entropy",
        response="constrained",
        inverse="neumann",
        neumann_order=3,
        space="input",
        damping=0.0,
        solver="auto",
        weight_decay=0.01,
    )
    omega = torch.arange(3, dtype=torch.float64)
    memory = UnlearningMemory(
        settings=settings,
        omega_star=omega,
        omega=omega,
        curvature=DenseCurvature(torch.eye(3, dtype=torch.float64)),
        gradient=torch.zeros(3, dtype=torch.float64),
        residual_gradient=torch.ones(3, dtype=torch.float64),
        digests=torch.arange(96, dtype=torch.uint8).reshape(6, 16),
        removed=torch.zeros(6, dtype=torch.bool),
        weights=torch.ones(6, dtype=torch.float64),
        start=Start(omega + 1, omega - 1),
        key=b"k" * 16,
        fingerprint="f" * 32,
        summary={"n": 6, "residual": 0.25, "largest": float("nan")},
        warnings=("the ascent did not settle",),
    )
    for indices in ([1], [4, 2]):
        assert memory.curvature is not None
        removed, step = RemovedPoints(shift=0.1), torch.full_like(omega, 0.1)
        curvature, entry = memory.curvature.without(removed), {"status": "converged"}
        memory = memory.forget(indices, curvature, removed, step, memory.omega + step, entry)
    return memory


def same(a: UnlearningMemory, b: UnlearningMemory) -> bool:
    mine, other = a.tensors(), b.tensors()
    plain = ("settings", "key", "fingerprint", "ledger", "warnings")
    return (
        mine.keys() == other.keys()
        and all(torch.equal(mine[name], other[name]) for name in mine)
        and all(getattr(a, name) == getattr(b, name) for name in plain)
        and json.dumps(a.summary) == json.dumps(b.summary)
    )


def refused_or_same(folder: Path, expected: UnlearningMemory) -> None:
    """The promise of every mutation; anything else than the two is a failure."""
    try:
        found = UnlearningMemory.load(folder)
    except MemoryFormatError as error:
        assert len(str(error)) > 30
        return
    assert same(found, expected)


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


def test_a_memory_reads_back(tmp_path: Path) -> None:
    memory = small_memory()
    memory.save(tmp_path)
    found = UnlearningMemory.load(tmp_path)
    assert same(found, memory) and found.remaining == [0, 3, 5]
    assert found.warnings == ("the ascent did not settle",)
    assert "tensor" not in repr(found)
    found.save(tmp_path)
    assert same(UnlearningMemory.load(tmp_path), memory)
    assert len(list(tmp_path.glob("state-*"))) == 1


def test_every_edit_of_the_manifest_is_refused(tmp_path: Path) -> None:
    small_memory().save(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    tried = 0
    for edited in mutations(manifest):
        path.write_text(json.dumps(edited))
        with pytest.raises(MemoryFormatError):
            UnlearningMemory.load(tmp_path)
        tried += 1
    assert tried > 250


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '"x"', "[" * 100_000, "\xff"])
def test_other_files_in_the_manifests_place(content: str, tmp_path: Path) -> None:
    small_memory().save(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(MemoryFormatError):
        UnlearningMemory.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("eps", 5.0), ("weight_decay", 0.1), ("summary", {}), ("n", 7)]
)
def test_the_settings_a_result_hangs_on_are_protected(
    field: str, value: Any, tmp_path: Path
) -> None:
    small_memory().save(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    place = next(
        one
        for one in (manifest, manifest["settings"], manifest["settings"]["threat"])
        if field in one
    )
    place[field] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(MemoryFormatError, match="checksum"):
        UnlearningMemory.load(tmp_path)


def test_every_edit_of_the_ledger_is_refused_or_harmless(tmp_path: Path) -> None:
    memory = small_memory()
    memory.save(tmp_path)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    others = [
        [lines[1], lines[0]],
        [*lines, lines[1]],
        [lines[0], lines[0]],
        [lines[0], *lines],
        lines[:1],
        [],
        [*lines, "\n"],
        [*lines, "null\n"],
        [*lines, "{}\n"],
    ]
    for k, line in enumerate(lines):
        for edited in mutations(json.loads(line)):
            others.append([*lines[:k], json.dumps(edited) + "\n", *lines[k + 1 :]])
    for other in others:
        path.write_text("".join(other))
        with pytest.raises(MemoryFormatError):
            UnlearningMemory.load(tmp_path)
    assert len(others) > 60
    path.unlink()
    with pytest.raises(MemoryFormatError):
        UnlearningMemory.load(tmp_path)


def test_a_write_that_stopped_before_the_manifest_is_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = small_memory()
    memory.save(tmp_path)
    later = memory.forget(
        [0], memory.curvature, RemovedPoints(), memory.gradient, memory.omega, {"status": "x"}
    )
    replace_file = os.replace

    def killed(source: Any, target: Any) -> None:
        if str(target).endswith("manifest.json"):
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        later.save(tmp_path)
    monkeypatch.undo()
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 3
    assert same(UnlearningMemory.load(tmp_path), memory)
    assert len(list(tmp_path.glob("state-*"))) == 1
    later.save(tmp_path)
    assert same(UnlearningMemory.load(tmp_path), later)


def test_bytes_of_the_state_file(tmp_path: Path) -> None:
    memory = small_memory()
    memory.save(tmp_path)
    (state,) = tmp_path.glob("state-*")
    content = state.read_bytes()
    for position in range(0, len(content), 37):
        altered = bytearray(content)
        altered[position] ^= 1
        state.write_bytes(bytes(altered))
        with pytest.raises(MemoryFormatError):
            UnlearningMemory.load(tmp_path)
    state.write_bytes(content)
    assert same(UnlearningMemory.load(tmp_path), memory)


def resealed(folder: Path, change: dict[str, Any]) -> None:
    """A manifest whose checksum was made to fit what was altered."""
    from lightning_muter.memory import store

    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **change}
    manifest.pop("checksum")
    manifest["checksum"] = store._blake2b(store._canonical(manifest))
    path.write_text(json.dumps(manifest))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_the_state_is_a_file_of_the_folder_and_no_pipe(tmp_path: Path) -> None:
    folder, outside = tmp_path / "memory", tmp_path / "state-000002-00000000.safetensors"
    small_memory().save(folder)
    (state,) = folder.glob("state-*")
    outside.write_bytes(state.read_bytes())
    os.mkfifo(folder / "state-000002-11111111.safetensors")
    os.mkfifo(folder / "pipe")
    fifo = "state-000002-11111111.safetensors"
    for name in (f"../{outside.name}", str(outside), "pipe", fifo, "", ".", "ledger.jsonl"):
        resealed(folder, {"state": name})
        with pytest.raises(MemoryFormatError):
            UnlearningMemory.load(folder)
    resealed(folder, {"state": state.name})
    UnlearningMemory.load(folder)
    (folder / "ledger.jsonl").unlink()
    os.mkfifo(folder / "ledger.jsonl")
    with pytest.raises(MemoryFormatError):
        UnlearningMemory.load(folder)


def test_resealed_settings_give_no_raw_error(tmp_path: Path) -> None:
    memory = small_memory()
    memory.save(tmp_path)
    settings = json.loads((tmp_path / "manifest.json").read_text())["settings"]
    for edited in mutations(settings):
        resealed(tmp_path, {"settings": edited})
        try:
            found = UnlearningMemory.load(tmp_path)
        except (MemoryFormatError, ValueError) as error:  # a ConfigurationError names the way out
            assert "MUterCallback" in str(error) or isinstance(error, MemoryFormatError)
        else:
            assert found.settings.to_dict() == edited
    resealed(tmp_path, {"settings": settings})
    for sizes in ({"p": 4}, {"n": 5}, {"p": 0}, {"n": 10**18}, {"key": "zz"}, {"warnings": [1]}):
        before = (tmp_path / "manifest.json").read_text()
        resealed(tmp_path, sizes)
        with pytest.raises(MemoryFormatError):
            UnlearningMemory.load(tmp_path)
        (tmp_path / "manifest.json").write_text(before)


def test_an_older_format_names_the_way_out(tmp_path: Path) -> None:
    small_memory().save(tmp_path)
    resealed(tmp_path, {"format_version": FORMAT_VERSION - 1})
    with pytest.raises(MemoryFormatError, match="release that wrote it, or rebuild"):
        UnlearningMemory.load(tmp_path)


def test_what_json_cannot_keep_is_refused_before_a_file_is_touched(tmp_path: Path) -> None:
    memory = small_memory()
    memory.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        replace(memory, summary={"x": object()}).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_clean_up_that_fails_is_no_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = small_memory()
    memory.save(tmp_path)

    def fail(*args: Any, **options: Any) -> None:
        raise PermissionError("held by another process")

    monkeypatch.setattr(Path, "unlink", fail)
    later = copy.copy(memory).at(memory.omega + 1)
    later.save(tmp_path)
    assert same(UnlearningMemory.load(tmp_path), later)
