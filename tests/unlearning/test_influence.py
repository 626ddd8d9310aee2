"""Influence against really run leave-one-out retraining, and against a plain loop."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import fit, memory_of
from linear_cases import L2, LAMBDA, LINF, LinearData, N, fit_linear
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_muter import (
    ConfigurationError,
    L2Ball,
    MUterCallback,
    RemovalDataModule,
    SolverError,
    StateError,
    UnlearningMemory,
    adversarial_influence,
    influence_on_losses,
    top_influences,
)
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.models import measuring
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.stage_one import build_memories


def robust_losses(omega: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Closed form of single points."""
    sign = 2.0 * y - 1
    margin = sign * (x @ omega[:-1] + omega[-1]) - L2.eps * omega[:-1].norm()
    return torch.nn.functional.softplus(-margin)


def left_out(x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The optimum (n, p) without each of the points, by Newton's method on the closed form."""
    found = []
    for i in range(len(x)):
        keep = [k for k in range(len(x)) if k != i]

        def robust(w: Tensor, keep: list[int] = keep) -> Tensor:
            return reference.robust_logistic(w, x[keep], y[keep], L2.eps, LAMBDA)

        w = start.clone()
        for _ in range(5):
            (gradient,) = torch.autograd.grad(robust(w.requires_grad_(True)), w)
            w = w.detach()
            w = w - torch.linalg.solve(reference.hessian(robust, w), gradient)
        assert float(gradient.norm()) < 1e-8
        found.append(w)
    return torch.stack(found)


def test_leave_one_out_retraining_agrees_in_sign_scale_and_order() -> None:
    _, callback, model, data = fit_linear("logistic", L2)
    memory = memory_of(callback)
    x, y = data.dataset.tensors
    retrained = left_out(x, y, memory.omega_star)
    moved = retrained - memory.omega_star
    influence = adversarial_influence(memory, model, (x, y))
    predicted = -influence / N
    assert float(torch.corrcoef(torch.stack([predicted.flatten(), moved.flatten()]))[0, 1]) > 0.99
    test = LinearData("logistic", n=25, seed=9).dataset.tensors
    before = robust_losses(memory.omega_star, *test)
    truth = torch.stack([robust_losses(w, *test) - before for w in retrained])
    change = influence_on_losses(memory, model, (x, y), test)
    for t in range(25):
        assert float(np.corrcoef(change[:, t].numpy(), truth[:, t].numpy())[0, 1]) >= 0.95
    scale = float((change * truth).sum() / (change * change).sum())
    assert 0.95 < scale < 1.1  # first order: removal itself moves a little more


def test_the_points_that_made_a_point_robust_are_those_whose_loss_raises_it() -> None:
    _, callback, model, data = fit_linear("logistic", L2)
    memory = memory_of(callback)
    x, y = data.dataset.tensors
    one = tuple(tensor[:1] for tensor in LinearData("logistic", n=25, seed=9).dataset.tensors)
    found = top_influences(memory, model, (x, y), one, count=3)
    before = robust_losses(memory.omega_star, *one)
    retrained = left_out(x, y, memory.omega_star)
    truth = torch.stack([robust_losses(w, *one) - before for w in retrained]).squeeze(1)
    assert len(found.robust) == len(found.fragile) == 3  # up to points of nearly one influence
    assert bool((truth[list(found.robust)] >= 0.9 * truth.topk(3).values[2]).all())
    assert bool((truth[list(found.fragile)] <= -0.9 * (-truth).topk(3).values[2]).all())
    assert all(gain > 0 for gain in found.gains) and all(loss < 0 for loss in found.losses)
    with pytest.raises(ConfigurationError, match="25 test points"):
        top_influences(memory, model, (x, y), LinearData("logistic", n=25).dataset.tensors)
    with pytest.raises(ConfigurationError, match="count=0"):
        top_influences(memory, model, (x, y), one, count=0)


@pytest.mark.parametrize("removed", [[], [4, 9]])
def test_batches_agree_with_a_loop_of_dense_solves(removed: list[int]) -> None:
    trainer, callback, model, data = fit()
    if removed:
        trainer.unlearn(RemovalDataModule(data, removed))
    memory = memory_of(callback)
    assert memory.curvature is not None
    x, y = data.dataset.tensors
    rows = [i for i in range(41) if i not in removed]
    found = adversarial_influence(memory, model, (x[rows], y[rows]))
    again = torch.cat([adversarial_influence(memory, model, (x[[i]], y[[i]])) for i in rows])
    torch.testing.assert_close(found, again, rtol=1e-6, atol=1e-8)
    product = torch.stack([memory.curvature.matvec(row) for row in found])
    back = torch.stack([memory.curvature.matvec(row) for row in again])
    torch.testing.assert_close(product, back, rtol=1e-6, atol=1e-8)
    change = influence_on_losses(memory, model, (x[rows], y[rows]), (x[:3], y[:3]))
    gradients = -product / len(rows)  # M I = -n ∇l
    expected = (gradients + 1e-2 * memory.omega_star) @ torch.linalg.solve(
        memory.curvature.matrix, gradients[:3].T if not removed else _first(memory, model, x, y).T
    )
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-8)


def _first(memory: Any, model: Any, x: Tensor, y: Tensor) -> Tensor:
    found = adversarial_influence(memory, model, (x[:3], y[:3]))
    n = len(memory.remaining)
    return torch.stack([memory.curvature.matvec(row) for row in found]) / -n


