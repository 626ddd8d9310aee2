"""S = ∂_zz l of some points: how a loss curves in its outputs, in no more numbers than it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Categorical", "Diagonal", "Full", "OutputCurvature", "Outer", "restored_output"]


class OutputCurvature(ABC):
    """One symmetric matrix (C, C) a point; ``sums_to_zero`` says that S 1 = 0 by its form."""

    sums_to_zero: ClassVar[bool] = False

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name, with one row a point."""

    @abstractmethod
    def apply(self, u: Tensor) -> Tensor:
        """S u (n, C) for u (n, C)."""

    @abstractmethod
    def entry(self, a: int, b: int) -> Tensor:
        """S_ab (n,)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """S (n, C, C)."""

    @abstractmethod
    def row(self, a: int, u: Tensor) -> Tensor:
        """Row a of S times u: Σ_b S_ab u_b (n, F) for u (C, F)."""


@dataclass(frozen=True)
class Categorical(OutputCurvature):
    """diag(q) - qqᵀ of the softmax's shares q (n, C): the curvature of a cross-entropy."""

    q: Tensor
    sums_to_zero = True

    def tensors(self) -> dict[str, Tensor]:
        return {"q": self.q}

    def apply(self, u: Tensor) -> Tensor:
        # with Σq written out, rounding of q leaves S 1 = 0
        total, mean = self.q.sum(dim=1, keepdim=True), (self.q * u).sum(dim=1, keepdim=True)
        return self.q * (total * u - mean)

    def entry(self, a: int, b: int) -> Tensor:
        if a != b:
            return -self.q[:, a] * self.q[:, b]
        # the sum of the others: 1 - q_a would lose it where q_a rounds to 1
        others = self.q[:, :a].sum(dim=1) + self.q[:, a + 1 :].sum(dim=1)
        return self.q[:, a] * others

    def dense(self) -> Tensor:
        outer = self.q.unsqueeze(2) * self.q.unsqueeze(1)
        outer.diagonal(dim1=1, dim2=2).zero_()
        return torch.diag_embed(outer.sum(dim=2)) - outer

    def row(self, a: int, u: Tensor) -> Tensor:
        own = self.q[:, a, None]
        return own * (self.q.sum(dim=1, keepdim=True) * u[a] - self.q @ u)


@dataclass(frozen=True)
class Diagonal(OutputCurvature):
    """diag(values) with values (n, C): outputs that do not know of each other."""

    values: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def apply(self, u: Tensor) -> Tensor:
        return self.values * u

    def entry(self, a: int, b: int) -> Tensor:
        return self.values[:, a] if a == b else torch.zeros_like(self.values[:, a])

    def dense(self) -> Tensor:
        if self.values.shape[1] == 1:
            return self.values.unsqueeze(2)
        return torch.diag_embed(self.values)

    def row(self, a: int, u: Tensor) -> Tensor:
        return self.values[:, a, None] * u[a]


@dataclass(frozen=True)
class Outer(OutputCurvature):
    """r rᵀ with r (n, C): what stands for S in Fisher information."""

    r: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"outer": self.r}

    def apply(self, u: Tensor) -> Tensor:
        return self.r * (self.r * u).sum(dim=1, keepdim=True)

    def entry(self, a: int, b: int) -> Tensor:
        return self.r[:, a] * self.r[:, b]

    def dense(self) -> Tensor:
        return self.r.unsqueeze(2) * self.r.unsqueeze(1)

    def row(self, a: int, u: Tensor) -> Tensor:
        return self.r[:, a, None] * (self.r @ u)


@dataclass(frozen=True)
class Full(OutputCurvature):
    """Any symmetric matrices (n, C, C): the curvature of a loss without a form of its own."""

    matrices: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"s": self.matrices}

    def apply(self, u: Tensor) -> Tensor:
        return (self.matrices @ u.unsqueeze(2)).squeeze(2)

    def entry(self, a: int, b: int) -> Tensor:
        return self.matrices[:, a, b]

    def dense(self) -> Tensor:
        return self.matrices

    def row(self, a: int, u: Tensor) -> Tensor:
        return self.matrices[:, a] @ u


def restored_output(tensors: Mapping[str, Tensor]) -> OutputCurvature:
    """The form that such tensors are of; others among them are left aside."""
    if "q" in tensors:
        return Categorical(tensors["q"])
    if "values" in tensors:
        return Diagonal(tensors["values"])
    return Outer(tensors["outer"]) if "outer" in tensors else Full(tensors["s"])
