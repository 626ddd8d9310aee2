"""Every solver on definite, indefinite and singular systems."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_muter.linalg.cg import conjugate_gradients
from lightning_muter.linalg.cholesky import direct
from lightning_muter.linalg.minres import minres


def system(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = (q * torch.tensor(values, dtype=torch.float64)) @ q.T
    return (matrix + matrix.T) / 2, torch.randn(n, generator=generator, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(0.1, 100), min_size=2, max_size=12), seed=st.integers(0, 10**6))
def test_definite_systems(values: list[float], seed: int) -> None:
    a, b = system(values, seed)
    expected = torch.linalg.solve(a, b)
    for found in (direct(a, b), conjugate_gradients(lambda v: a @ v, b, tol=1e-12)):
        assert found.status == "converged"
        torch.testing.assert_close(found.value, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(minres(lambda v: a @ v, b).value, expected, rtol=1e-5, atol=1e-7)


def test_indefinite_systems_say_so() -> None:
    a, b = system([-3.0, -1.0, 0.5, 2.0, 7.0])
    expected = torch.linalg.solve(a, b)
    assert conjugate_gradients(lambda v: a @ v, b).status != "converged"
    for found in (direct(a, b), minres(lambda v: a @ v, b)):
        assert found.status == "indefinite" and found.residual < 1e-8
        torch.testing.assert_close(found.value, expected)


def test_singular_systems_give_the_minimum_norm() -> None:
    a, b = system([0.0, 0.0, 1.0, 2.0])
    b = a @ b
    found = direct(a, b)
    assert found.status == "minimum_norm"
    torch.testing.assert_close(found.value, torch.linalg.pinv(a, rtol=1e-10) @ b)


def test_a_limit_is_reported() -> None:
    a, b = system([1.0, 10.0, 100.0, 1000.0])
    found = conjugate_gradients(lambda v: a @ v, b, max_iter=1)
    assert found.status == "max_iterations" and found.iterations == 1 and found.residual > 1e-3


@pytest.mark.parametrize("solve", [conjugate_gradients, minres])
def test_zero_right_hand_side(solve: object) -> None:
    a, b = system([1.0, 2.0])
    assert float(solve(lambda v: a @ v, 0 * b).value.norm()) == 0  # type: ignore[operator]
