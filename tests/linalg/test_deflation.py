"""What earlier solves leave for the next, against dense algebra."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.linalg.deflation import Deflation, Steps

P = 30


def system(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A definite A (p, p), b (p,) and directions W (k, p) of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * P, P, generator=generator, dtype=torch.float64)
    b, w = rows[0].clone(), rows[1:5] * torch.logspace(0, -10, 4, dtype=torch.float64).unsqueeze(1)
    return rows.T @ rows, b, w


def test_a_solve_begins_with_what_the_directions_say_of_it() -> None:
    a, b, w = system(0)
    found = Deflation.of(list(w), list(w @ a))
    assert found is not None
    x, rest = found.start(b)
    scale = 1 / torch.linalg.vector_norm(w, dim=1)
    torch.testing.assert_close(rest, b - a @ x)
    torch.testing.assert_close(scale * (w @ rest), torch.zeros(4).double(), rtol=0, atol=1e-9)
    # of all x in the span it is the nearest in A's norm to the solution
    best = w.T @ torch.linalg.solve(w @ a @ w.T, w @ b)
    torch.testing.assert_close(x, best)


def test_what_is_left_of_a_direction_is_orthogonal_in_a() -> None:
    a, b, w = system(1)
    found = Deflation.of(list(w), list(w @ a))
    assert found is not None
    left, image = found.left_out(b, a @ b)
    torch.testing.assert_close(image, a @ left)
    scale = 1 / torch.linalg.vector_norm(w @ a, dim=1)
    torch.testing.assert_close(scale * (w @ image), torch.zeros(4).double(), rtol=0, atol=1e-12)
    again, _ = found.left_out(left, image)
    torch.testing.assert_close(again, left)


def test_no_directions_and_an_indefinite_matrix_leave_nothing_out() -> None:
    a, _, w = system(2)
    assert Deflation.of([], []) is None
    assert Deflation.of(list(w), list(-w @ a)) is None
    assert Deflation.of([w[0], w[0]], [w[0] @ a, w[0] @ a]) is None


def test_the_newest_steps_are_kept_and_follow_the_matrix() -> None:
    a, _, w = system(3)
    steps = Steps(3)
    for one in w:
        steps.keep(one, a @ one)
    moved = steps.of(lambda image, direction: image - 0.5 * direction)
    found, before = moved.deflation(), steps.deflation()
    assert found is not None and before is not None and Steps(3).deflation() is None
    torch.testing.assert_close(found.directions, w[1:])
    torch.testing.assert_close(found.images, w[1:] @ (a - 0.5 * torch.eye(P).double()))
    torch.testing.assert_close(before.images, w[1:] @ a)
    none = Steps(0)
    none.keep(w[0], a @ w[0])
    assert none.deflation() is None
