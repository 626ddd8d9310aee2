"""The objective in closed form against other formulas, and its bound against other optimisers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from scipy import optimize
from torch import Tensor

from lightning_muter.unlearning.descent import descend
from lightning_muter.unlearning.inner_dual import LevelLoss, Logistic, Squared
from lightning_muter.unlearning.linear_objective import (
    LinearPoints,
    LinearRobustObjective,
    Outputs,
    gap_bound,
)
from lightning_muter.unlearning.reach import BallReach, Reach, SmoothedSignReach

N, F, LAMBDA = 30, 3, 0.05
BALL, SIGN = BallReach(0.3), SmoothedSignReach(0.2, 0.05)


def made(
    loss: LevelLoss, reach: Reach, outputs: tuple[int, bool] = (1, True), seed: int = 0
) -> LinearRobustObjective:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, F, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + torch.randn(N, generator=generator, dtype=torch.float64) > 0).double()
    if isinstance(loss, Squared):
        y = x @ torch.arange(1.0, F + 1, dtype=torch.float64) + y
    weights = torch.ones(N, dtype=torch.float64)
    points = LinearPoints(x, y, weights)
    return LinearRobustObjective(points, Outputs(outputs[0], F, outputs[1]), loss, reach, LAMBDA)


def start(objective: LinearRobustObjective, seed: int = 1) -> Tensor:
    p = objective.outputs.count * (F + objective.outputs.biased)
    return torch.randn(p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("outputs", [(1, True), (1, False), (2, True), (2, False)], ids=str)
@pytest.mark.parametrize("reach", [BALL, SIGN], ids=repr)
@pytest.mark.parametrize("loss", [Logistic(), Squared(), Squared(0.1)], ids=repr)
def test_derivatives_against_finite_differences(
    loss: LevelLoss, reach: Reach, outputs: tuple[int, bool]
) -> None:
    objective = made(loss, reach, outputs)
    omega, h = start(objective), 1e-5
    state, hessian = objective.at(omega), objective.hessian(objective.at(omega))
    for unit in torch.eye(len(omega), dtype=torch.float64):
        up, down = objective.at(omega + h * unit), objective.at(omega - h * unit)
        slope = (up.value - down.value) / (2 * h)
        assert slope == pytest.approx(float(state.gradient @ unit), rel=1e-5, abs=1e-5)
        curve = (up.gradient - down.gradient) / (2 * h)
        torch.testing.assert_close(hessian @ unit, curve, rtol=1e-5, atol=1e-5)


def test_values_are_those_of_the_other_formulas() -> None:
    for loss, robust in (
        (Logistic(), reference.robust_logistic),
        (Squared(), reference.robust_squared),
    ):
        objective = made(loss, BALL)
        omega = start(objective)
        expected = robust(omega, objective.points.x, objective.points.y, 0.3, LAMBDA)
        assert objective.at(omega).value == pytest.approx(float(expected), rel=1e-13)
    objective = made(Logistic(), SIGN, (1, False))
    omega = start(objective)
    x, y = objective.points.x.numpy(), objective.points.y.numpy()
    value, gradient = reference.smoothed_linf_logistic(omega.numpy(), x, y, 0.2, 0.05, LAMBDA)
    assert objective.at(omega).value == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(objective.at(omega).gradient, torch.from_numpy(gradient))


def optimum(objective: LinearRobustObjective) -> Tensor:
    """By other software: SLSQP on the epigraph for ridge, quasi-Newton then autograd's Newton."""
    x, y = objective.points.x, objective.points.y
    if isinstance(objective.loss, Squared):
        return torch.from_numpy(epigraph(x.numpy(), y.numpy(), 0.3))
    w = torch.zeros(F + 1, dtype=torch.float64) + 0.1

    def robust(v: Tensor) -> Tensor:
        return reference.robust_logistic(v, x, y, 0.3, LAMBDA)

    for _ in range(60):
        (gradient,) = torch.autograd.grad(robust(w.requires_grad_(True)), w)
        w = w.detach()
        step, scale = torch.linalg.solve(reference.hessian(robust, w), gradient), 1.0
        while robust(w - scale * step) > robust(w) and scale > 1e-9:
            scale /= 2
        w = w - scale * step
    return w


def epigraph(x: Any, y: Any, eps: float) -> Any:
    """min ½ Σ (s_i + ε‖w‖)² + nλ/2 ‖ω‖² with s_i ≥ |residual_i|, by SLSQP."""
    n, f = x.shape

    def residual(v: Any) -> Any:
        return x @ v[:f] + v[f] - y

    def value(u: Any) -> Any:
        v, s = u[: f + 1], u[f + 1 :]
        return 0.5 * ((s + eps * np.linalg.norm(v[:f])) ** 2).sum() + 0.5 * n * LAMBDA * v @ v

    def slope(u: Any) -> Any:
        v, s = u[: f + 1], u[f + 1 :]
        norm = np.linalg.norm(v[:f])
        level = s + eps * norm
        own = n * LAMBDA * v
        own[:f] += level.sum() * eps * v[:f] / norm
        return np.concatenate([own, level])

    wide = np.hstack([x, np.ones((n, 1))])
    rows = np.block([[-wide, np.eye(n)], [wide, np.eye(n)]])
    limits = optimize.LinearConstraint(rows, np.concatenate([-y, y]), np.inf)
    first = np.linalg.lstsq(wide, y, rcond=None)[0]
    found = optimize.minimize(
        value,
        np.concatenate([first, np.abs(residual(first)) + 0.1]),
        jac=slope,
        method="SLSQP",
        constraints=limits,
        options={"maxiter": 1000, "ftol": 1e-15},
    )
    return found.x[: f + 1]


