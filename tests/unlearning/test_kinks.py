"""Steps over kinks against every assignment of sides, and how few of them a request takes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_muter.unlearning.descent import descend
from lightning_muter.unlearning.inner_dual import Squared
from lightning_muter.unlearning.kinks import Kinks, boxed_minimum, kinked_step
from lightning_muter.unlearning.linear_objective import (
    LinearPoints,
    LinearRobustObjective,
    Outputs,
)
from lightning_muter.unlearning.reach import BallReach

K, P = 6, 3


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def best_of_all_faces(curve: Tensor, rest: Tensor, start: Tensor) -> float:
    """The minimum of ½ v K v - b·v over the box, by the stationary point of each of its faces."""
    least = float("inf")
    for face in itertools.product((-1, 0, 1), repeat=len(rest)):
        sides = torch.tensor(face, dtype=torch.float64)
        free, fixed = sides == 0, sides != 0
        v = torch.where(fixed, sides - start, 0.0)
        if bool(free.any()):
            pull = rest[free] - curve[free][:, fixed] @ v[fixed]
            v[free] = torch.linalg.lstsq(curve[free][:, free], pull, driver="gelsd").solution
        if bool(((v + start).abs() <= 1 + 1e-9).all()):
            least = min(least, float(v @ (0.5 * curve @ v - rest)))
    return least


@pytest.mark.parametrize("rank", [2, K], ids=["dependent", "independent"])
@pytest.mark.parametrize("seed", range(6))
def test_the_minimum_in_a_box_is_the_best_of_all_faces(seed: int, rank: int) -> None:
    factor = random(K, rank, seed=seed)
    curve, start = factor @ factor.T, random(K, seed=100 + seed).clamp(-1, 1)
    rest = curve @ random(K, seed=200 + seed) * 2  # in the range, as residuals' slopes are
    found = boxed_minimum(curve, rest, start, start)
    assert float(found.abs().max()) <= 1
    v = found - start
    value = float(v @ (0.5 * curve @ v - rest))
    assert value == pytest.approx(best_of_all_faces(curve, rest, start), abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_step_ends_where_the_model_has_a_subgradient_of_zero(seed: int) -> None:
    x, residual = random(40, P, seed=seed), random(40, seed=10 + seed)
    hessian, size = torch.eye(P, dtype=torch.float64) * 3, torch.full((40,), 0.5).double()
    smooth, mixing = 4 * random(P, seed=20 + seed), residual.sign()
    kinks = Kinks(lambda some: x[some], residual, size, mixing, lambda step: x @ step)
    gradient = smooth + x.T @ (size * mixing)
    step, t = kinked_step(kinks, gradient, lambda columns: torch.linalg.solve(hessian, columns))
    after = residual - x @ step
    held = t.abs() < 1
    left = smooth - hessian @ step + x.T @ (size * t)
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-9)
    assert float(after[held].abs().sum()) < 1e-9
    assert torch.equal(after[~held].sign(), t[~held])
    assert bool((t != mixing).any())


def ridge(n: int, seed: int) -> LinearRobustObjective:
    x = random(n, 8, seed=seed)
    y = x @ torch.linspace(-1, 1, 8).double() + 0.5 * random(n, seed=seed + 1)
    points = LinearPoints(x, y, torch.ones(n).double())
    return LinearRobustObjective(points, Outputs(1, 8, False), Squared(), BallReach(0.2), 1e-2)


@pytest.mark.parametrize("seed", range(4))
def test_a_request_for_a_twentieth_takes_a_few_passes_and_no_new_curvature(seed: int) -> None:
    everyone = ridge(800, seed)
    begun = descend(everyone, [random(8, seed=9)], lambda columns: columns / 800, 1e-6).state
    rest = LinearPoints(
        *(part[40:] for part in (everyone.points.x, everyone.points.y, everyone.points.weights))
    )
    objective = LinearRobustObjective(rest, everyone.outputs, Squared(), BallReach(0.2), 1e-2)
    cold = descend(objective, [random(8, seed=8)], lambda columns: columns / 800, 1e-6)
    factor = torch.linalg.cholesky(everyone.hessian(begun))
    warm = descend(objective, [begun.omega], lambda c: torch.cholesky_solve(c, factor), 1e-5)
    assert warm.state.bound <= 1e-5 and warm.rebuilds == 0 and warm.corrections <= 5
    assert float((warm.state.omega - cold.state.omega).norm()) <= 1e-5


def test_points_that_are_there_three_times_and_a_start_at_zero_are_no_obstacle() -> None:
    once = ridge(60, 5)
    x, y = once.points.x.repeat(3, 1), once.points.y.repeat(3)
    points = LinearPoints(x, y, torch.ones(180).double())
    objective = LinearRobustObjective(points, Outputs(1, 8, False), Squared(), BallReach(0.2), 1e-2)
    expected = descend(once, [random(8, seed=9)], lambda columns: columns / 60, 1e-5).state.omega
    found = descend(objective, [torch.zeros(8).double()], lambda columns: columns / 180, 1e-5)
    assert found.state.bound <= 1e-5
    assert float((found.state.omega - expected).norm()) <= 2e-5


def test_a_curvature_that_is_no_number_ends_the_step() -> None:
    nothing = torch.full((2, 2), float("nan"), dtype=torch.float64)
    sides = torch.ones(2, dtype=torch.float64)
    assert torch.equal(boxed_minimum(nothing, torch.ones(2).double(), sides, sides), sides)
