"""Statuses in order, and factorisations that solve many systems."""

from __future__ import annotations

import pytest
import torch

from lightning_muter import SolverError
from lightning_muter.linalg import cholesky
from lightning_muter.linalg.cholesky import DenseSolver
from lightning_muter.linalg.solution import Solution, Status, finite, relative_residual


def test_the_worst_of_several_is_the_last_in_order() -> None:
    order = list(Status)
    assert order[0] is Status.CONVERGED and order[-1] is Status.MAX_ITERATIONS
    for k, status in enumerate(order):
        assert Status.worst(order[: k + 1]) is status
    assert Status.worst([]) is Status.CONVERGED


def test_every_status_but_the_best_says_what_to_do() -> None:
    assert [s for s in Status if not s.remedy] == [Status.CONVERGED]
    assert str(Status.INDEFINITE) == "indefinite" == Status.INDEFINITE


def test_one_factorisation_solves_many_systems() -> None:
    matrix = torch.diag(torch.tensor([1.0, 4.0, 9.0]).double())
    solver = DenseSolver(matrix)
    assert solver.definite
    for j in range(3):
        rhs = torch.zeros(3, dtype=torch.float64)
        rhs[j] = 1.0
        found = solver.solve(rhs)
        assert found.status is Status.CONVERGED and found.residual < 1e-14
        torch.testing.assert_close(found.value, rhs / matrix.diagonal())


@pytest.mark.parametrize(
    ("rhs", "status"), [([0.0, 1.0], Status.MINIMUM_NORM), ([1.0, 1.0], Status.INCONSISTENT)]
)
def test_a_singular_system_says_whether_it_has_a_solution(rhs: list[float], status: Status) -> None:
    solver = DenseSolver(torch.diag(torch.tensor([0.0, 2.0]).double()))
    found = solver.solve(torch.tensor(rhs, dtype=torch.float64))
    assert not solver.definite and found.status is status
    assert found.value.tolist() == [0.0, 0.5]


def test_a_solution_is_finite_or_none() -> None:
    bad = Solution(torch.tensor([torch.nan]), 0.0, 0, Status.CONVERGED)
    with pytest.raises(SolverError, match="not finite"):
        finite(bad)


def test_the_residual_of_nothing_is_nothing() -> None:
    zero = torch.zeros(2)
    assert relative_residual(zero, zero) == 0.0
    assert relative_residual(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 10.0])) == 0.5


def test_a_large_indefinite_system_needs_no_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "_SPECTRUM_LIMIT", 10)
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))
    values = torch.linspace(-2.0, 9.0, 30, dtype=torch.float64)
    matrix, rhs = (q * values) @ q.T, torch.ones(30, dtype=torch.float64)
    solver = DenseSolver((matrix + matrix.T) / 2)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    found = solver.solve(rhs)
    assert found.status is Status.INDEFINITE and found.residual < 1e-10
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, rhs))


def test_a_large_singular_system_has_its_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "_SPECTRUM_LIMIT", 10)
    values = torch.linspace(0.0, 9.0, 30, dtype=torch.float64)
    rhs = torch.ones(30, dtype=torch.float64)
    found = DenseSolver(torch.diag(values)).solve(rhs)
    assert found.status is Status.INCONSISTENT and float(found.value[0]) == 0.0
    rhs[0] = 0.0
    assert DenseSolver(torch.diag(values)).solve(rhs).status is Status.MINIMUM_NORM
