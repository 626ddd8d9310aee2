"""A tiny gradient is not a maximum: saturated models against closed forms, and changes of scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_muter import L2Ball, LinfBall, Threat, total_hessian
from lightning_muter.adversary.ascent import projected_gradient_ascent, without_blind_spots
from lightning_muter.adversary.attack_library import Attack
from lightning_muter.adversary.maximiser import InnerMaximum, maximise
from lightning_muter.evaluation.judge import strongest_loss
from lightning_muter.models import view_of
from lightning_muter.objectives.losses import LOG_ODDS
from lightning_muter.objectives.resolve import resolve_loss
from lightning_muter.responses import Constrained
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import unweighted

N, D = 120, 20
THREATS = [L2Ball(0.7), L2Ball(0.7, (0, 1)), LinfBall(0.2), LinfBall(0.2, (0, 1))]


def saturated(
    outputs: int, order: float, dtype: torch.dtype, sure: float, scale: float
) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A linear model of inputs 0..scale, its own labels, and each point's distance to an error."""
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.rand(N, D, generator=generator, dtype=torch.float64)
    w = torch.randn(outputs, D, generator=generator, dtype=torch.float64)
    w -= w.mean(dim=1, keepdim=True)
    model = nn.Linear(D, outputs, bias=False).to(dtype)
    model.weight.data.copy_(sure * w / scale)
    x = x.to(dtype)
    with torch.no_grad():
        z = model(x).double()
    weight = model.weight.detach().double()
    if outputs == 1:
        y = (z[:, 0] > 0).long()
        distance = z[:, 0].abs() / torch.linalg.vector_norm(weight[0], order)
    else:
        y = z.argmax(dim=1)
        apart = torch.linalg.vector_norm(weight.unsqueeze(0) - weight.unsqueeze(1), order, dim=2)
        gaps = (z.gather(1, y[:, None]) - z) / apart[y].clamp(min=1e-12)
        gaps[torch.arange(N), y] = torch.inf
        distance = gaps.amin(dim=1)
    return model, x, y, distance


def dual(threat: Threat) -> float:
    return 2.0 if threat.norm == "L2" else 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["L2", "Linf"])
@pytest.mark.parametrize("outputs", [1, 2, 4])
@pytest.mark.parametrize(("sure", "scale"), [(30.0, 1.0), (1000.0, 255.0), (1.0, 1.0)])
@pytest.mark.parametrize("bounded", [False, True], ids=["free", "range"])
def test_robust_accuracy_of_a_linear_model_is_the_closed_form(
    dtype: torch.dtype, kind: str, outputs: int, sure: float, scale: float, bounded: bool
) -> None:
    """The range is wide enough for the whole ball."""
    order = 2.0 if kind == "L2" else 1.0
    model, x, y, distance = saturated(outputs, order, dtype, sure, scale)
    eps = float(distance.quantile(0.8))
    data_range = (-2 * scale, 3 * scale) if bounded else None
    threat: Threat = (L2Ball if kind == "L2" else LinfBall)(eps, data_range)
    loss = resolve_loss("logistic" if outputs == 1 else "cross_entropy")
    _, correct = strongest_loss(model, loss, threat, (x, y), 30, 3)
    clear = (distance - eps).abs() > 0.03 * eps  # an attack ends a little short of the boundary
    wrong = correct[clear] != (distance > eps)[clear]
    assert float(wrong.double().mean()) <= (0.0 if outputs < 3 else 0.05)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_maximisers_of_a_saturated_model_are_the_closed_form(
    threat: Threat, outputs: int, dtype: torch.dtype
) -> None:
    """Log-odds to -30,000: losses of a double underflow as well as a float's."""
    name = "logistic" if outputs == 1 else "cross_entropy"
    for sure in (1.0, 30.0, 3e4):
        model, x, y, _ = saturated(outputs, dual(threat), dtype, sure, 1.0)
        derivatives = view_of(model_of(model), name, head="head")
        asked = PointProblem("muter", threat, Constrained())
        found = asked.perturb(derivatives, unweighted(x, y))
        weight = model.weight.detach().double()
        towards = (1.0 - 2.0 * y)[:, None] * (weight if outputs == 1 else weight[1] - weight[0])
        whole = torch.full((N, 1), torch.inf, dtype=torch.float64)
        flat = x.double()
        exact = threat.ascend(flat, torch.zeros_like(flat), towards, whole)
        assert bool(found.stationary.all())
        torch.testing.assert_close(found.delta, exact, rtol=1e-4, atol=1e-5 * threat.eps)


