"""`Group`: the processes that share one piece of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_muter.errors import StateError

__all__ = ["Group"]

T = TypeVar("T")


def _same(value: Any) -> Any:
    return value


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Group:
    """This process's place among those that serve one call; by default the only one.

    Attributes:
        rank: this process's number, from 0.
        size: how many processes there are.
        device: where a tensor must lie to be summed.
        sum: the sum of a tensor over all processes, on every one; it may be done in place.
        broadcast: the first process's object, on every one.
        gather: the objects of all processes in their order, on every one.

    Example:
        >>> Group(rank=1, size=2).share([4, 5, 6, 7, 8])
        [5, 7]
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    sum: Callable[[Tensor], Tensor] = _same
    broadcast: Callable[[Any], Any] = _same
    gather: Callable[[Any], list[Any]] = _alone

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """This process's rows of a batch that every process holds."""
        return slice(self.rank, None, self.size)

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share: every item belongs to exactly one process."""
        return list(items[self.rows])

    def offsets(self, size: int) -> tuple[int, int]:
        """Where this process's ``size`` of shared unknowns begins, and how many there are."""
        sizes = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        sizes[self.rank] = size
        sizes = self.sum(sizes)
        return int(sizes[: self.rank].sum()), int(sizes.sum())

    def agrees(self, value: Any) -> bool:
        """Whether every process holds the same value; the same answer on every process."""
        return self._count(value != self.broadcast(value)) == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that all processes pass, or none: an error in one of them is one in each.

        Raises:
            StateError: on the processes where nothing went wrong, if another one failed.
        """
        try:
            yield
        except BaseException:
            self._count(True)
            raise
        if self._count(False):
            raise StateError(
                "another process of this call failed, so that this one stops as well and nothing "
                "is changed: see that process's own error"
            )

    def _count(self, happened: bool) -> int:
        if self.size == 1:
            return int(happened)
        flag = torch.tensor([float(happened)], dtype=torch.float64, device=self.device)
        return round(float(self.sum(flag)))
