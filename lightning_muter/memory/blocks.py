"""Blocks of neighbouring training points, by whose digests unchanged rows are told at once.

A row that was changed changes its block's digest as surely as its own. Of a block that is as it
was every row's digest is known, and none has to be computed; of any other block all rows' are.
"""

from __future__ import annotations

import hmac

import numpy as np
import torch
from torch import Tensor

from lightning_muter.memory.points import DIGEST_BYTES, digests_of, serialised
from lightning_muter.models.beside import NOTHING, Beside

__all__ = ["BLOCK", "block_digest", "count", "recognised", "rows_of_digests"]

#: points of a block: training's first, its second, ...
BLOCK = 512


def count(n: int) -> int:
    """How many blocks n points are."""
    return -(-n // BLOCK)


def block_digest(key: bytes, x: Tensor, targets: Tensor, beside: Beside = NOTHING) -> bytes:
    """One keyed 16-byte digest of some points x (m, ...) with their targets (m, ...).

    It is of the values of which `digests_of` has one a point, of all of them in a row; by SHA-256,
    for which processors have instructions: twice as fast as what a single point is digested by.
    """
    total = hmac.new(key, b"a block of points", "sha256")
    for column in (x, targets, *beside.rows.values()):
        head, values = serialised(column)
        parts = values if isinstance(values, list) else [values]
        total.update(head + f"{len(column)} in {[len(one) for one in parts]}".encode())
        for one in parts:
            total.update(one)
    return total.digest()[:DIGEST_BYTES]


def recognised(
    key: bytes,
    known: Tensor,
    blocks: Tensor | None,
    first: int,
    x: Tensor,
    targets: Tensor,
    beside: Beside = NOTHING,
) -> Tensor:
    """The digest of each point (m, 16), as `digests_of` has it, of rows that may be unchanged.

    Args:
        key: of all digests.
        known: the digests of the training points (n, 16).
        blocks: the digest of each block of them (k, 16); None where there are none.
        first: the row's position in its data set that x begins with, a multiple of `BLOCK`.
        x: inputs (m, ...).
        targets: (m, ...).
        beside: what forward takes of the points beside x.
    """
    if blocks is None:
        return rows_of_digests(digests_of(key, x, targets, beside))
    found, changed = torch.empty(len(x), DIGEST_BYTES, dtype=torch.uint8), False
    for start in range(0, len(x), BLOCK):
        some = slice(start, min(start + BLOCK, len(x)))
        own = x[some], targets[some], beside.part(some)
        number = (first + start) // BLOCK
        stored = known[number * BLOCK : (number + 1) * BLOCK]
        # behind a block that changed rows may have moved, which the first of them tells
        moved = len(stored) != len(own[0])
        moved = moved or (changed and _differs(stored[0], _first_digest(key, *own)))
        changed = moved or _differs(blocks[number], block_digest(key, *own))
        found[some] = rows_of_digests(digests_of(key, *own)) if changed else stored
    return found


def rows_of_digests(digests: list[bytes]) -> Tensor:
    """Digests as rows (m, 16) of bytes."""
    flat = np.frombuffer(b"".join(digests), dtype=np.uint8).copy()
    return torch.from_numpy(flat.reshape(-1, DIGEST_BYTES))


def _first_digest(key: bytes, x: Tensor, targets: Tensor, beside: Beside) -> bytes:
    return digests_of(key, x[:1], targets[:1], beside.part(slice(1)))[0]


def _differs(stored: Tensor, digest: bytes) -> bool:
    return bool(stored.cpu().numpy().tobytes() != digest)
