"""∂δδ l of a head on a piecewise-linear network, by one pass an output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_muter.models import LinearHead, measuring
from lightning_muter.models import linear_head as module_under_test
from lightning_muter.objectives.resolve import resolve_objective

N, D = 5, 8

CASES: dict[str, tuple[object, int, Tensor]] = {
    "cross_entropy": ("cross_entropy", 4, torch.tensor([0, 1, 2, 3, 1])),
    "several labels": (nn.BCEWithLogitsLoss(), 3, torch.rand(N, 3).round()),
    "logistic": ("logistic", 1, torch.tensor([0, 1, 1, 0, 1])),
}


def network(outputs: int) -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Linear(D, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, outputs)
    return nn.Sequential(*layers).double().eval()


@pytest.mark.parametrize("case", CASES)
def test_products_need_a_pass_an_output_and_none_a_product(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, outputs, y = CASES[case]
    net, x = network(outputs), torch.randn(N, D, dtype=torch.float64)
    view = LinearHead(net, "4", resolve_objective(None, loss))  # type: ignore[arg-type]
    vectors = torch.randn(N, 2, D, dtype=torch.float64)
    expected = torch.zeros_like(vectors)
    for i in range(N):

        def one(point: Tensor, i: int = i) -> Tensor:
            return view.loss(net(point[None]), y[i : i + 1]).sum()

        expected[i] = vectors[i] @ torch.autograd.functional.hessian(one, x[i])
    calls = [0]
    forward = net.forward

    def counted(inputs: Tensor) -> Tensor:
        calls[0] += 1
        return forward(inputs)

    monkeypatch.setattr(net, "forward", counted)
    with measuring(net):
        points = view.linearise((x,), y, torch.ones(N, dtype=torch.float64))
        product = view._curvature_products(points)
        before = calls[0]
        torch.testing.assert_close(product(vectors), expected, rtol=1e-10, atol=1e-12)
        assert calls[0] == before
        monkeypatch.setattr(module_under_test, "_PASSES", 0)  # too many outputs for that
        products = view._curvature_products(points)
        torch.testing.assert_close(products(vectors), expected, rtol=1e-10, atol=1e-12)
