"""The user's module and random state, lent for one call and given back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_muter.errors import StateError
from lightning_muter.models import ModelView

__all__ = ["RandomState", "borrowed", "random_state_unless_done"]


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


@dataclass(frozen=True)
class RandomState:
    """The global random states of Python, NumPy and PyTorch at one moment."""

    python: Any
    numpy: Any
    host: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """What they are, on the host and on ``device``."""
        numpy = np.random.get_state()  # noqa: NPY002
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), numpy, torch.get_rng_state(), device, own)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put them back after any ending of the block."""
        try:
            yield
        finally:
            random.setstate(self.python)
            np.random.set_state(self.numpy)  # noqa: NPY002
            torch.set_rng_state(self.host)
            if self.accelerator is not None:
                torch.cuda.set_rng_state(self.accelerator, self.device)


@contextmanager
def random_state_unless_done() -> Iterator[None]:
    """PyTorch's global state as it was, where the block fails; where it ends, what it drew."""
    state = torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        raise
