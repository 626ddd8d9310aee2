"""What a memory's folder holds, and how its rows are chained and sealed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any

from torch import Tensor

from lightning_muter.errors import MemoryFormatError, StateError
from lightning_muter.memory.base_file import BaseFile
from lightning_muter.memory.tensors import pack, unpack

__all__ = [
    "START",
    "Content",
    "Meta",
    "Request",
    "RequestRow",
    "chained",
    "check_same_kind",
    "digest",
    "served",
]

START = b"\x00" * 32  # what the first request of a chain follows
_MEMORY_ID = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class Request:
    """One line of the ledger, and what the request took out of the curvature.

    Attributes:
        entry: as JSON; what was asked and what came of it.
        facts: as JSON; what the tensors are of, [] where nothing is kept.
        tensors: by name, of any shapes.
    """

    entry: dict[str, Any]
    facts: list[dict[str, Any]]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Content:
    """What a folder holds.

    Attributes:
        base: the tensors that no request changes.
        current: the tensors that every request replaces.
        requests: in the order in which they were served.
        facts: as JSON; NaN and Infinity survive.
        key: the secret of the digests and commitments.
        sizes: what the letters in the tensors' shapes stand for.
        memory_id: hexadecimal, drawn when a memory is created; a rebase keeps it.
        generation: 0 when created, one more with every commit, fold or rebase.
    """

    base: dict[str, Tensor]
    current: dict[str, Tensor]
    requests: tuple[Request, ...]
    facts: dict[str, Any]
    key: bytes
    sizes: dict[str, int]
    memory_id: str
    generation: int


@dataclass(frozen=True)
class RequestRow:
    """A request as the database keeps it; ``chain`` follows from the row before and this one."""

    number: int
    entry: str
    facts: str
    tensors: bytes
    chain: bytes

    def link(self, before: bytes) -> bytes:
        """What the chain of this row has to be after a row with the chain ``before``."""
        return digest(before, self.number, self.entry, self.facts, self.tensors)


@dataclass(frozen=True)
class Meta:
    """The one row that says what the memory is; sealed by a checksum over all of it."""

    memory_id: str
    generation: int
    model_generation: int | None
    base: str
    base_size: int
    base_blake2b: bytes
    key: bytes
    facts: str
    sizes: str
    current: bytes
    requests: int
    chain: bytes

    @property
    def base_file(self) -> BaseFile:
        """The base that belongs to this row."""
        return BaseFile(self.base, self.base_size, self.base_blake2b)

    def seal(self) -> bytes:
        """A digest of every field."""
        return digest(*astuple(self))

    def check(self) -> None:
        """Refuse values that no memory writes, whatever the checksum says.

        Raises:
            MemoryFormatError: with what was found.
        """
        self.base_file.check()
        model = self.model_generation
        if (
            _MEMORY_ID.fullmatch(self.memory_id) is None
            or min(self.generation, self.requests, self.base_size) < 0
            or (model is not None and not 0 <= model <= self.generation)
        ):
            raise MemoryFormatError(
                f"memory.sqlite says it is memory {self.memory_id!r} at generation "
                f"{self.generation} with {self.requests} requests and a model of generation "
                f"{model}, which no memory is: restore a backup"
            )

    def after(self, rows: list[RequestRow], current: dict[str, Tensor]) -> Meta:
        """The row once requests were appended: the next generation."""
        return replace(
            self,
            generation=self.generation + 1,
            requests=self.requests + len(rows),
            chain=rows[-1].chain if rows else self.chain,
            current=pack(current),
        )

    @classmethod
    def of(cls, content: Content, base: BaseFile, rows: list[RequestRow]) -> Meta:
        """The row of a content whose base and requests are given as they are kept."""
        meta = cls(
            memory_id=content.memory_id,
            generation=content.generation,
            model_generation=None,
            base=base.name,
            base_size=base.size,
            base_blake2b=base.blake2b,
            key=content.key,
            facts=json.dumps(content.facts),
            sizes=json.dumps(content.sizes),
            current=pack(content.current),
            requests=len(rows),
            chain=rows[-1].chain if rows else START,
        )
        meta.check()
        meta.read_sizes()
        return meta

    def read_sizes(self) -> dict[str, int]:
        """What the letters in the tensors' shapes stand for.

        Raises:
            MemoryFormatError: they are not whole numbers of at least 1.
        """
        sizes = json.loads(self.sizes)
        if not isinstance(sizes, dict) or not all(
            type(one) is int and one >= 1 for one in sizes.values()
        ):
            raise MemoryFormatError(
                f"memory.sqlite says the sizes {self.sizes:.200}, numbers of at least 1 are "
                "expected: restore a backup"
            )
        return sizes

    def read_facts(self) -> dict[str, Any]:
        """The facts of the memory.

        Raises:
            MemoryFormatError: they are no JSON object.
        """
        facts = json.loads(self.facts)
        if not isinstance(facts, dict):
            raise MemoryFormatError(
                f"memory.sqlite holds a {type(facts).__name__} for the memory's facts, an object "
                "is expected: restore a backup"
            )
        return facts


def chained(requests: Iterable[Request], before: bytes, count: int) -> list[RequestRow]:
    """Requests as rows that follow ``count`` others, the last of which has the chain ``before``."""
    rows = []
    for number, request in enumerate(requests, start=count + 1):
        row = RequestRow(
            number=number,
            entry=json.dumps(request.entry),
            facts=json.dumps(request.facts),
            tensors=pack(request.tensors),
            chain=b"",
        )
        before = row.link(before)
        rows.append(replace(row, chain=before))
    return rows


def served(rows: list[RequestRow], meta: Meta) -> tuple[Request, ...]:
    """The requests of all rows, each of which has to follow the one before it.

    Raises:
        MemoryFormatError: rows were altered, swapped, doubled, dropped or added.
    """
    before, requests = START, []
    for number, row in enumerate(rows, start=1):
        before = row.link(before)
        if row.number != number or row.chain != before:
            raise MemoryFormatError(
                f"request {number} in memory.sqlite does not follow the one before it: requests "
                "were altered, swapped, doubled or removed; restore a backup"
            )
        requests.append(_request(row))
    if len(rows) != meta.requests or before != meta.chain:
        raise MemoryFormatError(
            f"memory.sqlite holds {len(rows)} requests, {meta.requests} others are expected: "
            "requests were removed or added; restore a backup"
        )
    return tuple(requests)


def _request(row: RequestRow) -> Request:
    entry, facts = json.loads(row.entry), json.loads(row.facts)
    plain = isinstance(facts, list) and all(isinstance(one, dict) for one in facts)
    if not isinstance(entry, dict) or not plain:
        raise MemoryFormatError(
            f"request {row.number} in memory.sqlite is no entry with a list of facts: restore a "
            "backup"
        )
    return Request(entry=entry, facts=facts, tensors=unpack(row.tensors))


def digest(*parts: bytes | str | int | None) -> bytes:
    """A digest (32 bytes) of values, told apart by their types and lengths."""
    total = hashlib.blake2b(digest_size=32)
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part).encode()
        total.update(f"{type(part).__name__}:{len(data)}:".encode())
        total.update(data)
    return total.digest()


def check_same_kind(stored: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Refuse current tensors of other names, shapes or dtypes than those they replace.

    Raises:
        StateError: with the names.
    """
    wrong = sorted(stored.keys() ^ given.keys())
    wrong += [
        name
        for name in sorted(stored.keys() & given.keys())
        if (stored[name].shape, stored[name].dtype) != (given[name].shape, given[name].dtype)
    ]
    if wrong:
        raise StateError(
            f"the current tensors {wrong} are not of the names, shapes or dtypes of those they "
            "would replace: nothing was changed; commit to the memory that they were computed from"
        )
