"""The curvature of TRADES against finite differences of its robust gradient, δ* solved again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muter import TRADES, L2Ball, LinfBall, Threat, total_hessian
from lightning_muter.models import ModelView, measuring, view_of
from lightning_muter.responses import Constrained
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import unweighted

N, D, C, BETA = 8, 6, 3, 6.0
MEAN, STD = 0.3, tuple(0.2 + 0.05 * k for k in range(D))


def networks() -> dict[str, tuple[nn.Module, list[str], dict[str, Any]]]:
    torch.manual_seed(3)
    relu = nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, C)).double()
    with torch.no_grad():  # units that are on or off whatever the perturbation: no kink is met
        relu[0].weight.mul_(0.3)
        relu[0].bias.copy_(torch.tensor([1.5, 1.6, 1.5, -1.6, 1.7, 1.5]))
    smooth = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C, bias=False)).double()
    linear = nn.Sequential(nn.Linear(D, C)).double()
    deep = nn.Sequential(nn.Linear(D, 5), nn.Softplus(), nn.Linear(5, C)).double()
    return {
        "linear": (linear, ["0.weight", "0.bias"], {"head": "0"}),
        "relu head": (relu, ["2.weight", "2.bias"], {"head": "2"}),
        "smooth head": (smooth, ["2.weight"], {"head": "2"}),
        "named": (deep, ["0.weight", "2.bias"], {"parameters": ["0.weight", "2.bias"]}),
    }


THREATS: dict[str, Threat] = {
    "l2": L2Ball(0.3),
    "l2 range": L2Ball(0.3, data_range=(-1.5, 1.5)),
    "linf": LinfBall(0.1, bandwidth=2e-3),
    "linf range": LinfBall(0.1, bandwidth=2e-3, data_range=(-1.5, 1.5)),
    "l2 pixels": L2Ball(0.1, data_range=(-1.0, 2.0), mean=MEAN, std=STD),
    "linf pixels": LinfBall(0.03, bandwidth=2e-3, mean=MEAN, std=STD),
}


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 0.7 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return x.clamp(-1.4, 1.4), torch.randint(0, C, (N,), generator=generator)


def trades(clean: Tensor, perturbed: Tensor, y: Tensor) -> Tensor:
    """The objective as its paper's code writes it, summed over points."""
    divergence = F.kl_div(F.log_softmax(perturbed, dim=1), F.softmax(clean, dim=1), reduction="sum")
    return F.cross_entropy(clean, y, reduction="sum") + BETA * divergence


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def polished(view: ModelView, threat: Threat, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    """The maximiser to rounding, by the threat's fixed-point map alone."""
    pixels, clean = threat.flat_pixels(x), view.outputs(threat.scaling.pixels(x)).detach()
    whole = torch.full_like(pixels[:, :1], torch.inf)
    for _ in range(2000):
        _, slope = view.ascent(pixels + delta, clean)
        moved = threat.ascend(pixels, delta, slope, whole) - delta
        delta = delta + 0.6 * moved  # the whole step can circle around the fixed point
        if float(moved.abs().max()) < 1e-14:
            break
    return delta


def setting(network: str, threat: Threat) -> tuple[nn.Module, list[str], ModelView, PointProblem]:
    net, names, where = networks()[network]
    view = view_of(
        net, "cross_entropy", **where, scaling=threat.scaling, objective=TRADES(beta=BETA)
    )
    return net, names, view, PointProblem("muter", threat, Constrained(), 0.0, max_iter=500)


CASES = [
    *(("linear", threat) for threat in THREATS),
    *(("relu head", threat) for threat in ("l2", "linf range", "l2 pixels")),
    *(("smooth head", threat) for threat in ("l2 range", "linf", "linf pixels")),
    *(("named", threat) for threat in ("l2", "linf pixels")),
]


@pytest.mark.parametrize(("network", "threat"), CASES)
def test_agrees_with_finite_differences(network: str, threat: str) -> None:
    x, y = points()
    constraint = THREATS[threat]
    net, names, view, problem = setting(network, constraint)
    where = networks()[network][2]
    found = dict(net.named_parameters())
    omega = view.get()

    def gradient(w: Tensor) -> Tensor:
        with measuring(net), view.at(w):
            inner = problem.perturb(view, unweighted(x, y))
            assert bool(inner.stationary.all()) and not bool(inner.tied.any())
            delta = polished(view, constraint, x, y, inner.delta)
            loss = trades(net(x), net(constraint.moved(x, delta)), y)
            parts = torch.autograd.grad(loss, [found[name] for name in names])
        return torch.cat([part.reshape(-1) for part in parts])

    def difference(h: float) -> Tensor:
        return (gradient(omega + h * v) - gradient(omega - h * v)) / (2 * h)

    torch.manual_seed(5)
    v = torch.randn_like(omega)
    v, h = v / v.norm(), 5e-4
    d = total_hessian(net, (x, y), constraint, objective=TRADES(beta=BETA), **where)
    expected = (4 * difference(h / 2) - difference(h)) / 3  # without the error of order h²
    assert relative(d @ v, expected) <= 1e-6
    without = total_hessian(net, (x, y), constraint, **where)
    assert relative(without @ v, expected) > 0.01


@pytest.mark.parametrize("network", ["linear", "relu head", "smooth head", "named"])
def test_losses_and_gradients_are_the_objectives_own(network: str) -> None:
    x, y = points()
    threat = THREATS["l2"]
    net, names, view, problem = setting(network, threat)
    with measuring(net):
        inner = problem.perturb(view, unweighted(x, y))
        sums = problem.gradient(view, unweighted(x, y), inner)
        loss = trades(net(x), net(x + inner.delta), y)
    found = dict(net.named_parameters())
    parts = torch.autograd.grad(loss, [found[name] for name in names])
    expected = torch.cat([part.reshape(-1) for part in parts])
    assert float(sums.loss) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert relative(sums.gradient, expected) <= 1e-12


@pytest.mark.parametrize("threat", ["l2", "linf range"])
def test_no_random_start_finds_a_higher_maximum(threat: str) -> None:
    x, y = points()
    constraint = THREATS[threat]
    net, _, view, problem = setting("linear", constraint)
    with measuring(net):
        inner = problem.perturb(view, unweighted(x, y))
        height = inner.losses + constraint.merit(inner.delta, inner.grad)
        torch.manual_seed(0)
        for _ in range(10):
            start = constraint.random_start(x)
            other = problem.perturb(view, unweighted(x, y), start)
            rival = other.losses + constraint.merit(other.delta, other.grad)
            assert bool((rival <= height * (1 + 1e-6)).all())
    assert float(inner.delta.abs().amax(dim=1).min()) > 0.01  # δ = 0 is no maximum


def test_a_point_has_one_maximiser_in_every_batch() -> None:
    x, y = points()
    net, _, view, problem = setting("smooth head", THREATS["l2"])
    with measuring(net):
        together = problem.perturb(view, unweighted(x, y)).delta
        alone = [problem.perturb(view, unweighted(x[[i]], y[[i]])).delta for i in range(N)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-8)


def test_a_model_that_is_even_in_the_perturbation_ties() -> None:
    """At equal logits p is uniform and KL even in δ to the third order: both sides tie."""
    net = nn.Sequential(nn.Linear(D, 2, bias=False)).double()
    threat = L2Ball(0.05)
    view = view_of(net, "cross_entropy", head="0", objective=TRADES(beta=BETA))
    x = torch.zeros(3, D, dtype=torch.float64)
    x[:, 0] = torch.tensor([0.0, 1.0, 2.0])
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(2, D).double())
        net[0].weight[:, 0] = torch.tensor([0.0, 3.0])
    problem = PointProblem("muter", threat, Constrained())
    with measuring(net):
        inner = problem.perturb(view, unweighted(x, torch.zeros(3, dtype=torch.long)))
    assert inner.tied.tolist() == [True, False, False]


def test_label_smoothing_is_of_the_clean_point() -> None:
    x, y = points()
    net, _, where = networks()["relu head"]
    loss = nn.CrossEntropyLoss(label_smoothing=0.2)
    options: dict[str, Any] = {"loss": loss, "objective": TRADES(beta=BETA)}
    closed = total_hessian(net, (x, y), L2Ball(0.3), **where, **options)
    named = ["2.weight", "2.bias"]
    general = total_hessian(net, (x, y), L2Ball(0.3), parameters=named, **options)
    assert relative(closed, general) <= 1e-7


def test_a_sketch_is_right_on_average() -> None:
    x, y = points()
    net, _, where = networks()["smooth head"]
    options: dict[str, Any] = {"objective": TRADES(beta=BETA), **where}
    exact = total_hessian(net, (x, y), L2Ball(0.3), **options)
    direct = total_hessian(net, (x, y), L2Ball(1e-6), **options)
    sketched = total_hessian(net, (x, y), L2Ball(0.3), sketch=400, **options)
    assert relative(sketched, exact) <= 0.1 * relative(direct, exact)
