"""`total_hessian` against closed forms, brute force and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muter import ConfigurationError, L2Ball, LinfBall, Threat, total_hessian
from lightning_muter.models import measuring, view_of
from lightning_muter.responses import Constrained
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import unweighted

N, D, C = 30, 12, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs() -> Tensor:
    return torch.randn(N, D, dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("provider", [{"head": "0"}, {"parameters": ["0.weight", "0.bias"]}])
@pytest.mark.parametrize("loss", ["logistic", "squared"])
def test_equals_hessian_of_closed_form(loss: str, provider: dict[str, object]) -> None:
    x, eps, lam = inputs(), 0.3, 1e-3
    y = torch.randint(0, 2, (N,)) if loss == "logistic" else torch.randn(N).double()
    model = nn.Sequential(nn.Linear(D, 1)).double()
    w = reference.parameters(model, ["0.weight", "0.bias"])
    robust = reference.robust_logistic if loss == "logistic" else reference.robust_squared
    expected = reference.hessian(lambda v: robust(v, x, y, eps, lam), w)
    unit = w[:-1] / w[:-1].norm()
    residual = x @ w[:-1] + w[-1] - y
    sign = 1.0 - 2 * y if loss == "logistic" else residual.sign()
    exact = eps * sign.double().unsqueeze(1) * unit
    arguments = {"loss": loss, "weight_decay": lam, **provider}
    given = total_hessian(model, (x, y), L2Ball(eps), delta=exact, **arguments)  # type: ignore[arg-type]
    found = total_hessian(model, (x, y), L2Ball(eps), **arguments)  # type: ignore[arg-type]
    assert relative(given, expected) <= 1e-6
    assert relative(found, expected) <= 1e-4


def networks() -> list[tuple[str, nn.Module, dict[str, object]]]:
    torch.manual_seed(3)
    two = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, C)).double()
    three = nn.Sequential(
        nn.Linear(D, 10), nn.Tanh(), nn.Linear(10, 8), nn.Softplus(), nn.Linear(8, C)
    ).double()
    names = ["2.weight", "2.bias", "4.weight", "4.bias"]
    linear = nn.Sequential(nn.Flatten(), nn.Linear(D, C, bias=False)).double()
    return [
        ("smooth head", two, {"head": "2"}),
        ("two layers", three, {"parameters": names}),
        ("linear", linear, {"head": "1"}),
    ]


THREATS = [
    L2Ball(0.3),
    L2Ball(0.3, data_range=(-1, 1)),
    LinfBall(0.1, bandwidth=1e-2),
    LinfBall(0.1, bandwidth=1e-2, data_range=(-1, 1)),
]


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("index", range(3))
def test_agrees_with_finite_differences_of_the_robust_gradient(index: int, threat: Threat) -> None:
    _, net, where = networks()[index]
    x, y = inputs().clamp(-1, 1), torch.randint(0, C, (N,))
    d = total_hessian(net, (x, y), threat, **where)  # type: ignore[arg-type]
    derivatives = view_of(net, "cross_entropy", **where)  # type: ignore[arg-type]
    problem = PointProblem("muter", threat, Constrained(), 0.0, max_iter=3000)
    omega = derivatives.get()
    v = torch.randn_like(omega)
    v, h = v / v.norm(), 1e-4

    def gradient(w: Tensor) -> Tensor:
        with measuring(net), derivatives.at(w):
            total = problem.gradient(derivatives, unweighted(x, y))
        assert total.stationary == N
        return total.gradient

    difference = (gradient(omega + h * v) - gradient(omega - h * v)) / (2 * h)
    assert relative(d @ v, difference) <= 1e-3


@pytest.mark.parametrize("kind", ["tanh", "relu", "linear"])
@pytest.mark.parametrize("case", ["l2", "linf", "neumann"])
def test_every_provider_equals_brute_force(kind: str, case: str) -> None:
    """One and the same δ (no maximiser) in the head's blocks, Autodiff's and a plain loop."""
    x, y = 0.5 * inputs()[:6], torch.randint(0, 3, (6,))
    act = {"tanh": nn.Tanh(), "relu": nn.ReLU(), "linear": nn.Identity()}[kind]
    first = nn.Identity() if kind == "linear" else nn.Linear(D, 7)
    net = nn.Sequential(first, act, nn.Linear(D if kind == "linear" else 7, 3)).double()
    names = ["2.weight", "2.bias"]
    threat: Threat = LinfBall(0.1, bandwidth=0.02) if case == "linf" else L2Ball(0.2)
    with measuring(net):
        derivatives = view_of(net, "cross_entropy", head="2")
        delta = (
            PointProblem("muter", threat, Constrained())
            .perturb(derivatives, unweighted(x, y))
            .delta
        )
    response = {
        "l2": partial(reference.sphere_response, eps=0.2),
        "linf": partial(reference.smoothed_sign_response, eps=0.1, tau=0.02),
        "neumann": partial(reference.neumann_response, order=3),
    }[case]
    loss = partial(F.cross_entropy, reduction="none")
    expected = reference.brute_force_total_hessian(net, names, loss, x, y, delta, response)
    for where in ({"head": "2"}, {"parameters": names}):
        options = {"response": "unconstrained"} if case == "neumann" else {}
        got = total_hessian(net, (x, y), threat, delta=delta, **where, **options)  # type: ignore[arg-type]
        assert relative(got, expected) <= 1e-8


def test_feature_space_is_a_linear_model_of_the_features() -> None:
    x, y = inputs(), torch.randint(0, C, (N,))
    net = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, C, bias=False)).double()
    head = nn.Sequential(nn.Linear(7, C, bias=False)).double()
    head[0].weight.data = net[2].weight.data.clone()
    options = {"response": "unconstrained", "neumann_order": 5}
    zero = torch.zeros(N, D, dtype=torch.float64)
    got = total_hessian(net, (x, y), L2Ball(0.1), head="2", space="features", delta=zero, **options)
    features = net[1](net[0](x)).detach()
    expected = total_hessian(
        head, (features, y), L2Ball(0.1), head="0", delta=zero[:, :7], **options
    )
    torch.testing.assert_close(got, expected)


def test_custom_loss_equals_the_named_one() -> None:
    x, y = inputs(), torch.randint(0, C, (N,))
    net = nn.Sequential(nn.Linear(D, C)).double()
    named = total_hessian(net, (x, y), L2Ball(0.3), head="0")
    custom = total_hessian(
        net,
        (x, y),
        L2Ball(0.3),
        head="0",
        loss=lambda z, t: F.cross_entropy(z, t, reduction="none"),
    )
    torch.testing.assert_close(named, custom)


def test_module_is_left_as_it_was() -> None:
    x, y = inputs(), torch.randint(0, C, (N,))
    net = nn.Sequential(nn.BatchNorm1d(D), nn.Dropout(), nn.Linear(D, C)).double().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    total_hessian(net, (x, y), L2Ball(0.3), head="2")
    assert all(m.training for m in net.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "bad",
    [
        {"head": "1"},
        {"head": "nothing"},
        {"head": "0", "parameters": ["0.weight"]},
        {"head": "0", "loss": "hinge"},
        {"head": "0", "response": "free"},
        {"parameters": ["0.gain"]},
        {"head": "0", "space": "latent"},
    ],
)
def test_bad_arguments_name_the_way_out(bad: dict[str, object]) -> None:
    net = nn.Sequential(nn.Linear(D, C), nn.Tanh()).double()
    batch = (inputs(), torch.randint(0, C, (N,)))
    with pytest.raises(ConfigurationError, match=r".+"):
        total_hessian(net, batch, L2Ball(0.3), **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, y: (x, 2 * y - 1), "needs targets 0 or 1"),
        (lambda x, y: (x, y[:2]), "one or more points"),
        (lambda x, y: (x[:0], y[:0]), "one or more points"),
        (lambda x, y: (x[0], y[0]), "one or more points"),
        (lambda x, y: (x * torch.nan, y), "NaN or infinite"),
        (lambda x, y: (x, y * torch.nan), "targets are NaN"),
        (lambda x, y: (x.float(), y), "the module is torch.float64"),
    ],
)
def test_points_that_mean_nothing_are_refused(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], match: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1)).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0, 0.0])
    with pytest.raises(ConfigurationError, match=match):
        total_hessian(model, change(x, y), L2Ball(0.1), head="0", loss="logistic")
