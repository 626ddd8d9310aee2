"""The dense sum of points' curvature."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_muter.curvature import dense
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.kept import OuterProducts
from lightning_muter.curvature.point import Combined
from lightning_muter.curvature.removed import RemovedPoints


def rows(seed: int, k: int = 4, p: int = 6) -> torch.Tensor:
    return torch.randn(k, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_sum_adds_removes_and_multiplies() -> None:
    a, b = rows(0), rows(1)
    usable = torch.ones(4, dtype=torch.bool)
    total = DenseCurvature.zeros(6, "cpu")
    for part in (a, b):
        total.add(OuterProducts(part, usable))
    total.add_identity(0.5)
    expected = a.T @ a + b.T @ b + 0.5 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(total.matrix, expected)
    v = rows(2, k=1)[0]
    torch.testing.assert_close(total.matvec(v), expected @ v)
    rest = total.without(RemovedPoints.of([OuterProducts(b, usable)], 0.0))
    torch.testing.assert_close(rest.matrix, expected - b.T @ b)
    torch.testing.assert_close(total.matrix, expected)  # the sum itself stays
    assert total.p == 6 and total.nbytes == 8 * 36


def test_damping_makes_another_sum() -> None:
    total = DenseCurvature(torch.diag(torch.tensor([1.0, 2.0]).double()))
    assert total.damped(0.0) is total
    assert total.damped(0.5).matrix.diagonal().tolist() == [1.5, 2.5]
    assert total.matrix.diagonal().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("p", [5, 2101])
def test_extreme_eigenvalues_of_small_and_large_sums(p: int) -> None:
    values = torch.linspace(0.5, 7.0, p, dtype=torch.float64)
    values[-1] = 20.0
    low, high = DenseCurvature(torch.diag(values)).extremes()
    assert low == pytest.approx(0.5, rel=1e-6) and high == pytest.approx(20.0, rel=1e-6)


def spread(lowest: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix of 120 rows, its basis and its eigenvalues: from ``lowest`` to 100."""
    basis = torch.linalg.qr(rows(0, 120, 120))[0]
    values = torch.logspace(-3, 2, 120, dtype=torch.float64)
    values[0] = lowest
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2, basis, values


@pytest.mark.parametrize("lowest", [1e-5, -0.5])
def test_a_factor_tells_the_numbers_of_a_large_sum_where_there_is_one(
    lowest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly where M is definite; by products where it is not, as of one too large for it."""
    monkeypatch.setattr(dense, "EIGEN_LIMIT", 50)
    matrix, basis, values = spread(lowest)
    rhs = basis @ torch.ones(120, dtype=torch.float64)
    total = DenseCurvature(matrix)
    low, high = total.extremes()
    assert high == pytest.approx(100.0, rel=1e-2)
    if lowest > 0:
        assert (low, high) == (pytest.approx(lowest, rel=1e-6), pytest.approx(100.0, rel=1e-8))
        torch.testing.assert_close(
            total.estimate(rhs).value, basis @ (1 / values), rtol=1e-6, atol=0.1
        )
    else:
        assert low < 0
    monkeypatch.setattr(dense, "FACTOR_LIMIT", 100)
    large = DenseCurvature(matrix)
    assert large.extremes()[1] == pytest.approx(100.0, rel=1e-2)
    assert large.estimate(rhs).iterations > 0


def test_the_factor_of_the_whole_says_nothing_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "EIGEN_LIMIT", 50)
    matrix, basis, _ = spread(1e-5)
    total = DenseCurvature(matrix)
    assert total.extremes()[0] > 0
    taken = OuterProducts(2 * basis[:, :1].T, torch.ones(1, dtype=torch.bool))
    assert total.without(RemovedPoints.of([taken], 0.0)).extremes()[0] < -3.9


def test_a_sum_that_is_not_finite_has_no_eigenvalues() -> None:
    matrix = torch.eye(2, dtype=torch.float64)
    matrix[0, 0] = torch.inf
    assert all(math.isnan(value) for value in DenseCurvature(matrix).extremes())


def test_combined_parts_are_their_sum() -> None:
    a, b = rows(3), rows(4)
    first = OuterProducts(a, torch.tensor([True, True, False, True]))
    both = Combined([first, OuterProducts(b, torch.ones(4, dtype=torch.bool))])
    assert both.usable.tolist() == [True, True, False, True]
    v = rows(5, k=1)[0]
    torch.testing.assert_close(both.matvec(v), a.T @ (a @ v) + b.T @ (b @ v))
