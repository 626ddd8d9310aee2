"""Where a batch's input and target are, and how a perturbed input gets back into it."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muter import ConfigurationError
from lightning_muter.models import BatchForm

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
NEW = X + 1
Pair = namedtuple("Pair", ["features", "target", "path"])


@dataclass
class Example:
    inputs: Tensor
    targets: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor


@dataclass
class Nested:
    parts: tuple[Tensor, dict[str, Tensor]]


def shapes() -> dict[str, tuple[Any, Any]]:
    """Batches of many shapes, made anew, with the ``batch=`` that they need."""
    x, y = X.clone(), Y.clone()
    return {
        "list": ([x, y], None),
        "tuple": ((x, y, ["a", "b", "c", "d"]), None),
        "dict": ({"image": x, "label": y, "path": ["a"] * 4, "mask": x > 0}, None),
        "only float": ({"embedding": x, "class": y}, None),
        "float target": ({"input": x, "target": y.double()}, None),
        "ordered": (OrderedDict(pixel_values=x, labels=y), None),
        "user dict": (UserDict({"x": x, "y": y, "z": x}), None),
        "read only": (MappingProxyType({"x": x, "y": y}), None),
        "named tuple": (Pair(x, y, "here"), None),
        "dataclass": (Example(x, y), None),
        "frozen": (Frozen(x, y), None),
        "object": (SimpleNamespace(image=x, target=y, meta="here"), None),
        "named": ({"a": Y, "b": x, "c": y, "d": x}, ("b", "c")),
        "places": ([torch.arange(4), x, y], (1, 2)),
        "places of names": (Pair(x, y, "here"), (0, 1)),
        "names of a list": ([x, y], ("image", "label")),
        "function": ([{"x": x}, y], lambda batch: (batch[0]["x"], batch[1])),
        "nested": (Nested((y, {"x": x})), lambda b: (b.parts[1]["x"], b.parts[0])),
        "deep tuple": (((x,), y), lambda batch: (batch[0][0], batch[1])),
        "twice": ({"original": x, "image": x, "label": y}, None),
    }


@pytest.mark.parametrize("name", list(shapes()))
def test_input_and_target_are_read_and_the_input_is_replaced(name: str) -> None:
    batch, where = shapes()[name]
    form = BatchForm.of(where)
    kept = {k: v for k, v in batch.items() if k != "image"} if name == "twice" else {}
    x, y, beside = form.read(batch)
    assert not beside
    assert torch.equal(x, X) and torch.equal(y.long(), Y)
    own, kind = x, type(batch)
    back = form.put(batch, x, NEW)
    assert type(batch) is kind
    assert torch.equal(form.read(batch)[0], NEW) and torch.equal(form.read(batch)[1].long(), Y)
    back()
    assert torch.equal(own, X)  # a tensor of the data set never keeps the perturbed values
    assert all(torch.equal(batch[k], v) for k, v in kept.items())


@pytest.mark.parametrize(
    ("batch", "where", "match"),
    [
        ({"image1": X, "image2": X, "label": Y}, None, r"inputs may be \['image1', 'image2'\]"),
        ({"image": X, "input": X, "label": Y}, None, "not clear.*batch="),
        ({"image": X, "label": Y, "target": Y}, None, r"targets \['label', 'target'\].*batch="),
        ({"image": X, "a": Y, "b": Y}, None, "not clear"),
        ({"image": X}, None, "not clear.*batch="),
        ({"image": X, "label": Y}, ("pixels", "label"), "no entry 'pixels'.*image.*label"),
        ([X, Y], (0, 2), "no entry 2"),
        ({"image": Y, "label": Y}, ("image", "label"), "int64.*floating-point.*batch="),
        ({"image": X, "label": [1, 2]}, ("image", "label"), "targets are a list"),
        ([Y, X, Y], None, "int64.*floating-point.*batch="),
        ([X], None, r"list of \['Tensor'\].*expected \(input, target\)"),
        (X, None, "not clear|Tensor"),
        ("text", None, "a str"),
        (None, None, "NoneType"),
        ([X, Y], lambda batch: batch["x"], "batch= failed with TypeError.*must return"),
        ([X, Y], lambda batch: batch[0], r"returned a Tensor.*\(x, target\)"),
        ({"x": X, "y": Y}, ("x", "y", "mask"), "no entry 'mask'"),
    ],
)
def test_a_batch_that_cannot_be_read(batch: Any, where: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        BatchForm.of(where).read(batch)


def test_an_input_that_is_made_by_the_function_cannot_be_put_back() -> None:
    form = BatchForm.of(lambda batch: (batch["image"] / 255, batch["label"]))
    batch = {"image": X.clone(), "label": Y}
    x = form.read(batch)[0]
    with pytest.raises(ConfigurationError, match="no tensor of the batch itself"):
        form.put(batch, x, NEW)
    assert torch.equal(batch["image"], X)


@pytest.mark.parametrize("where", ["image", ("image",), (1.0, 2.0), ("a", "b", 1.0)])
def test_what_is_no_pair_and_no_function(where: Any) -> None:
    with pytest.raises(ConfigurationError, match="batch=.*names or positions of input and target"):
        BatchForm.of(where)