def model_of(head: nn.Module) -> nn.Module:
    net = nn.Sequential()
    net.add_module("head", head)
    return net


@pytest.mark.parametrize("which", ["all", "surest"])
def test_a_saturated_robust_hessian_is_that_of_the_closed_form(which: str) -> None:
    """At the surest the probability of the true label is 1 to a double's rounding."""
    model, x, y, distance = saturated(2, 2.0, torch.float64, 30.0, 1.0)
    eps = 0.3
    order = distance.argsort(descending=True)
    x, y = (t[order[:5]] if which == "surest" else t for t in (x, y))

    def robust(flat: Tensor) -> Tensor:
        w = flat.reshape(2, D)
        apart = w[1] - w[0]
        odds = (1 - 2 * y) * (x @ apart) + eps * apart.norm()
        return F.softplus(odds).sum()

    w = model.weight.detach().reshape(-1)
    expected = torch.autograd.functional.hessian(robust, w)
    got = total_hessian(model_of(model), (x, y), L2Ball(eps), head="head")
    assert float((got - expected).norm() / expected.norm()) < 1e-6


def tanh_problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    return net, torch.rand(12, 8).double(), torch.randint(0, 3, (12,))


def scaled_maximum(threat: Threat, factor: float) -> InnerMaximum:
    net, x, y = tanh_problem()

    def loss(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = points.detach().requires_grad_(True)
            losses = F.cross_entropy(net(at), y[which], reduction="none")
            (g,) = torch.autograd.grad(losses.sum(), at)
        return factor * losses.detach(), factor * g

    return maximise(loss, x, threat)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@settings(max_examples=12, deadline=None)
@given(exponent=st.integers(-300, 300))
def test_the_maximiser_of_a_scaled_loss_is_the_same(threat: Threat, exponent: int) -> None:
    one, other = scaled_maximum(threat, 1.0), scaled_maximum(threat, 10.0**exponent)
    assert torch.equal(one.stationary, other.stationary)
    torch.testing.assert_close(one.delta, other.delta, rtol=0, atol=1e-6 * threat.eps)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-300, 300), seed=st.integers(0, 1000))
def test_steps_go_by_the_direction_of_a_gradient(threat: Threat, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(5, 6, generator=generator, dtype=torch.float64)
    delta = threat.project(x, torch.randn(5, 6, generator=generator, dtype=torch.float64))
    g = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    scale = 10.0**exponent
    for size in (0.3, torch.inf):
        sizes = torch.full((5, 1), size, dtype=torch.float64)
        one, other = (threat.ascend(x, delta, c * g, sizes) for c in (1.0, scale))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    one, other = (threat.step(x, delta, c * g, 0.1) for c in (1.0, scale))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    one, other = (threat.stationarity(x, delta, c * g) for c in (1.0, scale))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threat", [*THREATS, LinfBall(0.2, bandwidth=1e-3)], ids=str)
def test_a_point_without_a_gradient_is_undetermined(threat: Threat) -> None:
    x = torch.rand(3, 4, dtype=torch.float64)
    slope = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)[:, None] * torch.ones_like(x)
    found = maximise(lambda z, i: ((z * slope[i]).sum(dim=1), slope[i].clone()), x, threat)
    assert found.stationary.tolist() == [True, False, True]
    assert found.undetermined.tolist() == [False, True, False]
    assert bool((found.delta[1] == 0).all()) and bool(found.delta.isfinite().all())
    geometry = threat.geometry(x, found.delta, found.grad)
    assert all(bool(t.isfinite().all()) for t in (geometry.shift, geometry.free, geometry.normal))


