"""What requests take out of a dense sum, kept as factors."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from cases import rows_of

from lightning_muter.curvature.dense import DenseCurvature, DowndatedSolver
from lightning_muter.curvature.kept import Materialised, OuterProducts
from lightning_muter.curvature.point import KeptCurvature
from lightning_muter.curvature.removed import RemovedPoints, gathered
from lightning_muter.parallel import Group

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


def test_requests_in_a_row_take_as_many_iterations_as_the_first() -> None:
    """Each takes out a direction of its own, which later ones need not meet again."""
    p, usable = 400, torch.ones(1, dtype=torch.bool)
    rows, rhs = rows_of(11, 3 * p, p), torch.zeros(p, dtype=torch.float64)
    rest = DenseCurvature(rows.T @ rows)
    for row in rows[:8]:
        start, rhs = rest, rhs + row
        removed = RemovedPoints.of([OuterProducts(row.unsqueeze(0), usable)], 0.0)
        rest = start.without(removed)
        found = rest.solver().solve(rhs)
        assert found.status == "converged" and found.iterations == 1 and found.residual < 1e-12
        torch.testing.assert_close(found.value, torch.linalg.solve(rest.matrix, rhs))
        # what a request leaves is its own: from where it started another one goes as it did
        assert torch.equal(start.without(removed).solver().solve(rhs).value, found.value)


def test_a_sum_that_had_to_be_factorised_serves_what_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p, damping = 400, 0.5
    rows, rhs = rows_of(12, p + 100, p), rows_of(13, 1, p)[0]
    large = OuterProducts(rows[:90], torch.ones(90, dtype=torch.bool))
    small = RemovedPoints.of([OuterProducts(rows[-1:], torch.ones(1, dtype=torch.bool))], 0.01)
    rest = DenseCurvature(rows.T @ rows).without(RemovedPoints.of([large], 0.0))
    assert not rest.removed.empty
    found = rest.damped(damping).solver().solve(rhs)
    assert found.status == "converged" and found.iterations == 0  # conjugate gradients gave up
    expected = torch.linalg.solve(rest.without(small).damped(damping).matrix, rhs)
    monkeypatch.setattr("torch.linalg.cholesky_ex", None)
    again = rest.without(small).damped(damping).solver().solve(rhs)
    assert again.status == "converged" and again.iterations < 10 and again.residual < 1e-12
    torch.testing.assert_close(again.value, expected)


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
    omega = torch.zeros(P, dtype=torch.float64)
    again = Materialised.restore(part.facts(), part.tensors(), omega)
    assert torch.equal(again.matrix, part.matrix) and part.tensors()["packed"].nbytes == part.nbytes
    heavy = RemovedPoints.of([one(4, 30)], 1.0)
    assert heavy.lighter(P).nbytes == part.nbytes and heavy.lighter(10 * P) is heavy


def test_a_matrix_travels_to_a_device_once_and_its_factorisation_is_kept() -> None:
    here, omega = problem(), torch.zeros(P, dtype=torch.float64)
    there = omega.to("meta")
    factor = here.base_solver()
    moved = here.to("meta", there)
    assert moved.base.device.type == "meta" and moved.to("meta", there) is moved
    back = moved.to("cpu", omega)
    assert back.base is here.base and back.base_solver() is factor
    assert back.damped(0.5).to("meta", there).base is moved.base


class Travelling(OuterProducts):
    """Factors that tell where they are sent."""

    seen: ClassVar[list[str]] = []

    def to(self, device: torch.device | str, omega: torch.Tensor) -> KeptCurvature:
        self.seen.append(str(device))
        return Travelling(self.rows.to(device), self.usable)


def test_what_processes_took_out_is_gathered_on_the_host_and_comes_to_each_one() -> None:
    group = Group(rank=0, size=2, gather=lambda value: [value, value])
    parts = [Travelling(one(seed).rows, torch.ones(1, dtype=torch.bool)) for seed in (1, 2)]
    found = gathered(parts, group, torch.zeros(P, dtype=torch.float64))
    assert Travelling.seen == ["cpu"] * 6  # out to the host, and from it to where ω* is
    assert len(found) == 4
    torch.testing.assert_close(found[3].tensors()["rows"], parts[1].rows)
    assert gathered(parts, Group(), torch.zeros(P)) == parts


def test_eigenvalues_of_a_large_sum_leave_the_random_state_alone() -> None:
    large = DenseCurvature(torch.diag(torch.linspace(1.0, 2.0, 2101, dtype=torch.float64)))
    before = torch.get_rng_state()
    first = large.extremes()
    assert torch.equal(torch.get_rng_state(), before) and large.extremes() == first
