"""Threats in pixels on normalised inputs: the same problem as a normalisation inside the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muter import ConfigurationError, L2Ball, LinfBall, Threat, total_hessian
from lightning_muter.adversary.ascent import projected_gradient_ascent
from lightning_muter.models import view_of
from lightning_muter.objectives.losses import LOSSES
from lightning_muter.spec import Settings
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.request import forget
from lightning_muter.unlearning.stage_one import build_memories

N, C, SIDE, CLASSES = 12, 3, 4, 4
D = C * SIDE * SIDE
MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.2, 0.1)
RANGE = (0.0, 1.0)
THREATS: list[Threat] = [
    L2Ball(0.4),
    L2Ball(0.4, data_range=RANGE),
    LinfBall(0.05, bandwidth=1e-2),
    LinfBall((0.05, 0.02, 0.08), bandwidth=1e-2, data_range=RANGE),
    LinfBall((0.05, 0.02, 0.08), smoothing=0.1, data_range=((0.0, 0.1, 0.0), (1.0, 0.9, 1.0))),
]


class Normalise(nn.Module):
    """The data set's normalisation as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return normalised(x)


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=x.dtype).reshape(C, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def pixels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 0.1 + 0.8 * torch.rand(N, C, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (N,), generator=generator)


def networks() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    torch.manual_seed(1)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(D, CLASSES)).double()
    conv = nn.Sequential(
        nn.Conv2d(C, 5, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * SIDE * SIDE, CLASSES),
    ).double()
    smooth = nn.Sequential(
        nn.Conv2d(C, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES, bias=False)
    ).double()
    with torch.no_grad():  # units that are on or off whatever the perturbation: no kink is met
        conv[0].bias.copy_(torch.tensor([6.0, 7.0, 6.0, 8.0, -7.0]))
        conv[-1].weight.mul_(0.3)
    return {
        "linear": (flat, {"head": "1"}),
        "relu head": (conv, {"head": "3"}),
        "smooth head": (smooth, {"head": "3"}),
        "named": (smooth, {"parameters": ["0.weight", "3.weight"]}),
    }


def inside(where: dict[str, Any]) -> dict[str, Any]:
    """The same names one level deeper."""
    if "head" in where:
        return {"head": f"1.{where['head']}"}
    return {"parameters": [f"1.{name}" for name in where["parameters"]]}


def in_pixels(threat: Threat) -> Threat:
    return replace(threat, mean=MEAN, std=STD)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("network", ["linear", "relu head", "smooth head", "named"])
def test_is_the_total_hessian_with_the_normalisation_inside(network: str, threat: Threat) -> None:
    x, y = pixels()
    net, where = networks()[network]
    inner = total_hessian(net, (normalised(x), y), in_pixels(threat), **where)
    outer = total_hessian(nn.Sequential(Normalise(), net), (x, y), threat, **inside(where))
    assert relative(inner, outer) <= 1e-10
    plain = total_hessian(net, (normalised(x), y), replace(threat, data_range=None), **where)
    assert relative(plain, outer) > 1e-3  # the scale matters


@pytest.mark.parametrize("sketched", [0, 2])
@pytest.mark.parametrize("response", ["constrained", "unconstrained"])
def test_every_response_knows_the_scale(response: str, sketched: int) -> None:
    x, y = pixels()
    net, where = networks()["smooth head"]
    options = {"response": response, "sketch": sketched}
    inner = total_hessian(net, (normalised(x), y), in_pixels(THREATS[0]), **where, **options)
    back = in_pixels(THREATS[0]).scaling.pixels(normalised(x))  # the probes' seeds are bits of it
    model = nn.Sequential(Normalise(), net)
    outer = total_hessian(model, (back, y), THREATS[0], **inside(where), **options)
    assert relative(inner, outer) <= 1e-9


def memory(net: nn.Module, x: Tensor, y: Tensor, threat: Threat, where: dict[str, Any]) -> Any:
    settings = Settings(
        method="muter",
        threat=threat,
        head=where.get("head"),
        parameters=where.get("parameters"),
        solver="direct",
        weight_decay=0.05,
    )
    digests = torch.zeros(N, 16, dtype=torch.uint8)
    (built,) = build_memories(net, [settings], [unweighted(x, y)], digests, bytes(16))
    return built


@pytest.mark.parametrize("network", ["linear", "relu head", "named"])
def test_is_the_memory_and_the_request_with_the_normalisation_inside(network: str) -> None:
    x, y = pixels()
    net, where = networks()[network]
    model, threat, gone = nn.Sequential(Normalise(), net), THREATS[1], [2, 7]
    inner = memory(net, normalised(x), y, in_pixels(threat), where)
    outer = memory(model, x, y, threat, inside(where))
    assert relative(inner.curvature.matrix, outer.curvature.matrix) <= 1e-10
    assert relative(inner.residual_gradient, outer.residual_gradient) <= 1e-10
    settings = inner.settings
    one = forget(inner, settings.view(net), gone, normalised(x)[gone], y[gone])
    two = forget(outer, outer.settings.view(model), gone, x[gone], y[gone])
    assert relative(one.memory.omega - inner.omega, two.memory.omega - outer.omega) <= 1e-10


