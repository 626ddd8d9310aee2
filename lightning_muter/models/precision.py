"""The digits that a module is differentiated with, whatever training does without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["computing", "full_precision", "widened"]

_HALF = (torch.bfloat16, torch.float16)


def computing(dtype: torch.dtype) -> torch.dtype:
    """What a module of this dtype is differentiated in: single precision at the least.

    Example:
        >>> computing(torch.bfloat16), computing(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in _HALF else dtype


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers of half precision with single precision's digits."""
    narrow = [t for t in chain(module.parameters(), module.buffers()) if t.dtype in _HALF]
    own = [(t, t.data, t.grad) for t in narrow]
    try:
        for t in narrow:
            t.grad = None
            t.data = t.data.float()
        yield
    finally:
        for t, data, grad in own:
            if not torch.equal(t.data, data.float()):
                data.copy_(t.data)
            t.data = data
            t.grad = grad


class _Switch(NamedTuple):
    get: Callable[[], Any]
    set: Callable[[Any], None]
    full: Any


def _attribute(owner: Any, name: str, full: Any) -> _Switch:
    return _Switch(lambda: getattr(owner, name), lambda value: setattr(owner, name, value), full)


def _switches() -> tuple[tuple[_Switch, tuple[_Switch, ...]], ...]:
    """PyTorch's switches, each with the newer ones that hold where it cannot be read.

    It raises once a user has set the newer ones, one an operation, otherwise than it can tell.
    """
    backends: Any = torch.backends
    matmul = _Switch(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
    )
    cudnn = _attribute(backends.cudnn, "allow_tf32", False)
    if not hasattr(backends, "fp32_precision"):
        return (matmul, ()), (cudnn, ())

    def newer(*operations: Any) -> tuple[_Switch, ...]:
        return tuple(_attribute(one, "fp32_precision", "ieee") for one in operations)

    alone = newer(backends.mkldnn.conv, backends.mkldnn.rnn)
    return (
        (matmul, newer(backends.cuda.matmul, backends.mkldnn.matmul)),
        (cudnn, newer(backends.cudnn.conv, backends.cudnn.rnn)),
        *((one, ()) for one in alone),
    )


_SWITCHES = _switches()


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 with all their digits; what the user had switched on is back after.

    TF32 keeps ten bits of a factor, and convolutions on a GPU use it unless they are told not to:
    a gradient of it is zero to 1e-3 at best, which no maximiser and no optimum can be told by.
    """
    moved: list[tuple[_Switch, Any]] = []
    try:
        for switch, newer in _SWITCHES:
            try:
                found = [(switch, switch.get())]
            except RuntimeError:
                found = [(one, one.get()) for one in newer]
            for one, before in found:
                if before != one.full:
                    one.set(one.full)
                    moved.append((one, before))
        yield
    finally:
        for one, before in reversed(moved):
            one.set(before)
