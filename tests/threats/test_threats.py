"""Geometry of the threats: projections, fixed points, smoothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_muter import ConfigurationError, L2Ball, LinfBall, Threat
from lightning_muter.adversary.maximiser import maximise

THREATS = [
    L2Ball(0.7),
    L2Ball(0.7, data_range=(0, 1)),
    LinfBall(0.3),
    LinfBall(0.3, data_range=(0, 1)),
]


def draw(seed: int, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 6, generator=generator, dtype=torch.float64)
    return x, scale * torch.randn(4, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 0.3, 3.0, 100.0]))
def test_projection_is_the_nearest_allowed_point(threat: Threat, seed: int, scale: float) -> None:
    x, v = draw(seed, scale)
    projected = threat.project(x, v)
    torch.testing.assert_close(threat.project(x, projected), projected)
    if threat.data_range is not None:
        assert float((x + projected).min()) >= -1e-12
        assert float((x + projected).max()) <= 1 + 1e-12
    size = projected.norm(dim=1) if isinstance(threat, L2Ball) else projected.abs().amax(dim=1)
    assert float(size.max()) <= threat.eps * (1 + 1e-9)
    # variational inequality: (v - Πv)·(u - Πv) <= 0 for every allowed u
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(20):
        u = threat.project(x, torch.randn(4, 6, generator=generator, dtype=torch.float64))
        inner = ((v - projected) * (u - projected)).sum(dim=1)
        assert float(inner.max()) <= 1e-9 * (1 + scale)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_maximiser_of_a_linear_loss_beats_random_points(threat: Threat) -> None:
    x, g = draw(0, 1.0)
    found = maximise(lambda z, i: ((z * g[i]).sum(dim=1), g[i]), x, threat)
    assert bool(found.stationary.all())

    def merit(delta: Tensor) -> Tensor:
        return (delta * g).sum(dim=1) + threat.merit(delta, g)

    torch.manual_seed(0)
    for _ in range(300):
        other = threat.project(x, 3 * torch.randn_like(x))
        assert bool((merit(found.delta) >= merit(other) - 1e-9).all())


@pytest.mark.parametrize("least", [1.0, 1e-3, 1e-250])
def test_the_map_of_an_l2_ball_goes_to_the_sphere_within_the_box(least: float) -> None:
    """clip(c g) of length ε by bisection on c, also where a few coordinates hold all of g."""
    torch.manual_seed(0)
    x = torch.rand(50, 12).double().round(decimals=1)  # some on a bound
    g = torch.randn(50, 12).double() * torch.where(torch.rand(50, 12) < 0.5, 1.0, least)
    threat, size = L2Ball(0.7, data_range=(0, 1)), torch.full((50, 1), torch.inf).double()
    low, high = torch.full((50, 1), -300.0).double(), torch.full((50, 1), 300.0).double()
    for _ in range(200):  # on log10 c
        middle = (low + high) / 2
        clipped = (10.0**middle * g).clamp(-x, 1 - x)
        beyond = clipped.norm(dim=1, keepdim=True) > 0.7
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    found = threat.ascend(x, torch.zeros_like(x), g, size)
    torch.testing.assert_close(found, (10.0**low * g).clamp(-x, 1 - x), rtol=1e-9, atol=1e-9)


def test_interior_maximum_is_found_and_free() -> None:
    x = torch.zeros(1, 2, dtype=torch.float64)
    peak = torch.tensor([[0.2, -0.1]], dtype=torch.float64)

    def loss(z: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        return -(z - peak).square().sum(dim=1), -2 * (z - peak)

    threat = L2Ball(1.0)
    found = maximise(loss, x, threat, max_iter=500)
    torch.testing.assert_close(found.delta, peak, atol=1e-4, rtol=0)
    assert not bool(threat.active(x, found.delta).any())
    geometry = threat.geometry(x, found.delta, found.grad)
    assert float(geometry.shift.abs().max()) == 0 and float(geometry.normal.abs().max()) == 0


def test_l2_geometry_holds_coordinates_at_the_data_range() -> None:
    x = torch.tensor([[0.95, 0.5, 0.5]], dtype=torch.float64)
    g = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    threat = L2Ball(0.5, data_range=(0, 1))
    found = maximise(lambda z, i: ((z * g).sum(dim=1), g.expand_as(z)), x, threat)
    rest = ((0.25 - 0.05**2) / 2) ** 0.5
    expected = torch.tensor([[0.05, rest, rest]], dtype=torch.float64)
    torch.testing.assert_close(found.delta, expected)
    geometry = threat.geometry(x, found.delta, found.grad)
    assert geometry.free.tolist() == [[0.0, 1.0, 1.0]]
    torch.testing.assert_close(geometry.shift, torch.full_like(g, 2**0.5 / (rest * 2**0.5)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: L2Ball(0.0),
        lambda: LinfBall(-1.0),
        lambda: LinfBall(0.1, smoothing=0.0),
        lambda: LinfBall(0.1, bandwidth=-1.0),
        lambda: L2Ball(1.0, data_range=(1, 0)),
    ],
)
def test_bad_threats_are_refused(make: object) -> None:
    with pytest.raises(ConfigurationError):
        make()  # type: ignore[operator]


def test_the_active_share_counts_spheres_and_coordinates() -> None:
    x = torch.full((2, 4), 0.5, dtype=torch.float64)
    delta = torch.tensor([[0.1, -0.1, 0.05, 0.0], [0.1, 0.1, 0.1, -0.1]], dtype=torch.float64)
    assert LinfBall(0.1).active(x, delta).tolist() == [0.5, 1.0]
    x[0, 2] = 0.95  # the data range ends at 0.05 above
    assert LinfBall(0.1, data_range=(0, 1)).active(x, delta).tolist() == [0.75, 1.0]
    assert L2Ball(0.2).active(x, delta).tolist() == [0.0, 1.0]
