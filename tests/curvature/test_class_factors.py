"""Factors of a class's block, by all its numbers and by few rows, against the block itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_muter.curvature.class_factors import FullFactor, ThinFactor


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shift", [1e-6, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_few_rows_solve_what_their_whole_block_solves(shift: float, dtype: torch.dtype) -> None:
    rows, v = drawn(0, 4, 9).to(dtype), drawn(1, 3, 9)
    block = rows.double().T @ rows.double() + shift * torch.eye(9, dtype=torch.float64)
    expected = torch.linalg.solve(block, v.T).T
    thin = ThinFactor.of(rows, shift)
    # float32 that would cancel is taken in float64
    exact = dtype == torch.float64 or shift < 1e-4
    error = float((thin.whole(thin.halved(v)) - expected).norm() / expected.norm())
    assert error < (1e-9 if exact else 1e-5)
    assert thin.nbytes == (4 * 9 + 4 * 4) * (8 if exact else 4)
    full = FullFactor.of(block, torch.float64)
    torch.testing.assert_close(
        full.whole(full.halved(v)), expected, rtol=1e-5, atol=1e-5 * float(expected.max())
    )
    assert full.nbytes == 81 * 8


def test_a_block_that_is_indefinite_has_its_diagonal_alone() -> None:
    block = torch.tensor([[1.0, 3.0], [3.0, 4.0]], dtype=torch.float64)
    factor = FullFactor.of(block, torch.float64)
    found = factor.whole(factor.halved(torch.ones(1, 2, dtype=torch.float64)))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.25]], dtype=torch.float64))
