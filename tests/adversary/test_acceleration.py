"""Acceleration of the inner ascent: the same maximiser in fewer passes, and never a lower one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_muter import L2Ball, LinfBall, Threat
from lightning_muter.adversary import maximiser as inner_module
from lightning_muter.adversary.acceleration import Anderson
from lightning_muter.adversary.maximiser import InnerMaximum, maximise
from lightning_muter.models import view_of
from lightning_muter.objectives.resolve import resolve_loss
from lightning_muter.responses import Constrained
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import unweighted

N, D = 30, 8


def test_a_linear_map_of_few_dimensions_is_solved_in_as_many_moves() -> None:
    """T(δ) = A δ + b, slow: A has an eigenvalue of 0.9. Two dimensions, a fixed point a point."""
    torch.manual_seed(0)
    a = torch.tensor([[0.9, 0.0], [0.3, -0.5]]).double()
    b = torch.randn(5, 2).double()
    exact = torch.linalg.solve(torch.eye(2).double() - a, b.T).T
    delta = torch.zeros(5, 2).double()
    history, everyone = Anderson(delta, depth=2), slice(None)
    residual = delta @ a.T + b - delta
    for k in range(3):
        proposal = history.propose(everyone, delta + residual, residual)
        move = proposal - delta if k else residual
        after = (delta + move) @ a.T + b - (delta + move)
        history.record(everyone, move, after - residual, torch.ones(5, 1, dtype=torch.bool))
        delta, residual = delta + move, after
    assert torch.allclose(delta, exact, rtol=1e-5)


def test_a_move_that_was_not_made_is_forgotten() -> None:
    history = Anderson(torch.zeros(2, 3).double(), depth=2)
    ones = torch.ones(2, 3).double()
    history.record(slice(None), ones, -0.5 * ones, torch.tensor([[True], [False]]))
    assert history.filled.tolist() == [True, False]
    proposal = history.propose(slice(None), ones, ones)
    assert torch.allclose(proposal[1], ones[1])  # nothing to go by: the map's own image
    assert torch.allclose(proposal[0], 2 * ones[0])  # a move of one closed half of the gap


def problem(scale: float, smooth: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    kind = nn.Tanh() if smooth else nn.ReLU()
    net = nn.Sequential(nn.Linear(D, 16), kind, nn.Linear(16, 3)).double()
    with torch.no_grad():
        net[0].weight.mul_(scale)
    return net, torch.rand(N, D).double(), torch.randint(0, 3, (N,))


def ascend(
    threat: Threat, scale: float, max_iter: int = 200, smooth: bool = True, known: bool = False
) -> tuple[InnerMaximum, float]:
    """The maximum, and passes a point; ``known`` whether the network bends is told."""
    net, x, y = problem(scale, smooth)
    loss, passes = resolve_loss("cross_entropy"), 0

    def input_gradient(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal passes
        passes += len(points)
        with torch.enable_grad():
            inputs = points.detach().requires_grad_(True)
            losses = loss(net(inputs), y[which])
            (grad,) = torch.autograd.grad(losses.sum(), inputs)
        return losses.detach(), grad

    bends = partial(bool, smooth or not known)
    return maximise(input_gradient, x, threat, max_iter, bends=bends), passes / N


@pytest.mark.parametrize(
    "threat",
    [LinfBall(0.3, bandwidth=1e-2), LinfBall(0.3, (0, 1), bandwidth=3e-3), L2Ball(0.5, (0, 1))],
    ids=str,
)
def test_more_maximisers_are_stationary_after_fewer_passes(
    threat: Threat, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, fast_passes = ascend(threat, 2.0)
    monkeypatch.setattr(inner_module, "_PLAIN", 10**9)
    plain, plain_passes = ascend(threat, 2.0)
    patient, _ = ascend(threat, 2.0, max_iter=20_000)
    assert int(fast.stationary.sum()) >= int(plain.stationary.sum())
    assert fast_passes < plain_passes
    both = fast.stationary & patient.stationary
    assert int(both.sum()) > 0.9 * N
    value = [m.losses + threat.merit(m.delta, m.grad) for m in (fast, patient)]
    assert torch.allclose(value[0][both], value[1][both], rtol=1e-3)
    same = (fast.delta - patient.delta).norm(dim=1)[both] < 1e-4
    assert int(same.sum()) >= 0.9 * int(both.sum())


def test_points_on_kinks_are_given_up_and_not_called_stationary() -> None:
    """With all patience the same points are on their kinks still, after ten times the passes."""
    short, few = ascend(L2Ball(1.0), 2.0, max_iter=2000, smooth=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner_module, "_PATIENCE", 10**9)
        patch.setattr(inner_module, "_LONG_PATIENCE", 10**9)
        long, many = ascend(L2Ball(1.0), 2.0, max_iter=2000, smooth=False)
    kinks = ~long.stationary
    assert int(kinks.sum()) > N // 4 and few < many / 10
    assert torch.equal(short.stationary, long.stationary)
    assert float((long.losses - short.losses).abs().max()) < 0.01 * float(long.losses.mean())


def test_a_network_without_a_second_derivative_has_no_slow_points_where_the_map_fell() -> None:
    """The same maximisers in a third of the passes; a linear one's slow points are waited for."""
    patient, many = ascend(L2Ball(1.0), 2.0, smooth=False)
    found, few = ascend(L2Ball(1.0), 2.0, smooth=False, known=True)
    assert few < many / 3
    assert torch.equal(found.stationary, patient.stationary)
    maxima = found.stationary
    apart = (found.delta - patient.delta)[maxima].norm(dim=1)
    assert float(apart.max()) < 1e-7  # the tolerance of an accelerated ascent: the ways differ
    assert float((patient.losses - found.losses)[maxima].max()) < 1e-12
    assert float((patient.losses - found.losses).abs().max()) < 0.01 * float(patient.losses.mean())


