"""What a batch of points contributes: gradients, curvature and the evidence for its δ*."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightning_muter.derivatives import Autodiff, Derivatives, LinearHead
from lightning_muter.derivatives.base import AddBlock
from lightning_muter.inner import InnerMaximum, maximise
from lightning_muter.methods import METHODS
from lightning_muter.responses import Constrained, Response
from lightning_muter.threats import Geometry, Threat, unconstrained_geometry

__all__ = ["Contribution", "Point", "Recipe"]

_CHUNK_BYTES = 96 * 2**20
_ASCENT = 512  # points that ascend together


@dataclass(frozen=True)
class Contribution:
    """Sums over points: Σ ∇_ω l (p,), losses, and counts of what was checked."""

    gradient: Tensor
    loss: Tensor
    counts: Tensor  # points, stationary, active, usable

    def __add__(self, other: Contribution) -> Contribution:
        return Contribution(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(Contribution))
        )

    @classmethod
    def zero(cls, p: int, device: torch.device) -> Contribution:
        """The empty sum."""
        flat = torch.zeros(p + 5, dtype=torch.float64, device=device)
        return cls(flat[:p], flat[p], flat[p + 1 :])


@dataclass(frozen=True)
class Point:
    """A chunk of points at their perturbation: x + δ in the module's dtype, and the geometry."""

    origin: Tensor  # x (n, d), flat and float64
    inputs: Tensor
    targets: Tensor
    geometry: Geometry
    inner: InnerMaximum | None


