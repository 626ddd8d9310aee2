"""The user's module and random state, lent for one call and given back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch import nn

from lightning_muter.errors import StateError
from lightning_muter.models import ModelView

__all__ = ["borrowed", "kept_random_state", "random_state_unless_done"]


@contextmanager
def borrowed(view: ModelView, device: torch.device) -> Iterator[None]:
    """The module on ``device``, its trained parameters with gradients; all of it undone after.

    Raises:
        StateError: the module lies on several devices.
    """
    module = view.module
    before = _device(module, device)
    flags = [(parameter, parameter.requires_grad) for parameter in view.parameters]
    try:
        if before != device:
            module.to(device)
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        if before != device:
            module.to(before)


def _device(module: nn.Module, default: torch.device) -> torch.device:
    places = {tensor.device for tensor in chain(module.parameters(), module.buffers())}
    if len(places) > 1:
        raise StateError(
            f"the model lies on {sorted(map(str, places))}: a request needs it on one device; "
            "move it with model.to(...)"
        )
    return next(iter(places), default)


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """The global random states of Python, NumPy and PyTorch as they were, after any ending."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def random_state_unless_done() -> Iterator[None]:
    """PyTorch's global state as it was, where the block fails; where it ends, what it drew."""
    state = torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        raise
