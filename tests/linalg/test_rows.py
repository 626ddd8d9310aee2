"""Lengths and directions of rows of any size."""

from __future__ import annotations

import torch

from lightning_muter.linalg.rows import direction, row_norm


def test_rows_of_every_size_have_their_length_and_direction() -> None:
    rows = torch.tensor(
        [[3e-200, 4e-200], [0.0, 0.0], [3.0, -4.0], [3e200, 4e200]], dtype=torch.float64
    )
    lengths = torch.tensor([[5e-200], [0.0], [5.0], [5e200]], dtype=torch.float64)
    torch.testing.assert_close(row_norm(rows), lengths, rtol=1e-15, atol=0.0)
    units = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, -0.8], [0.6, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(direction(rows), units, rtol=1e-15, atol=0.0)
    torch.testing.assert_close(direction(rows[2:3], 2.0), 2 * units[2:3], rtol=1e-15, atol=0.0)


def test_zero_rows_and_no_rows_have_no_direction() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.float64)
    assert not row_norm(nothing).any() and not direction(nothing).any()
    assert row_norm(nothing[:0]).shape == (0, 1) and direction(nothing[:0]).shape == (0, 3)


def test_a_row_that_is_no_number_stays_none() -> None:
    rows = torch.tensor([[torch.nan, 1.0], [3.0, 4.0]], dtype=torch.float64)
    assert bool(row_norm(rows)[0].isnan()) and bool(direction(rows)[0].isnan().any())
    torch.testing.assert_close(row_norm(rows)[1], torch.tensor([5.0], dtype=torch.float64))
