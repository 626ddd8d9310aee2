"""Small memories in a folder, an invariant of every state of them, and ways to damage them."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_muter.errors import MemoryFormatError
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.records import Content, Request
from lightning_muter.memory.tensors import TensorSpec

F = torch.float64
BASE = {
    "matrix": TensorSpec(F, ("p", "p")),
    "digests": TensorSpec(torch.uint8, ("n", "16")),
    "initial": TensorSpec(F, ("p",), optional=True),
}
CURRENT = {"omega": TensorSpec(F, ("p",)), "gradient": TensorSpec(F, ("p",))}
ID = "5eed" * 8


def current(generation: int, p: int = 3) -> dict[str, Tensor]:
    return {"omega": torch.full((p,), generation, dtype=F), "gradient": torch.ones(p, dtype=F)}


def request(generation: int) -> Request:
    """The request that led to a generation."""
    factor = torch.full((2, 3), generation, dtype=torch.float32)
    tensors = {"rows": factor, "kept": torch.tensor([True, False]), "at": torch.tensor(generation)}
    return Request({"request": generation, "indices": [generation]}, [{"rank": 2}], tensors)


def content(generation: int = 0, requests: int = 0, p: int = 3, n: int = 5) -> Content:
    """A memory whose base is ``requests`` generations older than it is."""
    before = generation - requests
    return Content(
        base={
            "matrix": torch.full((p, p), before, dtype=F),
            "digests": torch.arange(n * 16, dtype=torch.uint8).reshape(n, 16),
        },
        current=current(generation, p),
        requests=tuple(request(before + k + 1) for k in range(requests)),
        facts={"settings": {"eps": 0.5, "range": [0.0, float("inf")]}, "worst": float("nan")},
        key=b"k" * 16,
        sizes={"p": p, "n": n},
        memory_id=ID,
        generation=generation,
    )


def model(generation: int, p: int = 3) -> dict[str, Any]:
    weight = torch.full((p,), generation, dtype=torch.float32)
    return {"state_dict": {"head.weight": weight, "frozen": torch.ones(2)}, "epoch": 3}


def read(folder: Path | str) -> Content:
    return MemoryStore(folder).read(BASE, CURRENT)


def check_whole(found: Content) -> None:
    """What holds at every generation of a memory that only the functions here wrote."""
    before = int(found.base["matrix"][0, 0])
    assert int(found.current["omega"][0]) == found.generation
    assert len(found.requests) == found.generation - before
    served = [one.entry["request"] for one in found.requests]
    assert served == list(range(before + 1, found.generation + 1))
    assert all(int(one.tensors["at"]) == one.entry["request"] for one in found.requests)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def same(a: Content, b: Content) -> bool:
    plain = ("key", "sizes", "memory_id", "generation")
    return (
        same_tensors(a.base, b.base)
        and same_tensors(a.current, b.current)
        and all(getattr(a, name) == getattr(b, name) for name in plain)
        and json.dumps(a.facts) == json.dumps(b.facts)
        and len(a.requests) == len(b.requests)
        and all(
            (x.entry, x.facts) == (y.entry, y.facts) and same_tensors(x.tensors, y.tensors)
            for x, y in zip(a.requests, b.requests, strict=True)
        )
    )


def refused_or_same(folder: Path, expected: Content) -> bool:
    """The promise of every mutation: whether the folder was refused."""
    try:
        found = read(folder)
    except MemoryFormatError as error:
        assert len(str(error)) > 40
        return True
    assert same(found, expected)
    return False


# --- damage -------------------------------------------------------------------------------------


class Damage:
    """Puts a folder's files back, and damages them in ways drawn from a seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.names = ["memory.sqlite", next(folder.glob("base-*")).name]
        self.intact = {name: (folder / name).read_bytes() for name in self.names}

    def restore(self) -> None:
        for companion in ("-wal", "-shm", "-journal"):
            (self.folder / f"memory.sqlite{companion}").unlink(missing_ok=True)
        for name, data in self.intact.items():
            self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        (self.folder / name).unlink(missing_ok=True)  # a file that is truncated is flushed: slow
        (self.folder / name).write_bytes(data)

    def bytes(self) -> None:
        """One file with other bytes."""
        name = self.random.choices(self.names, weights=[4, 1])[0]
        self._write(name, self._altered(bytearray(self.intact[name])))

    def _altered(self, data: bytearray) -> bytes:
        draw = self.random
        at, to = sorted(draw.choices(range(len(data)), k=2))
        kind = draw.randrange(7)
        if kind <= 2:
            for _ in range(draw.choice([1, 1, 1, 8])):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:to] = bytes(to - at)
        elif kind == 5:
            size = draw.choice([512, 1024, 4096])
            one, other = (size * draw.randrange(max(1, len(data) // size)) for _ in range(2))
            pages = data[one : one + size], data[other : other + size]
            data[other : other + size], data[one : one + size] = pages
        else:
            data += bytes(data[at:to] if draw.random() < 0.5 else data)
        return bytes(data)

    def rows(self) -> None:
        """One cell of another value or type, or one row too many, too few, or elsewhere."""
        with sqlite3.connect(self.folder / "memory.sqlite") as connection:
            connection.execute("PRAGMA synchronous=OFF")
            self._edit(connection)
        connection.close()

    def _edit(self, connection: sqlite3.Connection) -> None:
        draw = self.random
        kind = draw.randrange(8)
        numbers = [row[0] for row in connection.execute("SELECT number FROM requests")]
        if kind == 0:
            one, other = draw.sample(numbers, 2)
            connection.execute("UPDATE requests SET number = -1 WHERE number = ?", (one,))
            connection.execute("UPDATE requests SET number = ? WHERE number = ?", (one, other))
            connection.execute("UPDATE requests SET number = ? WHERE number = -1", (other,))
        elif kind == 1:
            connection.execute("DELETE FROM requests WHERE number = ?", (draw.choice(numbers),))
        elif kind == 2:
            connection.execute(
                "INSERT INTO requests SELECT ?, entry, facts, tensors, chain FROM requests "
                "WHERE number = ?",
                (draw.choice([0, -3, len(numbers) + 1, 2**62]), draw.choice(numbers)),
            )
        else:
            table = draw.choice(["meta", "meta", "requests"])
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            column = draw.choice(columns)
            (value,) = connection.execute(f"SELECT {column} FROM {table} LIMIT 1").fetchone()
            sql = f"UPDATE OR IGNORE {table} SET {column} = ?"
            with suppress(sqlite3.IntegrityError):  # a key that is no integer
                connection.execute(sql, (draw.choice(list(others(value))),))


def others(value: Any) -> Iterator[Any]:
    """Other values in a cell's place: near ones, and ones of another type."""
    yield from (
        None,
        0,
        -1,
        2**63 - 1,
        0.5,
        float("inf"),
        "",
        "x",
        "\x00",
        b"",
        b"\xff",
        "[" * 5000,
    )
    if isinstance(value, int):
        yield from (value + 1, value * 10 + 3, str(value))
    elif isinstance(value, str):
        yield from (value[::-1], value + " ", value.upper(), value.encode(), value * 2)
    elif isinstance(value, bytes) and value:
        yield from (value[::-1], value + b"\x00", value[1:], value.hex(), value * 2)
        yield bytes([value[0] ^ 1]) + value[1:]


def copy_of(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to
