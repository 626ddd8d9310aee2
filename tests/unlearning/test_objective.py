"""Newton's method on the robust objective, against solvers that share no code with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import scipy.optimize
import torch
from cases import fit, memory_of
from torch import Tensor, nn

from lightning_muter import L2Ball, LinfBall, Threat
from lightning_muter.lightning import after_training
from lightning_muter.models import LinearHead
from lightning_muter.objectives.resolve import resolve_objective
from lightning_muter.responses import Constrained
from lightning_muter.unlearning import objective as objective_module
from lightning_muter.unlearning.maxima import LastMaxima
from lightning_muter.unlearning.objective import (
    HALVINGS,
    LOITERS,
    RobustObjective,
    line_search,
    newton,
)
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import unweighted

N, D, LAM = 80, 6, 1e-2


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(0, 2, (N,), generator=generator)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return x + 0.8 * (2 * y - 1).unsqueeze(1), y


def robust_objective(threat: Threat) -> RobustObjective:
    torch.manual_seed(0)
    x, y = data()
    model = nn.Sequential(nn.Linear(D, 1, bias=False)).double()
    derivatives = LinearHead(model, "0", resolve_objective(None, "logistic"))
    problem = PointProblem("muter", threat, Constrained(), LAM, max_iter=2000)
    return RobustObjective(derivatives, problem, lambda: [unweighted(x, y)])


def solve(threat: Threat) -> tuple[Tensor, list[float]]:
    objective = robust_objective(threat)
    history = newton(objective, 30)
    return objective.view.get(), history


@pytest.mark.parametrize("tau", [1e-1, 1e-2, 1e-3])
def test_linf_optimum_is_the_brute_force_one(tau: float) -> None:
    x, y = (t.numpy() for t in data())
    omega, history = solve(LinfBall(0.2, bandwidth=tau))
    found = scipy.optimize.minimize(
        lambda w: reference.smoothed_linf_logistic(w, x, y, 0.2, tau, LAM),
        np.zeros(D),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9},
    )
    assert np.abs(found.jac).max() < 1e-6 and history[-1] < 1e-6
    np.testing.assert_allclose(omega.numpy(), found.x, rtol=1e-5, atol=1e-7)


def test_l2_optimum_is_that_of_the_closed_form() -> None:
    x, y = data()
    omega, history = solve(L2Ball(0.5))
    w = omega.clone().requires_grad_(True)
    padded = torch.cat([w, w.new_zeros(1)])  # the closed form has a bias
    (gradient,) = torch.autograd.grad(reference.robust_logistic(padded, x, y, 0.5, LAM), w)
    assert float(gradient.norm()) < 1e-7 and history[-1] < 1e-7


def test_a_hessian_serves_further_steps_and_the_history_falls() -> None:
    _, history = solve(L2Ball(0.5))
    assert len(history) <= 6
    assert all(later <= earlier for earlier, later in zip(history, history[1:], strict=False))


def test_a_hessian_where_the_last_trial_was_finds_no_perturbation_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = robust_objective(LinfBall(0.2, bandwidth=1e-2))
    ascents, perturb = [], PointProblem.perturb

    def counted(self: PointProblem, *args: Any, **named: Any) -> Any:
        ascents.append(self.threat)
        return perturb(self, *args, **named)

    monkeypatch.setattr(PointProblem, "perturb", counted)
    first = objective.gradient()
    evaluation, curvature = objective.curvature(objective.problem.rough())
    assert len(ascents) == 1 and torch.equal(evaluation.gradient, first.gradient)
    fresh = robust_objective(LinfBall(0.2, bandwidth=1e-2))
    assert torch.equal(fresh.curvature()[1].matrix, curvature.matrix)  # type: ignore[attr-defined]
    ascents.clear()
    objective.gradient(objective.problem.at_bandwidth(10.0))  # another inner problem
    objective.view.set(objective.view.get() + 0.1)
    moved = objective.gradient()
    assert len(ascents) == 2 and not torch.equal(moved.gradient, first.gradient)


def test_stage_one_begins_with_the_perturbations_of_newton_s_last_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No ascent of its own, and bit by bit the memory of one that has."""
    ascents: list[int] = []
    perturb = PointProblem.perturb

    def counted(self: PointProblem, view: Any, batch: Any, *more: Any) -> Any:
        ascents.append(len(batch))
        return perturb(self, view, batch, *more)

    monkeypatch.setattr(PointProblem, "perturb", counted)
    found = []
    for forgets in (False, True):
        begun = []
        with monkeypatch.context() as patch:
            if forgets:
                patch.setattr(LastMaxima, "kept", lambda self, batch: None)
            own = after_training.build_memories
            patch.setattr(
                after_training,
                "build_memories",
                lambda *given, own=own, begun=begun: (begun.append(len(ascents)), own(*given))[1],
            )
            _, callback, _, _ = fit(newton_steps=4)
        found.append((memory_of(callback), len(ascents) - begun[0]))
    (quick, none), (whole, one) = found
    assert none == 0 and one > 0
    assert torch.equal(quick.omega, whole.omega)
    assert torch.equal(quick.curvature.matrix, whole.curvature.matrix)  # type: ignore[union-attr]
    assert torch.equal(quick.residual_gradient, whole.residual_gradient)
    _, elsewhere, _, _ = fit(newton_steps=4, method="newton")  # at clean points: nothing is shared
    assert memory_of(elsewhere).summary["stationary"] == 1.0


def test_newton_ends_early_where_nothing_has_a_derivative() -> None:
    """All steps of a ReLU network on its kinks bring no more than the few that are taken."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(D, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    net = net.double()
    for layer in net[:-1]:
        for parameter in layer.parameters():
            parameter.data.mul_(3.0)
    x, y = data()
    ends = {}
    for loiters in (LOITERS, 1e9):
        net[-1].weight.data.fill_(0.1)
        net[-1].bias.data.zero_()
        view = LinearHead(net, "4", resolve_objective(None, "logistic"))
        problem = PointProblem("muter", L2Ball(1.0), Constrained(), 1e-2)
        objective = RobustObjective(view, problem, lambda: [unweighted(x, y)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objective_module, "LOITERS", loiters)
            ends[loiters] = newton(objective, 10)
        assert objective.gradient().stationary < 0.5
    short, long = ends[LOITERS], ends[1e9]
    assert len(short) < len(long) and long[: len(short)] == short
    assert min(long) > 0.1 * short[-1]


def test_the_line_search_shortens_a_step_that_is_far_too_long() -> None:
    objective = robust_objective(LinfBall(0.2, bandwidth=1e-3))
    newton(objective, 30)
    omega = objective.view.get() * 1.001  # where any long step raises F and ‖∇F‖
    objective.view.set(omega)
    start, curvature = objective.curvature()
    step = 2.0**12 * torch.linalg.solve(curvature.matrix, start.gradient)
    trial = line_search(objective, objective.problem, omega, step, start, HALVINGS)
    assert trial is not None and trial.value < start.value
    torch.testing.assert_close(objective.gradient().gradient, trial.gradient)
    assert line_search(objective, objective.problem, omega, step, start, 0) is None
    torch.testing.assert_close(objective.view.get(), omega)
