"""Batches of points, their linearisation in chunks, and what is summed over them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_muter.adversary.maximiser import InnerMaximum
from lightning_muter.curvature.base import PointFacts
from lightning_muter.errors import ConfigurationError
from lightning_muter.models import NOTHING, Beside, Linearisation, ModelView, computing, measuring
from lightning_muter.objectives.targets import check_targets
from lightning_muter.parallel import Group
from lightning_muter.threats import Geometry

__all__ = ["Batch", "Chunk", "Sums", "checked", "unweighted"]


@dataclass(frozen=True)
class Batch:
    """Points x (n, ...), their targets (n, ...), and the weight (n,) of each in every sum.

    ``indices`` (n,) int64 say which training points they are, where that is known; ``beside`` is
    what else forward takes of them.
    """

    x: Tensor
    targets: Tensor
    weights: Tensor
    indices: Tensor | None = None
    beside: Beside = NOTHING

    def __len__(self) -> int:
        return self.x.shape[0]

    def part(self, some: slice) -> Batch:
        """Some of the points; the batch itself where they are all."""
        if some.indices(len(self)) == (0, len(self), 1):
            return self
        named = None if self.indices is None else self.indices[some]
        beside = self.beside.part(some)
        return Batch(self.x[some], self.targets[some], self.weights[some], named, beside)


def unweighted(x: Tensor, targets: Tensor, beside: Beside = NOTHING) -> Batch:
    """A batch whose points all have weight 1."""
    ones = torch.ones(len(x), dtype=torch.float64, device=x.device)
    return Batch(x, targets, ones, beside=beside)


def checked(view: ModelView, x: Tensor, targets: Tensor, beside: Beside = NOTHING) -> Batch:
    """Points that a user gives, each of weight 1, on the module's device.

    Args:
        view: what will look at them.
        x: inputs (n, ...) as the module receives them.
        targets: of the points (n, ...).
        beside: what else forward takes of them.

    Raises:
        ConfigurationError: no point, sizes that differ, inputs that are NaN, infinite or of another
            dtype than the module's, targets that the loss has no meaning for.
    """
    shapes = f"inputs {tuple(x.shape)} and targets {tuple(targets.shape)}"
    if x.ndim == 0 or targets.ndim == 0 or len(x) != len(targets) or len(x) == 0:
        raise ConfigurationError(
            f"{shapes}: give one or more points, x (n, ...) with one target each"
        )
    if computing(x.dtype) != view.dtype:
        raise ConfigurationError(
            f"the inputs are {x.dtype}, the module is {view.kept_as}: convert one of them"
        )
    if not bool(torch.isfinite(x).all()):
        raise ConfigurationError("the inputs are NaN or infinite: mend the data")
    x, targets = x.to(view.device, view.dtype), targets.to(view.device)
    beside = beside.to(view.device)
    with measuring(view.module), torch.no_grad():
        width = view.beside(beside.part(slice(1))).logits(x[:1]).numel()
    check_targets(view.loss, targets, width)
    return unweighted(x, targets, beside)


@dataclass(frozen=True)
class Sums:
    """Sums over points: Σ w ∇_ω l (p,), Σ w l, Σ w, and counts of what was checked."""

    gradient: Tensor
    loss: Tensor
    weight: Tensor
    points: Tensor
    stationary: Tensor
    active: Tensor
    usable: Tensor
    tied: Tensor

    @classmethod
    def zero(cls, p: int, device: torch.device | str) -> Sums:
        """The empty sum."""
        return cls.unpack(torch.zeros(p + 7, dtype=torch.float64, device=device))

    @classmethod
    def unpack(cls, flat: Tensor) -> Sums:
        """The inverse of `pack`."""
        return cls(flat[:-7], *flat[-7:].unbind())

    def pack(self) -> Tensor:
        """Everything as one vector (p + 7,), to be reduced at once."""
        counts = (self.points, self.stationary, self.active, self.usable, self.tied)
        scalars = (self.loss, self.weight, *counts)
        return torch.cat([self.gradient, torch.stack(scalars)])

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def reduced(self, group: Group) -> Sums:
        """The sums over processes."""
        return self if group.size == 1 else Sums.unpack(group.sum(self.pack()))

    def share(self, count: Tensor) -> float:
        """A count as a share of the points."""
        return float(count) / max(float(self.points), 1.0)


@dataclass(frozen=True)
class Chunk:
    """Some points at their perturbation: linearised there, with what the constraint does.

    ``origin`` (n, d) is x, flat and float64, ``active`` (n,) each point's share of constraints that
    are active. ``rival`` is the same points at a mixed adversary's
    second maximiser, ``mixing`` (n,) each one's share of the mixture and ``value`` its soft
    maximum (n,). ``indices`` (n,) are the batch's own.
    """

    origin: Tensor
    linearisation: Linearisation
    geometry: Geometry
    inner: InnerMaximum | None
    mixing: Tensor
    active: Tensor
    rival: Chunk | None = None
    value: Tensor | None = None
    indices: Tensor | None = None

    @property
    def facts(self) -> PointFacts | None:
        """Which points they are and what is known of their maximisers, where they are named."""
        if self.indices is None:
            return None
        if self.inner is None:
            everyone = torch.ones_like(self.indices, dtype=torch.bool)
            return PointFacts(self.indices, everyone, torch.zeros_like(self.mixing))
        return PointFacts(self.indices, self.inner.stationary, self.active)
