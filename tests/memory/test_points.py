"""Indices and contents of a request, also of many points and of equal ones."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
import pytest
import torch

from lightning_muter import RemovalError
from lightning_muter.memory import ids, points
from lightning_muter.memory.known_points import KnownPoints

KEY = b"k" * 16


@pytest.mark.parametrize("given", [[3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1])])
def test_integers_of_any_kind_are_indices(given: Any) -> None:
    assert points.training_indices(given) == [3, 1]
    assert points.training_indices(list(given)) == [3, 1]
    assert all(type(i) is int for i in points.training_indices(given))


@pytest.mark.parametrize(
    "given",
    [
        [3.7],
        [3.0],
        [True],
        [0, False],
        ["3"],
        "3",
        [None],
        [[1]],
        3,
        np.array([1.0]),
        np.array([True, False]),
        torch.tensor([True, False]),
        torch.tensor([1.5]),
        torch.tensor([[1, 2]]),
        [torch.tensor(True)],
        [np.bool_(True)],
    ],
    ids=repr,
)
def test_what_is_no_integer_is_refused(given: Any) -> None:
    with pytest.raises(RemovalError, match="ind"):
        points.training_indices(given)


def test_a_hundred_thousand_indices_take_no_time() -> None:
    n = 120_000
    indices = list(range(100_000))
    removed = torch.zeros(n, dtype=torch.bool)
    start = time.perf_counter()
    points.check_named(indices)
    points.check_free(indices, removed, torch.ones(len(removed)))
    assert time.perf_counter() - start < 1.0
    with pytest.raises(RemovalError, match="twice") as caught:
        points.check_named(indices * 2)
    assert len(str(caught.value)) < 300
    removed[:] = True
    with pytest.raises(RemovalError, match="forgotten already") as caught:
        points.check_free(indices, removed, torch.ones(len(removed)))
    assert len(str(caught.value)) < 300


def known(digests: torch.Tensor, removed: torch.Tensor) -> KnownPoints:
    return KnownPoints(digests, removed, torch.ones(len(removed)))


def test_fifty_thousand_equal_points_are_found_one_after_the_other() -> None:
    n = 50_000
    x, y = torch.ones(1, 4), torch.zeros(1, dtype=torch.long)
    (one,) = points.digests_of(KEY, x, y)
    digests = torch.tensor(list(one), dtype=torch.uint8).repeat(n, 1)
    digests[7] = 0
    removed = torch.zeros(n, dtype=torch.bool)
    removed[:3] = True
    found = known(digests, removed).match([one] * (n - 1))
    assert found.indices == [*(i for i in range(3, n) if i != 7), 0, 1, 2]  # what is left first
    assert found.surplus == found.unknown == []
    found = known(digests, removed).match([one] * n, range(n))
    assert found.indices[:7] == [*range(7)] and found.surplus == [7]
    with pytest.raises(RemovalError, match="forgotten already, or named twice") as caught:
        known(digests, removed).named([one] * (n + 1))
    assert len(str(caught.value)) < 400


def test_a_point_in_its_place_is_taken_before_others_look() -> None:
    rows = torch.arange(3, dtype=torch.uint8)[:, None].repeat(1, 16)
    digests = torch.cat([rows, rows[:1]])
    a, b, c = (bytes(row.tolist()) for row in rows)
    nothing = torch.zeros(4, dtype=torch.bool)
    found = known(digests, nothing).match([a, b, a, bytes(16 * [9])], [2, 1, 0, 3])
    assert found.indices == [3, 1, 0, None] and found.unknown == [3]
    assert known(digests, nothing).match([c, a, a], [-1, 9, 3]).indices == [2, 0, 3]


def test_a_point_that_was_never_trained_on_comes_last() -> None:
    digests = torch.zeros(3, 16, dtype=torch.uint8)
    weights = torch.tensor([0.0, 1.0, 1.0])
    removed = torch.tensor([False, True, False])
    assert KnownPoints(digests, removed, weights).match([bytes(16)] * 3).indices == [2, 1, 0]


def test_digests_of_a_batch_are_those_of_its_points() -> None:
    generator = torch.Generator().manual_seed(0)
    for x in (torch.randn(5, 2, 3, generator=generator), torch.zeros(5, 0), torch.randn(5)):
        for y in (torch.arange(5), torch.randn(5, 2).half(), torch.ones(5, dtype=torch.bool)):
            each = [points.digest(KEY, one, target) for one, target in zip(x, y, strict=True)]
            assert points.digests_of(KEY, x, y) == each
            assert points.digests_of(KEY, x.double(), y.flip(0).flip(0)) == each
    assert points.digests_of(KEY, torch.randn(0, 4), torch.zeros(0)) == []


def test_a_digest_is_of_dtype_shape_and_values_as_they_always_were() -> None:
    x = torch.arange(12, dtype=torch.float32).reshape(3, 2, 2) / 7
    y = torch.tensor([4, 5, 6])
    expected = []
    for point, label in zip(x.double().numpy(), y.numpy(), strict=True):
        text = b"torch.float64(2, 2)" + point.tobytes() + b"torch.int64()" + label.tobytes()
        expected.append(hashlib.blake2b(text, key=KEY, digest_size=16).digest())
    assert points.digests_of(KEY, x, y) == expected
    assert points.digests_of(KEY, x.mT.contiguous().mT, y) == expected  # however it lies in memory


def test_one_more_than_there_are_is_refused() -> None:
    x, y = torch.ones(2, 4), torch.zeros(2, dtype=torch.long)
    digests = torch.tensor([list(points.digest(KEY, x[0], y[0]))], dtype=torch.uint8)
    with pytest.raises(RemovalError, match="point 1 of the batch was forgotten already"):
        known(digests, torch.zeros(1, dtype=torch.bool)).named(points.digests_of(KEY, x, y))


def test_keys_are_known_by_their_text_and_no_content_is_one() -> None:
    keys = ids.id_digests(KEY, ids.id_texts(["p1", 17, np.int64(3), "17"]))
    assert keys.shape == (4, 16) and keys.dtype == torch.uint8
    assert torch.equal(keys[1], keys[3]) and not torch.equal(keys[0], keys[1])
    other = ids.id_digests(b"l" * 16, ["p1"])
    assert not torch.equal(other[0], keys[0])
    assert ids.owned(KEY, keys, torch.ones(4), ["17", "p1"]) == [1, 3, 0]
    assert ids.owned(KEY, keys, torch.tensor([1.0, 0.0, 1.0, 1.0]), ["17"]) == [3]
    with pytest.raises(RemovalError, match="nobody.*own no training point"):
        ids.owned(KEY, keys, torch.ones(4), ["nobody"])


def test_one_key_with_a_hundred_thousand_points() -> None:
    keys = ids.id_digests(KEY, ["a"]).repeat(100_000, 1)
    assert ids.owned(KEY, keys, torch.ones(100_000), ["a"]) == list(range(100_000))


@pytest.mark.parametrize("given", [[None], [1.0], [True], [b"a"], [["a"]]], ids=repr)
def test_what_is_no_key_is_refused(given: Any) -> None:
    with pytest.raises(RemovalError, match="a string or an integer"):
        ids.id_texts(given)
