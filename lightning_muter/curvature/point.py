"""One chunk of points' curvature Σ_i w_i D_i: the only description of D_i that there is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["AddBlock", "Combined", "KeptCurvature", "PointCurvature"]

#: adds a (rows, columns) block of Σ D_i to a sum: (row start, column start, block)
AddBlock = Callable[[int, int, Tensor], None]


class PointCurvature(ABC):
    """Σ_i w_i (H_i + B_i R_i B_iᵀ) over some points, without λI; symmetric (p, p).

    H is the direct curvature, B_i = ∂ωδ l couples the parameters with the point's own inner
    unknowns and R_i is their response. A subclass says what the four parts do to a vector and how
    the sum is added up block by block; dense sums, matrix-free products and Theorem 2's block
    system all follow from it. ``usable`` (n,) marks the points whose K_i had a response.
    """

    def __init__(self, usable: Tensor) -> None:
        self.usable = usable

    @abstractmethod
    def add_to(self, add: AddBlock) -> None:
        """The whole sum, block by block."""

    @abstractmethod
    def direct(self, v: Tensor) -> Tensor:
        """Σ w_i H_i v (p,)."""

    @abstractmethod
    def kept(self) -> Sequence[KeptCurvature]:
        """The same sum in parts that hold tensors alone, none of the graph that they are from."""

    @property
    def inner_size(self) -> int:
        """How many inner unknowns the points have together."""
        return 0

    def couple(self, v: Tensor) -> Tensor:
        """Bᵀ v (inner_size,)."""
        return v.new_zeros(0)

    def spread(self, alpha: Tensor) -> Tensor | float:
        """B α (p,) for α (inner_size,)."""
        return 0.0

    def respond(self, alpha: Tensor) -> Tensor:
        """Each point's w_i R_i α_i (inner_size,)."""
        return alpha

    def response_diagonal(self) -> Tensor:
        """The diagonal of w R (inner_size,)."""
        return self.usable.new_zeros(0, dtype=torch.float64)

    def matvec(self, v: Tensor) -> Tensor:
        """Σ w_i D_i v (p,)."""
        return self.direct(v) + self.spread(self.respond(self.couple(v)))


class KeptCurvature(PointCurvature):
    """Σ w_i D_i whose factors are tensors with one row a point, or one matrix.

    ``kind`` names the class where factors are stored. `restore` inverts `tensors` and `facts`.
    """

    kind: ClassVar[str]

    def kept(self) -> Sequence[KeptCurvature]:
        return [self]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The factors, by name."""

    def facts(self) -> dict[str, Any]:
        """What else `restore` needs, as plain data."""
        return {}

    @classmethod
    @abstractmethod
    def restore(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], omega: Tensor
    ) -> KeptCurvature:
        """The same curvature from its factors, at the expansion point ω* (p,)."""

    @abstractmethod
    def joined(self, other: KeptCurvature) -> KeptCurvature | None:
        """The sum with one of the same kind, as one; None where the shapes do not allow it."""

    def to(self, device: torch.device | str, omega: Tensor) -> KeptCurvature:
        """The same on another device, where ω* (p,) is."""
        tensors = {name: one.to(device) for name, one in self.tensors().items()}
        return type(self).restore(self.facts(), tensors, omega)

    @cached_property
    def nbytes(self) -> int:
        """Bytes that the factors take."""
        return sum(one.numel() * one.element_size() for one in self.tensors().values())


@dataclass
class Combined(PointCurvature):
    """The sum of several curvatures of the same points: those of a mixed adversary."""

    parts: Sequence[PointCurvature]

    def __post_init__(self) -> None:
        super().__init__(torch.stack([part.usable for part in self.parts]).all(dim=0))

    def add_to(self, add: AddBlock) -> None:
        for part in self.parts:
            part.add_to(add)

    def kept(self) -> Sequence[KeptCurvature]:
        return [one for part in self.parts for one in part.kept()]

    def direct(self, v: Tensor) -> Tensor:
        return torch.stack([part.direct(v) for part in self.parts]).sum(dim=0)

    @property
    def inner_size(self) -> int:
        return sum(part.inner_size for part in self.parts)

    def couple(self, v: Tensor) -> Tensor:
        return torch.cat([part.couple(v) for part in self.parts])

    def spread(self, alpha: Tensor) -> Tensor | float:
        return sum(
            (part.spread(a) for part, a in zip(self.parts, self._split(alpha), strict=True)), 0.0
        )

    def respond(self, alpha: Tensor) -> Tensor:
        pairs = zip(self.parts, self._split(alpha), strict=True)
        return torch.cat([part.respond(a) for part, a in pairs])

    def response_diagonal(self) -> Tensor:
        return torch.cat([part.response_diagonal() for part in self.parts])

    def _split(self, alpha: Tensor) -> tuple[Tensor, ...]:
        return torch.split(alpha, [part.inner_size for part in self.parts])
