"""Indices and contents of a request, also of many points and of equal ones."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from lightning_muter import RemovalError
from lightning_muter.memory import points

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
    points.check_range(indices, n)
    points.check_free(indices, removed, torch.ones(len(removed)))
    assert time.perf_counter() - start < 1.0
    with pytest.raises(RemovalError, match="twice") as caught:
        points.check_range(indices * 2, n)
    assert len(str(caught.value)) < 300
    removed[:] = True
    with pytest.raises(RemovalError, match="forgotten already") as caught:
        points.check_free(indices, removed, torch.ones(len(removed)))
    assert len(str(caught.value)) < 300


def test_equal_points_are_found_one_after_the_other() -> None:
    n = 50_000
    x, y = torch.ones(1, 4), torch.zeros(1, dtype=torch.long)
    row = list(points.digest(KEY, x[0], y[0]))
    digests = torch.tensor(row, dtype=torch.uint8).repeat(n, 1)
    digests[7] = 0
    removed = torch.zeros(n, dtype=torch.bool)
    removed[:3] = True
    start = time.perf_counter()
    found = points.find(
        KEY, digests, removed, torch.ones(len(removed)), x.repeat(2000, 1), y.repeat(2000)
    )
    assert time.perf_counter() - start < 1.0
    assert found == [i for i in range(3, 2004) if i != 7]
    removed[:] = True
    with pytest.raises(RemovalError, match="forgotten already") as caught:
        points.find(KEY, digests, removed, torch.ones(len(removed)), x, y)
    assert len(str(caught.value)) < 300


def test_one_more_than_there_are_is_refused() -> None:
    x, y = torch.ones(2, 4), torch.zeros(2, dtype=torch.long)
    digests = torch.tensor([list(points.digest(KEY, x[0], y[0]))], dtype=torch.uint8)
    with pytest.raises(RemovalError, match="point 1 of the batch was forgotten already"):
        points.find(KEY, digests, torch.zeros(1, dtype=torch.bool), torch.ones(1), x, y)
