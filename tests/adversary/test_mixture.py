"""A mixed adversary: its soft maximum, derivatives and optimum against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_muter import L2Ball, LinfBall, total_hessian
from lightning_muter.errors import ConfigurationError
from lightning_muter.models import view_of
from lightning_muter.responses import Constrained
from lightning_muter.unlearning.objective import RobustObjective, newton
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import unweighted

N, D, EPS, T, LAM = 40, 5, 0.4, 0.02, 0.05
THREAT = L2Ball(EPS, temperature=T)


def problem() -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    w = torch.randn(D, generator=generator, dtype=torch.float64)
    y = x @ w + 0.5 * torch.randn(N, generator=generator, dtype=torch.float64)
    head = nn.Linear(D, 1, bias=False).double()
    head.weight.data.copy_(0.7 * w)
    return head, x, y


def soft_ridge(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Σ T log Σ exp(l_k / T) over the local maxima of ½(r + wᵀδ)² in the ball, written out.

    On the side of r there is always one, ½(|r| + ε‖w‖)²; on the other, ½(ε‖w‖ - |r|)², only where
    the ball reaches across zero.
    """
    r, reach = (x @ w - y).abs(), EPS * w.norm()
    far, near = 0.5 * (r + reach) ** 2, 0.5 * (reach - r) ** 2
    soft = T * torch.logsumexp(torch.stack([far, near]) / T, dim=0)
    return torch.where(r < reach, soft, far).sum() + 0.5 * len(x) * LAM * w.square().sum()


class Model(nn.Module):
    """A head has a name."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def robust(model: Model, x: Tensor, y: Tensor, threat: L2Ball = THREAT) -> RobustObjective:
    derivatives = view_of(model, "squared", head="head")
    asked = PointProblem("muter", threat, Constrained(), LAM)
    return RobustObjective(derivatives, asked, lambda: [unweighted(x, y)])


def test_value_gradient_and_hessian_are_those_of_the_closed_form() -> None:
    head, x, y = problem()
    w = head.weight.detach().reshape(-1).clone()
    crossing = ((x @ w - y).abs() < EPS * w.norm()).double().mean()
    assert 0.1 < float(crossing) < 0.9  # both kinds of points are there
    evaluation, curvature = robust(Model(head), x, y).curvature()
    matrix = curvature.matrix
    w.requires_grad_(True)
    value = soft_ridge(w, x, y)
    (gradient,) = torch.autograd.grad(value, w)
    expected = torch.autograd.functional.hessian(lambda v: soft_ridge(v, x, y), w.detach())
    torch.testing.assert_close(evaluation.value, float(value.detach()))
    torch.testing.assert_close(evaluation.gradient, gradient)
    torch.testing.assert_close(matrix, expected, rtol=1e-7, atol=1e-8)


def test_any_parameters_give_the_same_hessian_as_a_head() -> None:
    head, x, y = problem()
    model = Model(head)
    first = total_hessian(model, (x, y), THREAT, head="head", loss="squared")
    second = total_hessian(model, (x, y), THREAT, parameters=["head.weight"], loss="squared")
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-9)


def test_ridge_is_stationary_at_a_temperature_and_at_no_other() -> None:
    head, x, y = problem()
    model = Model(head)
    start = head.weight.detach().clone()
    assert newton(robust(model, x, y), 40)[-1] < 1e-8
    w = head.weight.detach().reshape(-1).clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(soft_ridge(w, x, y), w)
    assert float(gradient.norm()) < 1e-8
    head.weight.data.copy_(start)
    assert newton(robust(model, x, y, L2Ball(EPS)), 40)[-1] > 1e-3  # the kinks are real


def test_a_rival_that_is_the_same_maximiser_has_no_weight() -> None:
    head, x, _ = problem()
    y = (torch.arange(N) % 2).double()
    hard = total_hessian(Model(head), (x, y), L2Ball(EPS), head="head", loss="logistic")
    mixed = total_hessian(Model(head), (x, y), THREAT, head="head", loss="logistic")
    torch.testing.assert_close(mixed, hard)


def test_points_of_a_smoothed_linf_ball_mix_too() -> None:
    head, x, y = problem()
    threat = LinfBall(0.2, bandwidth=0.05, temperature=T)
    objective = robust(Model(head), x, y, threat)  # type: ignore[arg-type]
    matrix = objective.curvature()[1].matrix
    derivatives = objective.view
    w = derivatives.get()
    columns = []
    for j in range(D):
        step = torch.zeros(D, dtype=torch.float64)
        step[j] = 1e-6
        with derivatives.at(w + step):
            above = objective.gradient().gradient
        with derivatives.at(w - step):
            columns.append((above - objective.gradient().gradient) / 2e-6)
    torch.testing.assert_close(matrix, torch.stack(columns, dim=1), rtol=1e-5, atol=1e-5)


def test_a_temperature_is_positive() -> None:
    with pytest.raises(ConfigurationError, match="temperature=0"):
        L2Ball(1.0, temperature=0.0)
