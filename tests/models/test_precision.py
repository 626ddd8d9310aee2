"""What the user switched on for speed is off where derivatives are measured, and back after."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from lightning_muter.models import evaluating, measuring

BACKENDS = torch.backends
NEWER = pytest.mark.skipif(
    not hasattr(BACKENDS, "fp32_precision"), reason="this PyTorch has no switch an operation"
)


def _older() -> None:
    torch.set_float32_matmul_precision("medium")
    BACKENDS.cudnn.allow_tf32 = True


def _newer() -> None:
    BACKENDS.fp32_precision = "tf32"
    BACKENDS.cudnn.conv.fp32_precision = "ieee"
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def _both() -> None:
    _older()
    BACKENDS.cuda.matmul.allow_tf32 = True


def operations() -> list[object]:
    """What products and convolutions are computed with."""
    if not hasattr(BACKENDS, "fp32_precision"):
        return [torch.get_float32_matmul_precision(), BACKENDS.cudnn.allow_tf32]
    places = [BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv]
    return [one.fp32_precision for one in (*places, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)]


def told() -> list[object]:
    """What the older switches say, which raise where the newer ones contradict them."""
    found: list[object] = []
    for read in (torch.get_float32_matmul_precision, lambda: BACKENDS.cudnn.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("cannot be told")
    return found


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    if hasattr(BACKENDS, "fp32_precision"):
        for one in (BACKENDS, BACKENDS.mkldnn):
            one.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True


@pytest.mark.parametrize(
    "switch", [_older, pytest.param(_newer, marks=NEWER), pytest.param(_both, marks=NEWER)]
)
@pytest.mark.parametrize("fails", [False, True])
def test_no_short_products_while_measuring(switch: Callable[[], None], fails: bool) -> None:
    switch()
    before = operations(), told()
    try:
        with measuring(nn.Identity()):
            inside = operations()
            if fails:
                raise KeyError
    except KeyError:
        pass
    short = {"tf32", "bf16", "high", "medium", True}
    assert not short & set(inside) and short & set(before[0])
    assert (operations(), told()) == before


def test_recurrent_layers_are_not_cudnns() -> None:
    for module, wanted in ((nn.Sequential(nn.GRU(3, 2)), False), (nn.Linear(3, 2), True)):
        with evaluating(module):
            assert BACKENDS.cudnn.enabled is wanted
        assert BACKENDS.cudnn.enabled
