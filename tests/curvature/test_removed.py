"""What requests take out of a dense sum, kept as factors."""

from __future__ import annotations

import pytest
import torch
from cases import rows_of

from lightning_muter.curvature.dense import DenseCurvature, DowndatedSolver
from lightning_muter.curvature.kept import Materialised, OuterProducts
from lightning_muter.curvature.removed import RemovedPoints

P = 40


def one(seed: int, k: int = 1) -> OuterProducts:
    return OuterProducts(rows_of(seed, k, P), torch.ones(k, dtype=torch.bool))


def problem(points: int = 200) -> DenseCurvature:
    total = DenseCurvature.zeros(P, "cpu")
    total.add(one(0, points))
    total.add_identity(1.0)
    return total


def test_many_small_requests_are_one_large_one() -> None:
    """The factors of n requests lie in about log n parts, and their sum is the plain one."""
    step, rows = problem(), []
    for seed in range(1, 40):
        part = one(seed)
        rows.append(0.3 * part.rows)
        removed = RemovedPoints.of([OuterProducts(rows[-1], part.usable)], 0.01)
        step = DenseCurvature(step.base, step.removed.joined(removed))
    assert len(step.removed.parts) <= 6
    stacked = torch.cat(rows)
    expected = step.base - stacked.T @ stacked - 0.39 * torch.eye(P, dtype=torch.float64)
    torch.testing.assert_close(step.matrix, expected, rtol=1e-12, atol=1e-10)
    v = rows_of(99, 1, P)[0]
    torch.testing.assert_close(step.matvec(v), expected @ v, rtol=1e-12, atol=1e-10)


def test_a_downdated_system_is_solved_to_rounding_without_a_factorisation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, rhs = problem(), rows_of(5, 1, P)[0]
    first = whole.solver()
    rest = whole.without(RemovedPoints.of([one(1)], 0.005))
    solver = rest.solver()
    assert isinstance(solver, DowndatedSolver) and rest.base_solver() is first
    expected = torch.linalg.solve(rest.matrix, rhs)
    monkeypatch.setattr("torch.linalg.cholesky_ex", None)
    found = solver.solve(rhs)
    assert found.status == "converged" and 0 < found.iterations < 12 and found.residual < 1e-12
    torch.testing.assert_close(found.value, expected, rtol=1e-11, atol=1e-13)


def test_heavy_factors_go_into_the_matrix() -> None:
    whole = problem()
    rest = whole.without(RemovedPoints.of([one(2, 15)], 0.0))
    assert rest.removed.empty and rest.base is not whole.base
    torch.testing.assert_close(rest.base, whole.base - one(2, 15).rows.T @ one(2, 15).rows)
    assert not whole.without(RemovedPoints.of([one(2, 2)], 0.0)).removed.empty


@pytest.mark.parametrize(("scale", "status"), [(30.0, "indefinite"), (0.1, "converged")])
def test_a_sum_that_is_not_definite_any_more_is_said_to_be_so(scale: float, status: str) -> None:
    whole = problem()
    removed = OuterProducts(scale * one(3).rows, torch.ones(1, dtype=torch.bool))
    rest = whole.without(RemovedPoints.of([removed], 0.0))
    rhs = removed.rows[0] + 0.1 * rows_of(6, 1, P)[0]
    found = rest.solver().solve(rhs)
    assert found.status == status
    torch.testing.assert_close(found.value, torch.linalg.solve(rest.matrix, rhs), rtol=1e-8, atol=0)


def test_damping_has_a_factor_of_its_own() -> None:
    whole, rhs = problem(), rows_of(7, 1, P)[0]
    rest = whole.without(RemovedPoints.of([one(1)], 0.005)).damped(2.0)
    eye = torch.eye(P, dtype=torch.float64)
    expected = torch.linalg.solve(whole.base - one(1).rows.T @ one(1).rows + 1.995 * eye, rhs)
    torch.testing.assert_close(rest.solver().solve(rhs).value, expected)
    assert rest.base_solver() is not whole.base_solver()


def test_a_matrix_is_kept_as_its_triangle() -> None:
    part = Materialised.of([one(4, 3)], P, torch.device("cpu"))
    assert part.nbytes == 4 * P * (P + 1)
    torch.testing.assert_close(part.matrix, one(4, 3).rows.T @ one(4, 3).rows)
    torch.testing.assert_close(part.joined(part).matrix, 2 * part.matrix)
    heavy = RemovedPoints.of([one(4, 30)], 1.0)
    assert heavy.lighter(P).nbytes == part.nbytes and heavy.lighter(10 * P) is heavy