@pytest.mark.parametrize("loss", [Logistic(), Squared()], ids=repr)
def test_no_point_is_farther_from_the_optimum_than_its_bound(loss: LevelLoss) -> None:
    objective = made(loss, BALL)
    best = optimum(objective)
    generator = torch.Generator().manual_seed(2)
    for scale in (3.0, 1.0, 0.1, 1e-2, 1e-3):
        for _ in range(40):
            omega = best + scale * torch.randn(F + 1, generator=generator, dtype=torch.float64)
            state = objective.at(omega)
            assert float((omega - best).norm()) <= state.bound
            if objective.loss.kinked:  # any mixture of the two perturbations of a point serves
                mixing = 2 * torch.rand(N, generator=generator, dtype=torch.float64) - 1
                mixed = objective.at(omega, mixing)
                assert mixed.gap > 0 and float((omega - best).norm()) <= mixed.bound


@pytest.mark.parametrize("reach", [BALL, SIGN], ids=repr)
@pytest.mark.parametrize("loss", [Logistic(), Squared()], ids=repr)
def test_descends_to_the_radius_from_far_away(loss: LevelLoss, reach: Reach) -> None:
    for seed in range(5):
        objective = made(loss, reach, seed=seed)
        found = descend(objective, [start(objective)], lambda g: g / 30.0, 1e-6)
        assert found.state.bound <= 1e-6, seed
        if reach is BALL:
            assert float((found.state.omega - optimum(objective)).norm()) <= 2e-6


def test_a_ridge_optimum_on_a_kink_is_proved() -> None:
    on = []
    for seed in range(12):
        objective = made(Squared(), BALL, seed=seed)
        found = descend(objective, [start(objective)], lambda g: g / 30.0, 1e-6)
        assert found.state.bound <= 1e-6
        on.append(int((found.state.mixing.abs() < 1).sum()))
        assert float(found.state.level[found.state.mixing.abs() < 1].sum()) < 1e-12
    assert max(on) >= 1  # some optima are where a residual is zero


def test_a_descent_that_falls_short_says_how_near_it_came() -> None:
    objective = made(Logistic(), BALL)
    found = descend(objective, [start(objective)], lambda g: g / 30.0, 1e-18, rebuilds=3)
    assert 1e-18 < found.state.bound < 1e-3 and found.rebuilds > 0


@pytest.mark.parametrize("loss", [Logistic(), Squared()], ids=repr)
def test_the_rounding_margin_covers_a_gradient_in_more_digits(loss: LevelLoss) -> None:
    objective = made(loss, BALL, (1, False))
    omega = start(objective)
    state = objective.at(omega)
    tensors = (objective.points.x, objective.points.y, omega)
    x, y, w = (t.numpy().astype(np.longdouble) for t in tensors)
    norm = np.sqrt(w @ w)
    z, eps = x @ w, np.longdouble(0.3)
    if isinstance(loss, Logistic):
        side = 1 - 2 * y
        rho = 1 / (1 + np.exp(-(side * z + eps * norm)))
    else:
        side = np.where(z - y < 0, -1, 1).astype(np.longdouble)
        rho = np.abs(z - y) + eps * norm
    exact = x.T @ (rho * side) + rho.sum() * eps * w / norm + N * np.longdouble(LAMBDA) * w
    error = float(np.sqrt(((state.gradient.numpy().astype(np.longdouble) - exact) ** 2).sum()))
    assert error <= state.rounding < 1e-10


def test_an_optimum_without_weights_is_proved() -> None:
    objective = made(Logistic(), BallReach(2.0))  # the adversary can undo whatever is learned
    found = descend(objective, [start(objective)], lambda g: g / 30.0, 1e-10)
    assert found.state.bound <= 1e-10
    assert torch.equal(found.state.omega[:F], torch.zeros(F, dtype=torch.float64))
    positive = float(objective.points.y.mean())
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    losses = torch.logaddexp(grid * 0, grid) - positive * grid + 0.5 * LAMBDA * grid.square()
    assert float(found.state.omega[F]) == pytest.approx(float(grid[losses.argmin()]), abs=2e-4)


def test_the_bound_of_a_gap() -> None:
    # F(ω) = |ω| + ½ω²: at ω the slope of 0·ω + ½ω² is one of a function short of F by |ω|
    for omega in (0.01, 0.3, 2.0):
        assert omega <= gap_bound(omega, omega, 1.0)
    assert gap_bound(3.0, 0.0, 2.0) == 1.5
