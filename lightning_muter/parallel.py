"""The processes that work on one problem together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Group"]


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Group:
    """This process's rank among ``size``, and how tensors are summed over all; alone by default.

    Example:
        >>> list(Group().share(range(3)))
        [0, 1, 2]
    """

    rank: int = 0
    size: int = 1
    sum: Callable[[Tensor], Tensor] = _same

    def share(self, indices: Sequence[int]) -> Sequence[int]:
        """The indices that are this process's: every one belongs to exactly one process."""
        return indices[self.rank :: self.size]

    @property
    def rows(self) -> slice:
        """The same share of a batch, as a slice."""
        return slice(self.rank, None, self.size)

    def offsets(self, size: Tensor) -> tuple[int, int]:
        """Where this process's ``size`` (a number) of shared unknowns begins, and the total."""
        sizes = size.new_zeros(self.size)
        sizes[self.rank] = size
        sizes = self.sum(sizes)
        return int(sizes[: self.rank].sum()), int(sizes.sum())
