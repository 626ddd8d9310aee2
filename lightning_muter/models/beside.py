"""What a module's forward is handed beside its input: a mask, a second input, token types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Union

import torch
from torch import Tensor

__all__ = ["NOTHING", "Beside", "Name"]

Name = Union[int, str]  # noqa: UP007 - read by jsonargparse


@dataclass(frozen=True)
class Beside:
    """Entries of a batch of n points that forward takes after x, by position or by name.

    They are a part of what a point is: with another mask it is another point. No derivative is
    taken in them, and no perturbation moves them.

    Attributes:
        rows: a tensor (n, ...) or a list of n values of each entry that the points have their own.
        fixed: the others, which are handed over as they are.

    Example:
        >>> import torch
        >>> beside = Beside.of({"mask": torch.ones(2, 3), "scale": 0.5}, n=2)
        >>> beside.part(slice(1)).rows["mask"].shape, beside.fixed
        (torch.Size([1, 3]), {'scale': 0.5})
    """

    rows: Mapping[Name, Any] = field(default_factory=dict)
    fixed: Mapping[Name, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Mapping[Name, Any], n: int) -> Beside:
        """Entries of a batch of n points: a tensor or a list of n values has one a point."""
        own = {name: one for name, one in entries.items() if _has_rows(one, n)}
        return cls(own, {name: one for name, one in entries.items() if name not in own})

    def __bool__(self) -> bool:
        return bool(self.rows or self.fixed)

    def part(self, some: slice | Tensor | list[int]) -> Beside:
        """Of some of the points."""
        return self._each(lambda one: _picked(one, some))

    def to(self, device: torch.device | None, dtype: torch.dtype | None = None) -> Beside:
        """On a device; floating-point tensors in another dtype too, where one is given."""

        def moved(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            return one.to(device, dtype if one.is_floating_point() else None)

        fixed = {name: moved(one) for name, one in self.fixed.items()}
        return Beside(self._each(moved).rows, fixed)

    def copied(self) -> Beside:
        """The same values in memory of their own."""
        return self._each(lambda one: one.detach().clone() if isinstance(one, Tensor) else one)

    def entries(self) -> dict[Name, Any]:
        """By name, as a batch has them."""
        return {**self.rows, **self.fixed}

    def tensors(self) -> dict[Name, Tensor]:
        """The tensors of which each point has its own row."""
        return {name: one for name, one in self.rows.items() if isinstance(one, Tensor)}

    def with_tensors(self, tensors: Mapping[Name, Tensor]) -> Beside:
        """The same with other tensors in the place of its own."""
        return Beside({**self.rows, **tensors}, self.fixed)

    def call(self, function: Callable[..., Any], *first: Any) -> Any:
        """A function of something first, then of the entries: positions in order, names by name."""
        if not self:
            return function(*first)
        entries = self.entries()
        positions = sorted(name for name in entries if isinstance(name, int))
        named = {name: one for name, one in entries.items() if isinstance(name, str)}
        return function(*first, *(entries[k] for k in positions), **named)

    def _each(self, change: Callable[[Any], Any]) -> Beside:
        return Beside({name: change(one) for name, one in self.rows.items()}, self.fixed)


#: of a batch that has nothing else, or whose forward takes x alone
NOTHING = Beside()


def _has_rows(value: Any, n: int) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == n
    return isinstance(value, (list, tuple)) and len(value) == n


def _picked(value: Any, some: slice | Tensor | list[int]) -> Any:
    if isinstance(value, Tensor) or isinstance(some, slice):
        return value[some]
    return [value[int(k)] for k in some]
