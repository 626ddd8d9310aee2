"""Every form of S does what its dense matrix does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_muter.objectives.output_curvature import (
    Categorical,
    Diagonal,
    Full,
    Outer,
    OutputCurvature,
    restored_output,
)

N, C, F = 5, 4, 3


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


FORMS: dict[str, Callable[[], tuple[OutputCurvature, Tensor]]] = {}


def form(make: Callable[[], tuple[OutputCurvature, Tensor]]) -> None:
    FORMS[make.__name__] = make


@form
def categorical() -> tuple[OutputCurvature, Tensor]:
    q = drawn(N, C).softmax(dim=1)
    return Categorical(q), torch.stack([row.diag() - torch.outer(row, row) for row in q])


@form
def diagonal() -> tuple[OutputCurvature, Tensor]:
    values = drawn(N, C)
    return Diagonal(values), torch.stack([row.diag() for row in values])


@form
def outer() -> tuple[OutputCurvature, Tensor]:
    r = drawn(N, C)
    return Outer(r), torch.stack([torch.outer(row, row) for row in r])


@form
def full() -> tuple[OutputCurvature, Tensor]:
    matrices = drawn(N, C, C)
    return Full(matrices + matrices.mT), matrices + matrices.mT


@pytest.mark.parametrize("name", FORMS)
def test_products_entries_and_rows_are_those_of_the_matrix(name: str) -> None:
    found, matrices = FORMS[name]()
    close = torch.testing.assert_close
    close(found.dense(), matrices)
    u, w = drawn(N, C), drawn(C, F)
    close(found.apply(u), torch.stack([m @ v for m, v in zip(matrices, u, strict=True)]))
    for a in range(C):
        close(found.row(a, w), matrices[:, a] @ w)
        for b in range(C):
            close(found.entry(a, b), matrices[:, a, b])
    close(restored_output(found.tensors() | {"others": u}).dense(), matrices)


def test_rounded_shares_still_sum_to_zero() -> None:
    q = (20 * drawn(200, 50)).softmax(dim=1).float().double()
    assert float((q.sum(dim=1) - 1).abs().max()) > 1e-9  # rounding is there
    s = Categorical(q)
    assert s.sums_to_zero and not Diagonal(q).sums_to_zero
    assert float(s.apply(torch.ones_like(q)).abs().max()) < 1e-15