@dataclass(frozen=True)
class Recipe:
    """How a method turns points into its system: method, threat, response and λ.

    ``weight_decay`` is the λ of one point: every point carries λI and λω (docs/theory.md).
    """

    method: str
    threat: Threat
    response: Response
    weight_decay: float = 0.0
    max_iter: int = 200

    def at_bandwidth(self, factor: float) -> Recipe:
        """The recipe on a more (factor > 1) smoothed inner problem."""
        return replace(self, threat=self.threat.relaxed(factor))

    def rough(self) -> Recipe:
        """The recipe with inner responses to some percent, enough for a step of Newton's."""
        if not isinstance(self.response, Constrained):
            return self
        return replace(self, response=replace(self.response, tol=1e-2))

    def perturb(
        self, derivatives: Derivatives, x: Tensor, targets: Tensor, delta: Tensor | None = None
    ) -> InnerMaximum:
        """δ* of the points x (n, ...) at the module's parameters; ``delta`` is taken as given."""
        flat = x.detach().reshape(len(x), -1).double()

        def input_gradient(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            shaped = points.reshape(len(points), *x.shape[1:]).to(x)
            return derivatives.input_gradient(shaped, targets[which])

        if delta is None:
            return maximise(
                input_gradient, flat, self.threat, self.max_iter, dtype=derivatives.dtype
            )
        delta = delta.reshape(flat.shape).double()
        losses, grad = derivatives.input_gradient((flat + delta).reshape(x.shape).to(x), targets)
        moved = self.threat.stationarity(flat, delta, grad)
        return InnerMaximum(delta, grad, losses, moved)

    def points(
        self,
        derivatives: Derivatives,
        x: Tensor,
        targets: Tensor,
        delta: Tensor | None = None,
    ) -> Iterator[Point]:
        """The batch in chunks of bounded memory, each at the perturbation the method sees."""
        step = self._chunk(derivatives, x)
        for start in range(0, len(x), max(step, _ASCENT)):
            some = slice(start, start + max(step, _ASCENT))
            given = None if delta is None else delta[some]
            yield from self._point_chunks(derivatives, x[some], targets[some], given, step)

    def _point_chunks(
        self,
        derivatives: Derivatives,
        x: Tensor,
        targets: Tensor,
        delta: Tensor | None,
        step: int,
    ) -> Iterator[Point]:
        """One ascent for all the points, since it needs little memory; then chunks of them."""
        flat = x.detach().reshape(len(x), -1).double()
        clean = METHODS[self.method].points == "clean"
        inner = None if clean else self.perturb(derivatives, x, targets, delta)
        for start in range(0, len(x), step):
            some = slice(start, start + step)
            origin, part, y = flat[some], x[some], targets[some]
            if inner is None:
                yield Point(origin, part, y, unconstrained_geometry(origin), None)
                continue
            mine = inner.part(some)
            if self.response.constrained:
                geometry = self.threat.geometry(origin, mine.delta, mine.grad)
            else:
                geometry = unconstrained_geometry(mine.delta)
            perturbed = (origin + mine.delta).reshape(part.shape).to(part)
            yield Point(origin, perturbed, y, geometry, mine)

    def _chunk(self, derivatives: Derivatives, x: Tensor) -> int:
        d = x[0].numel()
        if isinstance(derivatives, LinearHead):
            f = derivatives.layer.in_features
            if f == d:
                return max(1, _CHUNK_BYTES // (16 * 8 * d))
            if self.response.rank:
                return max(1, _CHUNK_BYTES // (8 * d * 24 * self.response.rank))
            dense = 4 * d * d if derivatives.prefers_dense(x) else 0
            return max(1, _CHUNK_BYTES // (8 * (8 * f * d + 3 * f * f + dense)))
        if isinstance(derivatives, Autodiff):
            return max(1, _CHUNK_BYTES // (8 * (3 * derivatives.p * d + 4 * d * d)))
        return len(x)

    def accumulate(
        self,
        derivatives: Derivatives,
        x: Tensor,
        targets: Tensor,
        add: AddBlock,
        delta: Tensor | None = None,
    ) -> Contribution:
        """Add the batch's Σ curvature by blocks (without λI) and return its other sums."""
        total = Contribution.zero(derivatives.p, x.device)
        for point in self.points(derivatives, x, targets, delta):
            usable = self._add_curvature(derivatives, point, add)
            total = total + self._summary(derivatives, point, usable)
        return total

    def gradient(
        self, derivatives: Derivatives, x: Tensor, targets: Tensor, delta: Tensor | None = None
    ) -> Contribution:
        """The sums without any curvature."""
        total = Contribution.zero(derivatives.p, x.device)
        for point in self.points(derivatives, x, targets, delta):
            everyone = torch.ones(len(point.inputs), dtype=torch.bool, device=x.device)
            total = total + self._summary(derivatives, point, everyone)
        return total

    def _add_curvature(self, derivatives: Derivatives, point: Point, add: AddBlock) -> Tensor:
        curvature = METHODS[self.method].curvature
        everyone = torch.ones(len(point.inputs), dtype=torch.bool, device=point.inputs.device)
        if curvature == "fisher":
            gradients = derivatives.gradients(point.inputs, point.targets)
            add(0, 0, gradients.T @ gradients)
            return everyone
        if curvature == "hessian":
            derivatives.add_direct(point.inputs, point.targets, add)
            return everyone
        response = self.response.seeded(point.origin)
        return derivatives.add_total(point.inputs, point.targets, point.geometry, response, add)

    def _summary(self, derivatives: Derivatives, point: Point, usable: Tensor) -> Contribution:
        n = len(point.inputs)
        if point.inner is None:
            with torch.no_grad():
                outputs = derivatives.module(point.inputs)
            loss = derivatives.loss(outputs, point.targets).double().sum()
            stationary, active = float(n), 0.0
        else:
            inner = point.inner
            loss = (inner.losses + self.threat.merit(inner.delta, inner.grad)).sum()
            stationary = float(point.inner.stationary.sum())
            active = float(self.threat.active(point.origin, point.inner.delta).sum())
        gradient = derivatives.gradient_sum(point.inputs, point.targets)
        counts = [float(n), stationary, active, float(usable.sum())]
        return Contribution(gradient, loss, gradient.new_tensor(counts))