def test_a_memory_that_cannot_tell_is_refused() -> None:
    _, callback, model, data = fit_linear(method="none")
    batch = data.dataset.tensors
    with pytest.raises(StateError, match="no curvature"):
        adversarial_influence(memory_of(callback), model, batch)


def test_an_indefinite_memory_has_no_influence() -> None:
    _, callback, model, data = fit_linear("logistic", L2)
    memory = memory_of(callback)
    assert memory.curvature is not None
    turned = memory.curvature.matrix.clone()
    turned[0, 0] = -turned[0, 0]
    indefinite = replace(memory, curvature=DenseCurvature(turned))
    with pytest.raises(SolverError, match="indefinite"):
        adversarial_influence(indefinite, model, data.dataset.tensors)


def test_smoothed_balls_too() -> None:
    _, callback, model, data = fit_linear("logistic", LINF)
    x, y = data.dataset.tensors
    memory = memory_of(callback)
    change = influence_on_losses(memory, model, (x[:6], y[:6]), (x[:4], y[:4]))
    for i in range(6):
        keep = [k for k in range(N) if k != i]
        rest = LinearData("logistic")
        rest.dataset = TensorDataset(x[keep], y[keep])
        other = memory_of(fit_linear("logistic", LINF, data=rest)[1]).omega_star
        view, problem = memory.settings.view(model), memory.settings.problem()
        values = []
        for omega in (memory.omega_star, other):
            with measuring(model), view.at(omega):
                inner = problem.perturb(view, unweighted(x[:4], y[:4]))
                values.append(inner.losses + problem.threat.merit(inner.delta, inner.grad))
        torch.testing.assert_close(change[i], values[1] - values[0], rtol=0.15, atol=2e-5)


def test_rows_agree_with_a_dense_memory() -> None:
    found = []
    for representation in ("dense", "rows"):
        _, callback, model, data = fit_linear("cross_entropy", L2, representation=representation)
        x, y = data.dataset.tensors
        change = influence_on_losses(memory_of(callback), model, (x, y), (x[:5], y[:5]))
        found.append(change)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-8)


def test_systems_of_rows_share_the_passes_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _, callback, model, data = fit_linear("cross_entropy", L2, representation="rows")
    x, y = data.dataset.tensors
    x, y, memory = x[:20], y[:20], memory_of(callback)
    passes = 0
    matvec = PointRows.matvec

    def counted(self: PointRows, v: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return matvec(self, v)

    monkeypatch.setattr(PointRows, "matvec", counted)
    together = adversarial_influence(memory, model, (x, y))
    shared, passes = passes, 0
    alone = torch.cat([adversarial_influence(memory, model, (x[[i]], y[[i]])) for i in range(20)])
    assert shared < passes / 5  # 16 at once, then 4
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7 * float(alone.abs().max()))


def test_points_and_models_that_are_not_the_memorys_are_refused() -> None:
    _, callback, model, data = fit(attack_steps=2)
    memory, (x, y) = memory_of(callback), data.dataset.tensors
    with pytest.raises(ConfigurationError, match="integer classes 0 to 2"):
        adversarial_influence(memory, model, (x[:2], y[:2] + 9))
    with pytest.raises(ConfigurationError, match="one or more points"):
        influence_on_losses(memory, model, (x[:2], y[:2]), (x[:0], y[:0]))
    with torch.no_grad():
        model.backbone[0].weight.mul_(1.1)
    with pytest.raises(StateError, match="frozen weights are not the memory's"):
        adversarial_influence(memory, model, (x[:2], y[:2]))


def kinked_memory() -> tuple[nn.Sequential, UnlearningMemory]:
    """z = 0.3 x₂ - |x₁| of ReLU features, a head at no optimum, and points far from the kink."""
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
        module[0].bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
        module[2].weight.copy_(torch.tensor([[-1.0, -1.0, 0.3]]))
        module[2].bias.fill_(-2.7)
    x = torch.cat([torch.linspace(2, 4, 10), torch.linspace(-4, -2, 10)]).double()
    x = torch.stack([x, x.roll(7)], dim=1)
    options = {"head": "2", "loss": "logistic", "threat": L2Ball(0.5), "weight_decay": LAMBDA}
    settings = MUterCallback(**options).settings
    digests = torch.zeros(len(x), 16, dtype=torch.uint8)
    batches = [unweighted(x, torch.arange(20) % 2)]
    (memory,) = build_memories(module, [settings], batches, digests, bytes(16))
    return module, memory


def test_points_whose_adversary_sits_on_a_kink_are_not_told_as_good() -> None:
    module, memory = kinked_memory()
    memory = replace(memory, warnings=())
    x = torch.tensor([[0.1, 0.0], [-0.2, 1.0], [0.05, 2.0], [3.0, 0.0]], dtype=torch.float64)
    kinked, smooth = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)
    with pytest.warns(UserWarning, match="only 25% of these points' perturbations are stationary"):
        adversarial_influence(memory, module, (x, kinked))
    with pytest.warns(UserWarning, match="only 0% of these points"):
        top_influences(memory, module, (x, smooth), (x[:1], kinked[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        influence_on_losses(memory, module, (x, smooth), (x[3:], kinked[3:]))


def test_what_a_memory_warns_of_its_influences_say_too() -> None:
    module, memory = kinked_memory()
    assert len(memory.warnings) == 1 and "stopped about" in memory.warnings[0]
    x = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="stopped about"):
        adversarial_influence(memory, module, (x, torch.ones(1, dtype=torch.long)))
