"""The audits against closed forms, sampling and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from linear_cases import L2, fit_linear
from scipy import stats
from torch import nn

from lightning_muter import ConfigurationError, L2Ball, LinfBall, RemovalDataModule
from lightning_muter.evaluation.klom import KLoM, klom
from lightning_muter.evaluation.margins import margins, robust_margins
from lightning_muter.evaluation.reconstruction import (
    from_folder,
    from_heads,
    identified,
    similarity,
)
from lightning_muter.evaluation.residual_knowledge import recognition
from lightning_muter.evaluation.stress import hardest, self_influence
from lightning_muter.evaluation.unlearning_lira import UnlearningLiRA
from lightning_muter.models import view_of
from lightning_muter.responses import resolve_response
from lightning_muter.unlearning.point_problem import PointProblem


def linear(weight: list[list[float]]) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(len(weight[0]), len(weight), bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(weight))
    return model


def test_margins_by_hand_and_their_robust_ones_in_closed_form() -> None:
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    y = torch.tensor([1, 0])
    view = view_of(linear([[3.0, -4.0]]), "logistic", head="0")
    torch.testing.assert_close(margins(view, x, y), torch.tensor([-5.0, 5.0]).double())
    memory = fit_linear("logistic", L2)[1].memory
    assert memory is not None
    worst = robust_margins(view, memory.settings.problem(), x, y)
    expected = torch.tensor([-5.0, 5.0]).double() - L2.eps * 5.0  # ‖w‖ = 5
    torch.testing.assert_close(worst, expected, rtol=1e-6, atol=1e-6)
    three = view_of(linear([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), "cross_entropy", head="0")
    expected = torch.stack([2.0 - torch.logaddexp(x[0, 0], x[0].sum())])
    torch.testing.assert_close(margins(three, x[:1], y[:1]), expected)
    with pytest.raises(ConfigurationError, match="margins"):
        margins(view_of(linear([[1.0, 1.0]]), "squared", head="0"), x, y)


def test_klom_is_the_divergence_of_gaussians() -> None:
    torch.manual_seed(0)
    reference = 1.0 + 2.0 * torch.randn(20_000, 3, dtype=torch.float64)
    other = torch.tensor([1.0, 2.0, 1.0]) + torch.tensor([2.0, 2.0, 1.0]) * torch.randn(
        20_000, 3, dtype=torch.float64
    )
    normal = torch.distributions.Normal
    expected = [
        float(torch.distributions.kl_divergence(normal(1.0, 2.0), normal(m, s)))
        for m, s in ((1.0, 2.0), (2.0, 2.0), (1.0, 1.0))
    ]
    found = klom(other, reference)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0.05, atol=2e-3)
    # few Retrains against few Retrains: what a perfect unlearner has
    few = torch.randn(2, 100, 400, dtype=torch.float64)
    assert 0 < float(klom(few[0], few[1]).mean()) < 4 / 100
    metric = KLoM()
    for row in reference[:50]:
        metric.update(row, retrained=True)
    for row in other[:60]:
        metric.update(row, retrained=False)
    torch.testing.assert_close(metric.compute(), klom(other[:60], reference[:50]).mean())
    with pytest.raises(ConfigurationError, match="two at the least"):
        klom(other[:1], reference)


def test_recognition_is_the_share_of_the_ball_on_the_right_side() -> None:
    view = view_of(linear([[1.0, 0.0]]), "logistic", head="0")
    x = torch.tensor([[0.05, 0.0], [-0.05, 3.0], [-0.3, 0.0]], dtype=torch.float64)
    y = torch.ones(3, dtype=torch.long)
    found = recognition(view, LinfBall(0.1), x, y, draws=4000)
    expected = torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found.rate, expected, rtol=0, atol=0.03)
    assert found.again == pytest.approx(1 / 3)  # the second is wrong, and right nearby
    again = recognition(view, LinfBall(0.1), x, y, draws=4000)
    torch.testing.assert_close(again.rate, found.rate, rtol=0, atol=0)  # the same perturbations
    less = recognition(view, LinfBall(0.1), x - torch.tensor([0.05, 0.0]).double(), y, draws=4000)
    assert found.residual(found) == pytest.approx(1.0)
    assert found.residual(less) == pytest.approx(1.0 / 0.5, rel=0.1)


def test_u_lira_has_the_auc_of_two_gaussians() -> None:
    torch.manual_seed(1)
    shift, models, points = 1.0, 300, 200
    metric = UnlearningLiRA()
    unlearned = shift + torch.randn(models, points, dtype=torch.float64)
    retrained = torch.randn(models, points, dtype=torch.float64)
    for k in range(models // 2, models):
        shadows = (unlearned[: models // 2], retrained[: models // 2])
        metric.update(unlearned[k], *shadows, was_unlearned=True)
        metric.update(retrained[k], *shadows, was_unlearned=False)
    expected = float(stats.norm.cdf(shift / math.sqrt(2)))
    assert float(metric.compute()) == pytest.approx(expected, abs=0.01)
    same = UnlearningLiRA()
    for k in range(models // 2, models):
        shadows = (retrained[: models // 4], retrained[models // 4 : models // 2])
        same.update(retrained[k], *shadows, was_unlearned=k % 2 == 0)
    assert float(same.compute()) == pytest.approx(0.5, abs=0.02)  # a perfect unlearner


def test_the_forgotten_input_is_read_off_until_a_rebase() -> None:
    trainer, callback, _, data = fit_linear("logistic", L2Ball(0.05))
    before = callback.memory
    assert before is not None
    x = data.dataset.tensors[0]
    with pytest.raises(ConfigurationError, match="0 points"):
        from_folder(before, outputs=1, biased=True)
    trainer.unlearn(RemovalDataModule(data, [7]))
    after = callback.memory
    assert after is not None and after.curvature is not None
    w = after.omega_star[:4]
    truth = x[7] + L2Ball(0.05).eps * (w / w.norm()) * (1 - 2 * data.dataset.tensors[1][7])
    folder = from_folder(after, outputs=1, biased=True)
    assert similarity(folder, truth) == pytest.approx(1.0, abs=1e-9)
    assert similarity(folder, x[7]) > 0.99 and identified(folder, x, 7)
    heads = from_heads(
        after.omega_star, after.omega, after.curvature.matvec, 1, after.settings.weight_decay
    )
    assert similarity(heads[:4], truth) == pytest.approx(1.0, abs=1e-6)
    noisy = after.omega + 10.0 * torch.randn(5, generator=torch.Generator().manual_seed(0)).double()
    blurred = from_heads(after.omega_star, noisy, after.curvature.matvec, 1)
    assert similarity(blurred[:4], truth) < 0.99
    trainer.rebase(data)
    rebased = callback.memory
    assert rebased is not None
    with pytest.raises(ConfigurationError, match="0 points"):
        from_folder(rebased, outputs=1, biased=True)


def test_of_several_outputs_the_input_is_the_common_direction() -> None:
    h = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    gradient = torch.outer(torch.tensor([0.2, -0.5, 0.3]).double(), h).flatten()
    guess = from_heads(torch.zeros(9).double(), gradient, lambda v: v, outputs=3)
    assert similarity(guess, h) == pytest.approx(1.0)


def test_self_influence_is_the_rise_of_a_points_own_loss() -> None:
    _, callback, model, data = fit_linear("logistic", L2)
    memory = callback.memory
    assert memory is not None and memory.curvature is not None
    x, y = data.dataset.tensors
    found = self_influence(memory, model, (x, y))
    inverse = torch.linalg.inv(memory.curvature.matrix)
    omega = memory.omega_star
    norm = omega[:4].norm()
    for i in range(60):
        side = 1.0 - 2 * y[i]
        rho = torch.sigmoid(side * (x[i] @ omega[:4] + omega[4]) + L2.eps * norm)
        worst = x[i] + side * L2.eps * omega[:4] / norm
        gradient = rho * side * torch.cat([worst, torch.ones(1, dtype=torch.float64)])
        expected = gradient @ inverse @ (gradient + memory.settings.weight_decay * omega)
        assert float(found[i]) == pytest.approx(float(expected), rel=1e-5)


def test_the_hardest_points_move_the_parameters_farther_than_others() -> None:
    trainer, callback, model, data = fit_linear("logistic", L2)
    memory, state = callback.memory, {k: v.clone() for k, v in model.state_dict().items()}
    assert memory is not None
    chosen = hardest(memory, model, data.dataset.tensors, 6).tolist()
    moved = []
    for gone in (chosen, [0, 11, 22, 33, 44, 55], [5, 15, 25, 35, 45, 58]):
        callback.memory = memory
        model.load_state_dict(state)
        moved.append(trainer.unlearn(RemovalDataModule(data, gone)).update_norm)
    assert moved[0] > 2 * max(moved[1:])
    with pytest.raises(ConfigurationError, match="count=61"):
        hardest(memory, model, data.dataset.tensors, 61)


def test_margins_and_recognition_in_pixels_are_those_with_the_normalisation_inside() -> None:
    generator = torch.Generator().manual_seed(4)
    pixels = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    y, head = torch.tensor([0, 1, 0, 1, 1, 0]), nn.Linear(3, 2).double()

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((x - 0.5) / 0.25)

    plain, scaled = L2Ball(0.2), L2Ball(0.2, mean=0.5, std=0.25)
    inside = view_of(Inside(), "cross_entropy", head="head")
    outside = view_of(nn.Sequential(head), "cross_entropy", head="0", scaling=scaled.scaling)
    x, response = (pixels - 0.5) / 0.25, resolve_response("constrained")
    found = robust_margins(outside, PointProblem("muter", scaled, response), x, y)
    expected = robust_margins(inside, PointProblem("muter", plain, response), pixels, y)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(found, margins(outside, x, y))
    shown = recognition(outside, scaled, x, y), recognition(inside, plain, pixels, y)
    assert torch.equal(shown[0].rate, shown[1].rate)
