"""Steps that learn a curvature, against the update of the dense matrix and on a known function."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.unlearning.secants import Secants

P = 6


def symmetric(seed: int, spread: float) -> Tensor:
    """A positive definite matrix (P, P)."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64)).Q
    return basis @ torch.diag(torch.logspace(0, spread, P, dtype=torch.float64)) @ basis.T


def bettered(inverse: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The BFGS update of an inverse, as a matrix."""
    left = torch.eye(P, dtype=s.dtype) - torch.outer(s, y) / (s @ y)
    return left @ inverse @ left.T + torch.outer(s, s) / (s @ y)


def test_steps_are_those_of_the_dense_update() -> None:
    truth, start = symmetric(0, 2.0), symmetric(1, 1.0)
    inverse = torch.linalg.inv(start)
    x = torch.ones(P, dtype=torch.float64)
    secants = Secants(lambda g: torch.linalg.solve(start, g), truth @ x)
    for _ in range(4):
        step = secants.step()
        torch.testing.assert_close(step, inverse @ (truth @ x), rtol=1e-11, atol=0.0)
        before, x = truth @ x, x - step
        secants.learn(-step, truth @ x)
        inverse = bettered(inverse, -step, truth @ x - before)
        torch.testing.assert_close(inverse @ (truth @ x - before), -step, rtol=1e-9, atol=1e-12)


def test_a_step_up_or_none_at_all_teaches_nothing() -> None:
    start = symmetric(2, 1.0)
    x = torch.ones(P, dtype=torch.float64)
    secants = Secants(lambda g: torch.linalg.solve(start, g), x)
    secants.learn(x, -x)  # no convex function has it
    torch.testing.assert_close(secants.step(), torch.linalg.solve(start, -x))
    secants.learn(torch.zeros(P, dtype=torch.float64), 2 * x)
    torch.testing.assert_close(secants.step(), torch.linalg.solve(start, 2 * x))


def test_fewer_steps_lead_to_a_minimum_than_with_the_curvature_as_it_was() -> None:
    """Σ log cosh(a·x - b), the curvature taken where x is far from the minimum."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(40, k, generator=generator, dtype=torch.float64) for k in (P, 1))

    def slope(x: Tensor) -> Tensor:
        return a.T @ torch.tanh(a @ x - b[:, 0]) + 0.1 * x

    def curvature(x: Tensor) -> Tensor:
        bend = 1 - torch.tanh(a @ x - b[:, 0]).square()
        return a.T @ (a * bend[:, None]) + 0.1 * torch.eye(P, dtype=a.dtype)

    best = torch.zeros(P, dtype=torch.float64)
    for _ in range(30):
        best = best - torch.linalg.solve(curvature(best), slope(best))
    start = best + 0.1
    factor = torch.linalg.cholesky(curvature(start))
    plain = learned = start
    secants = Secants(lambda g: torch.cholesky_solve(g, factor), slope(start))
    for _ in range(6):
        plain = plain - torch.cholesky_solve(slope(plain)[:, None], factor)[:, 0]
        step = secants.step()
        learned = learned - step
        secants.learn(-step, slope(learned))
    assert float((learned - best).norm()) < 0.05 * float((plain - best).norm())
