"""Sums of a head's points as they are multiplied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_muter.curvature.head import HeadPoints, HeadTotal
from lightning_muter.objectives.output_curvature import Diagonal
from lightning_muter.responses import DiagonalLowRank


def one_output(n: int, f: int, biased: bool, k: int) -> HeadTotal:
    generator = torch.Generator().manual_seed(n + 10 * k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h = draw(n, f)
    features = torch.cat([h, torch.ones_like(h[:, :1])], dim=1) if biased else h
    s = Diagonal(draw(n, 1).square())
    points = HeadPoints(features, draw(n, 1), s, draw(1, f), draw(n).square())
    response = DiagonalLowRank(draw(n, f).square(), draw(n, k, f), draw(n, k))
    return HeadTotal(points, response, torch.ones(n, dtype=torch.bool))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (4, 2), (30, 2)])
def test_products_with_points_of_one_output_are_those_of_their_matrix(
    n: int, k: int, biased: bool
) -> None:
    total = one_output(n, 400, biased, k)
    p = 400 + biased
    matrix = torch.zeros(p, p, dtype=torch.float64)

    def place(i: int, j: int, block: Tensor) -> None:
        matrix[i : i + block.shape[0], j : j + block.shape[1]] += block

    total.add_to(place)
    v = torch.linspace(-1.0, 1.0, p, dtype=torch.float64)
    torch.testing.assert_close(total.matvec(v), matrix @ v, rtol=1e-11, atol=1e-10)
