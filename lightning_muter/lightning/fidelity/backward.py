"""What backward passes leave in the trained parameters, heard before anything changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BackwardSum"]

_Parts = dict[int, Tensor]


class BackwardSum:
    """Sums the gradients of backward passes, of a batch and since the last step.

    Hooks on the parameters hear each pass of this process alone: before accumulation, averaging
    over processes, clipping, and whatever else changes ``.grad``.

    Args:
        parameters: the trained ones.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._batch: _Parts = {}
        self._earlier: _Parts = {}
        self._listening = False
        #: whether a backward pass of this batch reached the parameters
        self.heard = False
        self._handles: list[Any] = [
            p.register_hook(self._hook(k))  # type: ignore[no-untyped-call]
            for k, p in enumerate(parameters)
        ]

    def _hook(self, k: int) -> Callable[[Tensor], None]:
        def listen(gradient: Tensor) -> None:
            if self._listening:
                self.heard = True
                _add(self._batch, k, gradient.detach().double())

        return listen

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hear nothing meanwhile."""
        before, self._listening = self._listening, False
        try:
            yield
        finally:
            self._listening = before

    def begin_batch(self) -> None:
        """A training step begins."""
        for k, part in self._batch.items():
            _add(self._earlier, k, part)
        self._batch, self._listening, self.heard = {}, True, False

    def restart_batch(self) -> None:
        """Forget what was heard of this batch: the backward pass of its loss begins now."""
        self._batch, self.heard = {}, False

    def stepped(self) -> None:
        """Forget everything: an optimizer's step took it."""
        self._batch, self._earlier = {}, {}

    @property
    def batch(self) -> Tensor:
        """Of this batch (p,)."""
        return self._flat(self._batch)

    @property
    def since_step(self) -> Tensor:
        """Of all batches since the last step (p,)."""
        return self._flat(self._batch) + self._flat(self._earlier)

    def _flat(self, parts: _Parts) -> Tensor:
        rows = [parts.get(k, torch.zeros_like(p)) for k, p in enumerate(self._parameters)]
        return torch.cat([row.reshape(-1).double() for row in rows])


def _add(parts: _Parts, k: int, gradient: Tensor) -> None:
    parts[k] = parts[k] + gradient if k in parts else gradient.clone()