@pytest.mark.parametrize("name", ["cross_entropy", "logistic"])
def test_output_derivatives_keep_their_digits_where_a_probability_is_one(name: str) -> None:
    loss = resolve_loss(name)
    z = torch.tensor([[45.0], [-45.0]]) if name == "logistic" else torch.tensor([[45.0, 0.0]] * 2)
    y = torch.tensor([1, 0]) if name == "logistic" else torch.tensor([0, 0])
    r, curvature = loss.derivatives(z.double(), y)
    s = curvature.dense()
    tiny = float(torch.tensor(-45.0).double().exp())
    assert r.abs().flatten().tolist() == pytest.approx([tiny] * r.numel(), rel=1e-12)
    assert s.abs().flatten().tolist() == pytest.approx([tiny] * s.numel(), rel=1e-12)


def test_ignored_labels_are_left_alone() -> None:
    model, x, _, _ = saturated(3, 2.0, torch.float32, 1.0, 1.0)
    y = torch.arange(N) % 3
    y[0] = -100
    moved = projected_gradient_ascent(
        model, resolve_loss("cross_entropy"), L2Ball(0.5), x, y, 5, 0.2
    )
    assert torch.equal(moved[0], x[0]) and bool((moved[1:] != x[1:]).any(dim=1).all())


class Plateau(nn.Module):
    """Flat around the data, with a slope that only a random start finds."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.0 - 8.0 * F.relu(x[:, :1].abs() - 0.05)


class Flat(nn.Module):
    """No gradient anywhere, but one that autograd can write out."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.0 + 0.0 * x[:, :1]


def test_a_flat_spot_is_no_robustness() -> None:
    x, y = torch.zeros(8, 2), torch.ones(8)
    loss, threat = resolve_loss("logistic"), LinfBall(0.5)
    stuck = projected_gradient_ascent(Plateau(), loss, threat, x, y, 10, 0.1)
    assert torch.equal(stuck, x)
    torch.manual_seed(0)
    moved, blind = without_blind_spots(Plateau(), loss, threat, x, y, stuck, 10, 0.1)
    assert not bool(blind.any()) and bool((Plateau()(moved) < 0).all())
    _, blind = without_blind_spots(Flat(), loss, threat, x, y, stuck, 10, 0.1)
    assert bool(blind.all())


def test_a_user_s_own_loss_cannot_hide_behind_its_rounding() -> None:
    """In single precision its gradient points the wrong way from log-odds of -17 on."""
    model, x, y, distance = saturated(2, 2.0, torch.float32, 30.0, 1.0)
    eps = float(distance.quantile(0.8))
    loss = resolve_loss(lambda z, t: F.cross_entropy(z, t, reduction="none"))
    _, correct = strongest_loss(model, loss, L2Ball(eps), (x, y), 30, 1)
    clear = (distance - eps).abs() > 0.03 * eps
    assert torch.equal(correct[clear], (distance > eps)[clear])


@pytest.mark.parametrize("name", ["PGDL2", "PGD"])
def test_library_attacks_see_a_gradient_too(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False))
    weight = torch.randn(3, 36, generator=generator)
    net[1].weight.data.copy_(2000 * (weight - weight.mean(dim=1, keepdim=True)))  # type: ignore
    x = 0.3 + 0.4 * torch.rand(30, 1, 6, 6, generator=generator)
    y = net(x).argmax(dim=1)
    start = {"random_start": False}
    attack = Attack(f"torchattacks.{name}", init_args={"eps": 0.1, "alpha": 0.04, **start})
    moved = attack(net, x, y)
    with torch.no_grad():
        before, after = LOG_ODDS(net(x), y), LOG_ODDS(net(moved), y)
    assert float(before.max()) < -17  # no gradient of a cross-entropy in single precision
    assert bool((after > before).all())