@pytest.mark.parametrize("steep", [0.3, 1.0])
def test_a_known_maximum_on_a_kink_is_climbed_to_in_few_passes(steep: float) -> None:
    """b·δ - steep |a·δ| over the unit ball, a ⟂ b of length one: the maximum is |b| = 1 at δ = b.

    At it the gradient b ∓ steep a never is parallel to δ: no evidence calls the point stationary.
    """
    torch.manual_seed(0)
    b = nn.functional.normalize(torch.randn(N, D).double(), dim=1)
    a = torch.randn(N, D).double()
    a = nn.functional.normalize(a - (a * b).sum(dim=1, keepdim=True) * b, dim=1)
    start, passes = 0.3 * nn.functional.normalize(torch.randn(N, D).double(), dim=1), 0

    def input_gradient(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal passes
        passes += len(points)
        along, across = (points * b[which]).sum(dim=1), (points * a[which]).sum(dim=1)
        slope = b[which] - steep * across.sign().unsqueeze(1) * a[which]
        return along - steep * across.abs(), slope

    x = torch.zeros(N, D).double()
    found = maximise(input_gradient, x, L2Ball(1.0), start=start, bends=lambda: False)
    assert passes / N < 30
    assert float((1 - found.losses).mean()) < 0.01
    assert not bool(found.stationary.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "bends"), [(nn.ReLU(), False), (nn.LeakyReLU(), False), (nn.SiLU(), True)], ids=str
)
def test_a_view_knows_whether_its_network_bends(
    kind: nn.Module, bends: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), kind, nn.MaxPool2d(2), nn.Flatten())
    net = nn.Sequential(*layers, nn.Linear(16, 3)).to(dtype).eval()
    for named in ({"head": "5"}, {"parameters": ["0.weight", "5.bias"]}):
        view = view_of(net, "cross_entropy", **named)  # type: ignore[arg-type]
        with torch.no_grad():  # as where an ascent asks
            assert view.bends(torch.rand(3, 2, 6, 6, dtype=dtype)) == bends


def test_a_layer_without_a_double_backward_may_bend() -> None:
    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Bare.apply(x.sin())  # type: ignore[no-untyped-call, no-any-return]

    net = nn.Sequential(Layer(), nn.Linear(4, 2))
    assert view_of(net, "cross_entropy", "1").bends(torch.rand(3, 4))


def test_a_slow_point_of_a_smooth_function_is_waited_for() -> None:
    threat = LinfBall(0.3, bandwidth=1e-3)
    found, _ = ascend(threat, 2.0, max_iter=20_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner_module, "_PATIENCE", 10**9)
        patch.setattr(inner_module, "_LONG_PATIENCE", 10**9)
        patient, _ = ascend(threat, 2.0, max_iter=20_000)
    assert int(patient.stationary.sum()) > 0.9 * N
    assert torch.equal(found.stationary, patient.stationary)
    assert torch.equal(found.delta[found.stationary], patient.delta[found.stationary])


def test_a_point_s_maximiser_is_its_own_whatever_the_batch() -> None:
    """To far below the tolerance: Stage III removes what another batch added."""
    net, x, y = problem(2.0)
    derivatives = view_of(net, "cross_entropy", "2")
    asked = PointProblem("muter", LinfBall(0.3, bandwidth=1e-2), Constrained())
    together = asked.perturb(derivatives, unweighted(x, y)).delta
    apart = torch.cat(
        [asked.perturb(derivatives, unweighted(x[[i]], y[[i]])).delta for i in range(N)]
    )
    assert torch.allclose(together, apart, rtol=0, atol=1e-10)
