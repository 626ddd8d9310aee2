"""What a callback changes in a user's module for a while, and how it comes back."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

__all__ = ["KeptState", "untouched"]


class KeptState:
    """Requires-grad flags and modes of a module as they were before.

    Only what was changed through this object comes back: flags that another callback sets in
    between stay. `restore` may be called any number of times.

    Args:
        module: whose modes are remembered for `restore_modes`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modes = [(m, m.training) for m in module.modules()]
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._evaluated: dict[nn.Module, None] = {}

    def train_only(self, module: nn.Module, trained: Collection[str]) -> None:
        """Gradients for the parameters named in ``trained``, none for the others."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad != (name in trained):
                self._flags.append((parameter, parameter.requires_grad))
                parameter.requires_grad_(name in trained)

    def evaluate(self, module: nn.Module) -> None:
        """Put one module, not its children, into eval mode."""
        if module.training:
            self._evaluated[module] = None
            module.training = False

    def evaluate_frozen(self, module: nn.Module, trained: Collection[str]) -> None:
        """Put every submodule without a trained parameter of its own into eval mode."""
        for name, one in module.named_modules():
            own = {f"{name}.{k}" if name else k for k, _ in one.named_parameters()}
            if name and own.isdisjoint(trained):
                self.evaluate(one)

    def restore(self) -> None:
        """Put the flags and modes back that were changed."""
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module in self._evaluated:
            module.training = True
        self._flags, self._evaluated = [], {}

    def restore_modes(self) -> None:
        """Put every module's mode back, as after an exception in the middle of a validation."""
        for module, training in self._modes:
            module.training = training
        self._evaluated = {}


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Buffers, modes and every generator of random numbers are afterwards as they were before."""
    modes = [(m, m.training) for m in module.modules()]
    buffers = [
        (owner, name, buffer, buffer.detach().clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    states = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the user's global one is what is kept
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(states[1])
        if devices:
            torch.cuda.set_rng_state_all(devices)
        for m, training in modes:
            m.training = training
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                if getattr(owner, name) is not buffer:
                    setattr(owner, name, buffer)
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
