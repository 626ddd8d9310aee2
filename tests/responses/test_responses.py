"""Inner responses: low-rank, dense and matrix-free forms of the same R."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_muter import L2Ball, LinfBall, Threat, total_hessian
from lightning_muter.models import linear_head
from lightning_muter.responses import Constrained, DiagonalLowRank, Response, Unconstrained
from lightning_muter.threats import Geometry

N, D, C = 6, 20, 3


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(N, D, generator=generator, dtype=torch.float64)
    g = torch.randn(N, D, generator=generator, dtype=torch.float64)
    v = 0.3 * torch.randn(N, D, C, generator=generator, dtype=torch.float64)
    return x, g, v


def geometries() -> list[Geometry]:
    x, g, _ = draw()
    found = []
    for threat in (L2Ball(0.5), L2Ball(0.5, data_range=(0, 1)), LinfBall(0.1, bandwidth=0.3)):
        delta = threat.ascend(x, torch.zeros_like(x), g, torch.full((N, 1), torch.inf).double())
        found.append(threat.geometry(x, delta, g))
    return found


def whole(matrices: DiagonalLowRank) -> Tensor:
    return matrices.apply(torch.eye(D, dtype=torch.float64).expand(N, D, D))


@pytest.mark.parametrize("geometry", geometries(), ids=["l2", "l2 box", "linf"])
@pytest.mark.parametrize("response", [Constrained(), Unconstrained("neumann", 4)], ids=str)
def test_all_forms_are_the_same_matrix(response: Response, geometry: Geometry) -> None:
    _, _, v = draw()
    s = torch.diag_embed(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64).expand(N, C))
    h = v @ s @ v.mT
    low, _ = response.low_rank(geometry, v, s)
    dense, usable = response.dense(geometry, h)
    eye = torch.eye(D, dtype=torch.float64).expand(N, D, D)
    exact = replace(response, tol=1e-12) if response.constrained else response
    free, _ = exact.congruence(geometry, lambda a: a @ h, eye)
    torch.testing.assert_close(whole(low), dense.matrices, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(free.matrices, dense.matrices, rtol=1e-6, atol=1e-8)
    if response.constrained:
        assert bool(usable.all())


def test_a_k_that_is_not_positive_definite_is_noticed_without_its_matrix() -> None:
    geometry = geometries()[0]
    h = 1e6 * torch.eye(D, dtype=torch.float64).expand(N, D, D).clone()
    h[0] = 0
    eye = torch.eye(D, dtype=torch.float64).expand(N, D, D)
    for found, usable in (
        Constrained().congruence(geometry, lambda a: a @ h, eye),
        Constrained().dense(geometry, h),
    ):
        assert usable.tolist() == [True] + [False] * (N - 1)
        assert bool(found.matrices[0].any()) and not bool(found.matrices[1:].any())


@pytest.mark.parametrize("parallel", [True, False])
def test_weighted_sums_of_parallel_and_other_factors(parallel: bool) -> None:
    _, g, _ = draw()
    factors = torch.stack([g, g.flip(0)], dim=1)
    if parallel:
        factors = g[:1].unsqueeze(1) * torch.randn(N, 2, 1, dtype=torch.float64)
    matrices = DiagonalLowRank(g.abs(), factors, torch.randn(N, 2, dtype=torch.float64))
    weights = torch.rand(N, dtype=torch.float64)
    total = torch.ones(D, D, dtype=torch.float64)
    matrices.add_weighted_sum(total, weights)
    expected = 1 + torch.einsum("n,nij->ij", weights, whole(matrices))
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(
    "threat", [L2Ball(0.4), LinfBall(0.1, bandwidth=0.05), L2Ball(0.4, data_range=(0, 1))], ids=str
)
def test_head_without_dense_input_curvature(
    threat: Threat, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, C)).double()
    x, y = torch.rand(N, D).double(), torch.randint(0, C, (N,))
    dense = total_hessian(net, (x, y), threat, head="2")
    monkeypatch.setattr(linear_head, "_SOLVE", 0)
    free = total_hessian(net, (x, y), threat, head="2")
    torch.testing.assert_close(free, dense, rtol=1e-7, atol=1e-8)
