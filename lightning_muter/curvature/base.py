"""What a memory asks of the sum of its points' curvature, however it is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_muter.curvature.point import PointCurvature
from lightning_muter.linalg.solution import Solution
from lightning_muter.parallel import Group

__all__ = ["Curvature", "CurvatureSum", "PointFacts", "Solver"]


@dataclass(frozen=True)
class PointFacts:
    """Which points a chunk's curvature is of, and what is known of their maximisers.

    Attributes:
        indices: of the points (n,), int64.
        stationary: whose δ* was stationary (n,), bool.
        active: the share (n,) of each one's constraints that were active, in [0, 1].
    """

    indices: Tensor
    stationary: Tensor
    active: Tensor

    @classmethod
    def cat(cls, some: Iterable[PointFacts]) -> PointFacts:
        """Those of several chunks, one after the other."""
        parts = [(one.indices, one.stationary, one.active) for one in some]
        return cls(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def __getitem__(self, which: Tensor) -> PointFacts:
        return PointFacts(self.indices[which], self.stationary[which], self.active[which])

    def to(self, device: torch.device) -> PointFacts:
        """The same on a device."""
        return PointFacts(*(t.to(device) for t in (self.indices, self.stationary, self.active)))


class Solver(Protocol):
    """Solves M x = b for many b, what is costly computed once."""

    def solve(self, rhs: Tensor) -> Solution:
        """x (p,) for b (p,), with its residual and status."""


class Curvature(ABC):
    """M = Σ_i w_i D_i + (Σw λ + damping) I of the points that are left, symmetric (p, p)."""

    @property
    @abstractmethod
    def p(self) -> int:
        """How many parameters."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it takes; of this process's share, where it is shared."""

    @abstractmethod
    def to(self, device: torch.device | str, omega: Tensor) -> Curvature:
        """It on another device, where ω* (p,) is; itself on its own."""

    def shared(self, group: Group) -> Curvature:
        """It with this process's share of what can be shared; itself where nothing can."""
        return self

    def whole(self) -> Curvature:
        """It with every process's share, on each of them; all of them must ask."""
        return self

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """The tensors that it is read back from, by name; nothing of a forgotten point in them."""

    @abstractmethod
    def damped(self, damping: float) -> Curvature:
        """It plus ``damping`` times the identity; itself at zero."""

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """Products with v (p,)."""

    @abstractmethod
    def base_diagonal(self) -> Tensor:
        """The diagonal of M before requests (p,), for a preconditioner."""

    @abstractmethod
    def solver(self) -> Solver:
        """What solves many systems."""

    @abstractmethod
    def estimate(self, rhs: Tensor, tol: float = 1e-3) -> Solution:
        """M⁻¹ b (p,) as a number for people: to a residual ``tol`` where a good one would cost."""

    @abstractmethod
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue, by an iteration where M is large; NaN if not finite."""


class CurvatureSum(Protocol):
    """A sum on its way, chunk after chunk."""

    def add(self, part: PointCurvature, facts: PointFacts | None = None) -> None:
        """Add the curvature of some points."""

    def finished(self, group: Group, weight: float, decay: float) -> Curvature:
        """The sum over processes, plus ``weight`` times ``decay`` times the identity."""
