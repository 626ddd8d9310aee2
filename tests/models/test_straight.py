"""A module that is its head alone is ascended without autograd; what looks like one is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_muter.models import LinearHead
from lightning_muter.models.base import ModelView
from lightning_muter.objectives.losses import LOSSES
from lightning_muter.objectives.resolve import resolve_objective
from lightning_muter.threats.pixels import Scaling


class Around(nn.Module):
    """A linear head with something around it."""

    def __init__(self, outputs: int, what: str) -> None:
        super().__init__()
        self.head, self.what = nn.Linear(6, outputs).double(), what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "a copy before":
            x = 2 * x
        if self.what == "turned":  # the same memory, read along the other way
            x = x.flatten(1).T
        z = self.head(x.flatten(1))
        if self.what == "scaled":
            return 3 * z
        if self.what == "in place":
            return z.mul_(3)
        if self.what == "rectified in place":
            return torch.relu_(z)
        return z


def points(outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    return x, torch.arange(5) % max(outputs, 2)


@pytest.mark.parametrize("loss", ["logistic", "squared", "cross_entropy"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_slope_of_a_linear_model_is_autograds(loss: str, scaled: bool) -> None:
    outputs = 3 if loss == "cross_entropy" else 1
    scaling = Scaling((0.1, 0.2), (0.5, 2.0)) if scaled else None
    view = LinearHead(Around(outputs, ""), "head", resolve_objective(None, loss), scaling)
    x, y = points(outputs)
    found, expected = view.ascent(x, y), ModelView.ascent(view, x, y)
    assert view._linear
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("what", ["a copy before", "scaled", "in place", "rectified in place"])
def test_what_only_looks_like_a_linear_model_goes_through_autograd(what: str) -> None:
    view = LinearHead(Around(1, what), "head", resolve_objective(None, "logistic"))
    x, y = points(1)
    found, expected = view.ascent(x, y), ModelView.ascent(view, x, y)
    assert not view._linear
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def test_a_head_that_reads_the_same_memory_in_another_order_is_not_straight() -> None:
    view = LinearHead(Around(1, "turned"), "head", resolve_objective(None, "logistic"))
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert view.straight(x) is None
    view = LinearHead(Around(1, ""), "head", resolve_objective(None, "logistic"))
    assert view.straight(x) is not None


@pytest.mark.parametrize("name", ["logistic", "squared"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_known_derivative_of_what_is_ascended_is_autograds(name: str, flat: bool) -> None:
    loss = LOSSES[name]
    z = torch.linspace(-40.0, 40.0, 6, dtype=torch.float64)
    z, y = (z if flat else z.unsqueeze(1)), torch.arange(6) % 2
    level, r = loss.rise(z, y)
    at = z.clone().requires_grad_(True)
    expected = (loss.level or loss.function)(at, y)
    (slope,) = torch.autograd.grad(expected.sum(), at)
    torch.testing.assert_close(level, expected.detach(), rtol=0.0, atol=0.0)
    torch.testing.assert_close(r, slope.reshape(6, 1), rtol=1e-15, atol=0.0)
