"""Modules of published packages as they are, judged by the gradient of their own loss.

Those of the package ``lightning`` run in a process of their own, with
``LIGHTNING_MUTER_PACKAGE=lightning``.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from published import GONE, Case, cases, slope
from torch import Tensor

from lightning_muter import ConfigurationError, L2Ball, RemovalDataModule, total_hessian

pytestmark = [pytest.mark.published, pytest.mark.filterwarnings("ignore")]
FEW, DIRECTIONS, STEP = [0, 1], 2, 1e-4
#: what a refusal is tried on first
REFUSED = [name for name in cases() if re.search("LinearClassifier|Deterministic", name)]
#: what is trained to its end; the ascents of a whole ResNet-18 would take minutes
TRAINED = [name for name in cases() if name != "torchvision resnet18"]
#: networks whose head is differentiated, ReLU and max pooling among them
NETWORKS = [
    name for name in cases() if re.search("transformers|timm|torchvision resnet18$|torchgeo", name)
]


def made(name: str) -> Case:
    torch.manual_seed(0)
    return cases()[name]()


@pytest.mark.parametrize("name", TRAINED)
def test_a_request_leaves_little_of_the_own_gradient(name: str) -> None:
    case = made(name)
    data = case.points()
    trainer, callback = case.fit(data, case.callback)
    before = case.gradient(data, data.left)
    trainer.unlearn(RemovalDataModule(data, GONE[:2]))
    trainer.unlearn(RemovalDataModule(data, GONE[2:]))
    after = case.gradient(data, data.left)
    assert callback.memory is not None
    assert after < case.share * before, (before, after, callback.memory.summary)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_said_is_refused_by_name(name: str) -> None:
    case = made(name)
    assert case.refused is not None
    arguments, said = case.refused
    with pytest.raises(ConfigurationError, match=said):
        case.fit(case.points(), arguments)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_total_hessian_of_a_head_is_that_of_finite_differences(name: str) -> None:
    """At a radius where ReLU and max pooling have no kink at the maximisers of two points.

    On a kink δ* is no stationary point: training's own share of those is in memory.summary.
    """
    case = made(name)
    case.eps = case.smooth
    model, data = case.model.double().eval(), case.points()
    for one in model.parameters():
        one.requires_grad_(False)
    head = [one.requires_grad_(True) for one in model.get_submodule(case.head).parameters()]
    found = total_hessian(model, data.batch(FEW), L2Ball(case.eps), head=case.head)

    def gradient(move: Tensor) -> Tensor:
        parts = torch.split(move, [one.numel() for one in head])
        for one, part in zip(head, parts, strict=True):
            one.data += part.reshape(one.shape)
        flat = torch.cat([g.flatten() for g in slope(case, model, head, data, FEW)])
        for one, part in zip(head, parts, strict=True):
            one.data -= part.reshape(one.shape)
        return flat

    generator = torch.Generator().manual_seed(1)
    for _ in range(DIRECTIONS):
        v = torch.randn(len(found), generator=generator, dtype=torch.float64)
        v /= v.norm()
        rates: Any = (gradient(STEP * v) - gradient(-STEP * v)) / (2 * STEP)
        torch.testing.assert_close(found @ v, rates, rtol=1e-5, atol=1e-5 * float(rates.norm()))
