"""Digests of blocks of points against those of each point by itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muter.memory.blocks import BLOCK, block_digest, count, recognised, rows_of_digests
from lightning_muter.memory.points import digests_of
from lightning_muter.models.beside import NOTHING, Beside

KEY = b"k" * 16
N = 2 * BLOCK + 37


def data(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 2, 3, generator=generator).to(dtype)
    return x, torch.randint(0, 9, (n,), generator=generator)


def beside(n: int = N) -> Beside:
    return Beside.of(
        {"mask": torch.arange(2 * n).reshape(n, 2), "name": [f"{i}" for i in range(n)]}, n
    )


def each(x: Tensor, y: Tensor, more: Beside = NOTHING) -> Tensor:
    """Every row by itself."""
    return rows_of_digests(digests_of(KEY, x, y, more))


def together(x: Tensor, y: Tensor, more: Beside = NOTHING) -> Tensor:
    parts = [slice(first, first + BLOCK) for first in range(0, len(x), BLOCK)]
    found = [block_digest(KEY, x[some], y[some], more.part(some)) for some in parts]
    assert len(found) == count(len(x))
    return rows_of_digests(found)


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, N])
@pytest.mark.parametrize("more", [False, True])
def test_rows_that_did_not_change(n: int, more: bool) -> None:
    x, y = data(n=n)
    own = beside(n) if more else NOTHING
    known = each(x, y, own), together(x, y, own)
    assert torch.equal(recognised(KEY, *known, 0, x, y, own), known[0])
    last = BLOCK * (count(n) - 1)  # a part that begins at a later block
    found = recognised(KEY, *known, last, x[last:], y[last:], own.part(slice(last, None)))
    assert torch.equal(found, known[0][last:])
    assert torch.equal(recognised(KEY, known[0], None, 0, x, y, own), known[0])


def test_of_an_unchanged_block_no_rows_digest_is_computed() -> None:
    x, y = data()
    rows, blocks = each(x, y), together(x, y)
    rows[[5, BLOCK + 5]] = 0  # what is found of such a row is what is known, not what it has
    y[BLOCK + 9] += 1
    found = recognised(KEY, rows, blocks, 0, x, y)
    assert torch.equal(found[5], rows[5])
    assert torch.equal(found[BLOCK : 2 * BLOCK], each(x, y)[BLOCK : 2 * BLOCK])


@pytest.mark.parametrize("row", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 36])
@pytest.mark.parametrize("what", ["the last bit", "the sign of a zero", "target", "mask", "name"])
def test_whatever_changes_of_a_row_is_found(row: int, what: str) -> None:
    x, y = data()
    x[:, 1, 1] = 0.0
    own = beside()
    known = each(x, y, own), together(x, y, own)
    if what == "the last bit":
        x.view(torch.int64)[row, 0, 2] ^= 1
    elif what == "the sign of a zero":
        x[row, 1, 1] = -0.0
    elif what == "target":
        y[row] += 1
    elif what == "mask":
        own.rows["mask"][row, 1] += 1
    else:
        own.rows["name"][row] += "x"
    found = recognised(KEY, *known, 0, x, y, own)
    assert torch.nonzero((found != known[0]).any(dim=1)).flatten().tolist() == [row]
    assert torch.equal(found, each(x, y, own))


@pytest.mark.parametrize("change", ["deleted", "inserted", "swapped", "reversed", "two rows less"])
def test_rows_that_moved_are_told_one_by_one(change: str) -> None:
    x, y = data()
    known = each(x, y), together(x, y)
    order = list(range(N))
    if change == "deleted":
        del order[BLOCK + 3]
    elif change == "inserted":
        order.insert(3, 0)
    elif change == "swapped":
        order[3], order[BLOCK + 3] = order[BLOCK + 3], order[3]
    elif change == "reversed":
        order.reverse()
    else:
        del order[-2:]
    found = recognised(KEY, *known, 0, x[order], y[order])
    assert torch.equal(found, known[0][order] if change != "inserted" else each(x[order], y[order]))


def test_single_and_double_precision_are_the_same_points() -> None:
    x, y = data(torch.float32)
    known = each(x, y), together(x, y)
    assert torch.equal(together(x.double(), y), known[1])
    assert torch.equal(recognised(KEY, *known, 0, x.double(), y), known[0])


def test_digests_of_other_blocks_differ() -> None:
    """The same bytes under another shape, dtype, number, key or in other columns."""
    x = torch.arange(12.0).reshape(4, 3)
    y = torch.arange(4)
    several: list[tuple[Any, ...]] = [
        (x, y),
        (x.reshape(4, 1, 3), y),
        (x.reshape(2, 6), y.reshape(2, 2)),
        (x.view(torch.int64) if x.element_size() == 8 else x.double().view(torch.int64), y),
        (x, y.double()),
        (x[:3], y[:3]),
        (x, y, Beside.of({"a": ["1", "23", "", ""]}, 4)),
        (x, y, Beside.of({"a": ["12", "3", "", ""]}, 4)),
    ]
    found = [block_digest(KEY, *one) for one in several] + [block_digest(b"l" * 16, x, y)]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert block_digest(KEY, x[:1], y[:1]) != digests_of(KEY, x[:1], y[:1])[0]