def test_settings_remember_the_scale_and_older_ones_have_none() -> None:
    net, where = networks()["linear"]
    threat = in_pixels(THREATS[3])
    kept = memory(net, normalised(pixels()[0]), pixels()[1], threat, where).settings
    saved = kept.to_dict()
    assert saved["threat"]["mean"] == list(MEAN) and saved["threat"]["eps"] == [0.05, 0.02, 0.08]
    assert Settings.from_dict(saved).threat == threat
    other = replace(kept, threat=replace(threat, std=(0.25, 0.2, 0.2)))
    assert "threat" in other.differences(saved)
    assert "mean" not in replace(kept, threat=L2Ball(0.5)).to_dict()["threat"]


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_training_attacks_move_pixels_by_the_threat(threat: Threat) -> None:
    x, y = pixels()
    net, _ = networks()["relu head"]
    found, size, loss = in_pixels(threat), threat.step_size(5), LOSSES["cross_entropy"]
    one = projected_gradient_ascent(net, loss, found, normalised(x), y, 5, size)
    model = nn.Sequential(Normalise(), net)
    two = projected_gradient_ascent(model, loss, threat, x, y, 5, size)
    torch.testing.assert_close(one, normalised(two), rtol=1e-10, atol=1e-10)
    delta = found.scaling.pixels(one) - x
    torch.testing.assert_close(threat.project(x.flatten(1), delta.flatten(1)), delta.flatten(1))


def test_flat_inputs_have_a_number_a_feature() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 3).double(), torch.randint(0, 2, (N,))
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (MEAN, STD))
    model = nn.Sequential(nn.Linear(3, 2)).double()
    scaled = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    with torch.no_grad():
        scaled[0].weight.copy_(torch.diag(1 / std))
        scaled[0].bias.copy_(-mean / std)
        scaled[1].load_state_dict(model[0].state_dict())
    threat = LinfBall((0.1, 0.2, 0.05), bandwidth=0.01)
    inner = total_hessian(model, ((x - mean) / std, y), in_pixels(threat), head="0")
    outer = total_hessian(scaled, (x, y), threat, head="1")
    assert relative(inner, outer) <= 1e-10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": MEAN}, "go together"),
        ({"std": STD}, "go together"),
        ({"mean": MEAN, "std": (0.1, 0.0, 0.1)}, "positive"),
        ({"mean": ["a", "b"], "std": STD}, "number"),
        ({"mean": (float("nan"),) * 3, "std": STD}, "NaN"),
        ({"mean": 0.0, "std": float("inf")}, "finite"),
        ({"data_range": (0.0, (1.0, -1.0))}, "data_range"),
        ({"data_range": ((0.0, 0.0), (1.0, 1.0, 1.0))}, "data_range"),
        ({"eps": (0.1, 0.0)}, "positive"),
    ],
)
def test_bad_numbers_name_the_way_out(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LinfBall(**{"eps": 0.1, **arguments})


def test_a_euclidean_ball_has_one_radius() -> None:
    with pytest.raises(ConfigurationError, match="one radius"):
        L2Ball((0.1, 0.2, 0.3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "threat",
    [
        LinfBall((0.1, 0.2)),
        LinfBall(0.1, data_range=((0.0, 0.0), 1.0)),
        L2Ball(0.1, mean=(0.1, 0.2), std=(0.1, 0.2)),
    ],
    ids=str,
)
def test_numbers_that_are_not_one_a_channel_are_refused(threat: Threat) -> None:
    x, y = pixels()
    net, where = networks()["linear"]
    with pytest.raises(ConfigurationError, match="3 channels"):
        total_hessian(net, (x, y), threat, **where)


def test_a_view_without_the_threats_scale_is_refused() -> None:
    x, y = pixels()
    net, where = networks()["linear"]
    problem = PointProblem("muter", in_pixels(L2Ball(0.1)), Settings.problem)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="scaling"):
        problem.perturb(view_of(net, "cross_entropy", **where), unweighted(x, y))


def test_inputs_outside_their_range_are_told_what_would_fit() -> None:
    x = pixels()[0]
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 1.0  # the pixels reach both ends
    with pytest.raises(ConfigurationError) as error:
        L2Ball(0.5, RANGE).check_inputs(normalised(x))
    message = str(error.value)
    for part in ("mean=[0.5, 0.4, 0.45]", "std=[0.25, 0.2, 0.1]", "data_range=None"):
        assert part in message
    L2Ball(0.5, RANGE, mean=MEAN, std=STD).check_inputs(normalised(x))
    with pytest.raises(ConfigurationError, match=r"taken back to pixels.*scale of data_range"):
        L2Ball(0.5, RANGE, mean=MEAN, std=tuple(10 * s for s in STD)).check_inputs(normalised(x))
