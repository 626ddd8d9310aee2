"""How logits are made of a module: its output, another method, or a function of the user's."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muter import ConfigurationError, L2Ball, total_hessian
from lightning_muter.models import LogitsForm


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.body(x)))


@dataclass
class Output:
    loss: Any
    logits: Tensor


class Wrapping(Plain):
    """Gives its logits in another shape; ``score`` gives them as they are."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))

    def score(self, x: Tensor) -> Tensor:
        return super().forward(x)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dict": (lambda z: {"logits": z, "features": z + 1}, {}),
    "one tensor": (lambda z: {"preds": z, "names": ["a"]}, {}),
    "tuple": (lambda z: (z, z + 1), {}),
    "object": (lambda z: SimpleNamespace(logits=z, loss=None), {}),
    "dataclass": (lambda z: Output(None, z), {}),
    "ordered": (lambda z: OrderedDict(loss=z.sum(), logits=z), {}),
    "key": (lambda z: {"a": z + 1, "b": z}, {"output": "b"}),
    "place": (lambda z: (z + 1, z), {"output": 1}),
    "last": (lambda z: (z + 1, z), {"output": -1}),
    "attribute": (lambda z: SimpleNamespace(scores=z, logits=z + 1), {"output": "scores"}),
    "function": (lambda z: {"deep": [z]}, {"output": lambda out: out["deep"][0]}),
    "method": (lambda z: None, {"forward": "score"}),
    "own": (lambda z: None, {"forward": lambda module, x: module.score(x)}),
    "both": (lambda z: None, {"forward": lambda m, x: [m.score(x), 1], "output": 0}),
}


@pytest.mark.parametrize("where", [{"head": "head"}, {"parameters": ["body.bias", "head.weight"]}])
@pytest.mark.parametrize("name", list(CASES))
def test_the_total_hessian_is_that_of_the_plain_module(name: str, where: dict[str, Any]) -> None:
    wrap, arguments = CASES[name]
    torch.manual_seed(0)
    model = Wrapping(wrap).double()
    plain = Plain().double()
    plain.load_state_dict(model.state_dict())
    batch = torch.randn(3, 4).double(), torch.tensor([0, 1, 1])
    own = total_hessian(plain, batch, L2Ball(0.2), **where)
    found = total_hessian(model, batch, L2Ball(0.2), **where, **arguments)
    torch.testing.assert_close(found, own)


@pytest.mark.parametrize(
    ("output", "form", "match"),
    [
        ({"a": 1, "b": 2}, {}, r"dict with the keys \['a', 'b'\].*output="),
        (None, {}, "None.*output="),
        ((), {}, "tuple of .*output="),
        ({"a": 1}, {"output": "logits"}, r"output='logits', but .*\['a'\]"),
        ((1, 2), {"output": 2}, "output=2, but .*int"),
        (SimpleNamespace(a=1), {"output": "b"}, "output='b', but .*SimpleNamespace"),
    ],
)
def test_logits_that_are_not_there(output: Any, form: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        LogitsForm(**form).of(Wrapping(lambda z: output))(torch.randn(2, 4))


def test_names_that_are_none() -> None:
    with pytest.raises(ConfigurationError, match="no method of Wrapping.*'score'"):
        LogitsForm(forward="scores").of(Wrapping(None))(torch.randn(2, 4))
    with pytest.raises(ConfigurationError, match="forward=3 must be"):
        LogitsForm(forward=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"output=1.5 must be"):
        LogitsForm(output=1.5)  # type: ignore[arg-type]
