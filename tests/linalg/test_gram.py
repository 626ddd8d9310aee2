"""Sums of outer products of which half is computed."""

from __future__ import annotations

import pytest
import torch
from cases import rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_muter.linalg.gram import gram, mirrored


@given(st.integers(0, 9), st.integers(0, 700), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_it_is_the_sum_of_outer_products_symmetric_to_the_last_bit(
    n: int, d: int, seed: int
) -> None:
    rows = rows_of(seed, n, d)
    weights = rows_of(seed + 1, n, 1).flatten()  # of both signs
    found = gram(rows, weights)
    expected = torch.zeros(d, d, dtype=torch.float64)
    for row, weight in zip(rows, weights, strict=True):
        expected += weight * torch.outer(row, row)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("d", [1, 95, 96, 97, 577])
def test_without_weights_all_count_as_one(d: int) -> None:
    rows = rows_of(3, 20, d)
    torch.testing.assert_close(gram(rows), rows.T @ rows, rtol=1e-12, atol=1e-12)


def test_the_upper_triangle_is_what_counts() -> None:
    matrix = torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])
    assert mirrored(matrix).tolist() == [[1.0, 2.0], [2.0, 3.0]]
