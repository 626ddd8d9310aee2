"""What a batch of points contributes: gradients, curvature and the evidence for its δ*."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightning_muter.adversary.maximiser import InnerMaximum, maximise
from lightning_muter.adversary.mixture import Mixture, mix
from lightning_muter.models import Autodiff, Derivatives, LinearHead
from lightning_muter.models.base import AddBlock
from lightning_muter.responses import Constrained, Response
from lightning_muter.threats import Geometry, Threat, unconstrained_geometry
from lightning_muter.unlearning.methods import METHODS

__all__ = ["Contribution", "Point", "Recipe"]

_CHUNK_BYTES = 96 * 2**20
_ASCENT = 512  # points that ascend together
_PROBED = 64  # points that are sketched together at the least: smaller batches waste the network


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
    weights: Tensor
    rival: Point | None = None  # of a mixed adversary: the same points, its second maximiser
    value: Tensor | None = None  # its soft maximum (n,)


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
        """The recipe with rough inner responses, enough for a step of Newton's."""
        if not isinstance(self.response, Constrained):
            return self
        rank = min(self.response.rank, 1)
        return replace(self, response=replace(self.response, tol=1e-2, rank=rank))

    def perturb(
        self, derivatives: Derivatives, x: Tensor, targets: Tensor, start: Tensor | None = None
    ) -> InnerMaximum:
        """δ* of the points x (n, ...) at the module's parameters, found from ``start`` (n, d)."""
        found = []
        for first in range(0, len(x), _ASCENT):
            some = slice(first, first + _ASCENT)
            part, y, flat = x[some], targets[some], _flat(x[some])

            def input_gradient(
                points: Tensor, which: Tensor, part: Tensor = part, y: Tensor = y
            ) -> tuple[Tensor, Tensor]:
                shaped = points.reshape(len(points), *part.shape[1:]).to(part)
                return derivatives.input_gradient(shaped, y[which])

            at = None if start is None else start[some]
            found.append(
                maximise(input_gradient, flat, self.threat, self.max_iter, at, derivatives.dtype)
            )
        return InnerMaximum.cat(found)

    def given(
        self, derivatives: Derivatives, x: Tensor, targets: Tensor, delta: Tensor
    ) -> InnerMaximum:
        """Perturbations (n, ...) of the caller's own, with the evidence of how stationary."""
        flat = _flat(x)
        delta = _flat(delta)
        losses, grad = derivatives.input_gradient((flat + delta).reshape(x.shape).to(x), targets)
        return InnerMaximum(delta, grad, losses, self.threat.stationarity(flat, delta, grad))

    def points(
        self,
        derivatives: Derivatives,
        x: Tensor,
        targets: Tensor,
        inner: InnerMaximum | None = None,
    ) -> Iterator[Point]:
        """The batch in chunks of bounded memory, each at the perturbation the method sees.

        ``inner`` is δ* where it is known already.
        """
        if not len(x):  # a request of fewer points than processes
            return
        flat = _flat(x)
        if METHODS[self.method].points == "clean":
            inner = None
        elif inner is None:
            inner = self.perturb(derivatives, x, targets)
        mixture = self._mixture(derivatives, flat, x, targets, inner)
        step = self._chunk(derivatives, x)
        for start in range(0, len(x), step):
            some = slice(start, start + step)
            origin, part, y = flat[some], x[some], targets[some]
            ones = torch.ones(len(origin), dtype=torch.float64, device=x.device)
            if inner is None:
                yield Point(origin, part, y, unconstrained_geometry(origin), None, ones)
            elif mixture is None:
                yield self._point(origin, part, y, inner.part(some), ones)
            else:
                mixed = mixture.part(some)
                rival = self._point(origin, part, y, mixed.rival, mixed.second)
                first = self._point(origin, part, y, inner.part(some), mixed.first)
                yield replace(first, rival=rival, value=mixed.value)

    def _point(
        self, origin: Tensor, x: Tensor, targets: Tensor, inner: InnerMaximum, weights: Tensor
    ) -> Point:
        if self.response.constrained:
            geometry = self.threat.geometry(origin, inner.delta, inner.grad)
        else:
            geometry = unconstrained_geometry(inner.delta)
        perturbed = (origin + inner.delta).reshape(x.shape).to(x)
        return Point(origin, perturbed, targets, geometry, inner, weights)

    def _mixture(
        self,
        derivatives: Derivatives,
        flat: Tensor,
        x: Tensor,
        targets: Tensor,
        inner: InnerMaximum | None,
    ) -> Mixture | None:
        if inner is None or self.threat.temperature is None:
            return None
        rival = self.perturb(derivatives, x, targets, start=-inner.delta)
        return mix(self.threat, flat, inner, rival)

    def _chunk(self, derivatives: Derivatives, x: Tensor) -> int:
        d = x[0].numel()
        if isinstance(derivatives, LinearHead):
            f = derivatives.layer.in_features
            if f == d:
                return max(1, _CHUNK_BYTES // (16 * 8 * d))
            if self.response.rank:
                return max(_PROBED, _CHUNK_BYTES // (8 * d * 8 * self.response.rank))
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
        inner: InnerMaximum | None = None,
    ) -> Contribution:
        """Add the batch's Σ curvature by blocks (without λI) and return its other sums."""
        total = Contribution.zero(derivatives.p, x.device)
        for point in self.points(derivatives, x, targets, inner):
            usable = self._add_curvature(derivatives, point, add)
            total = total + self._summary(derivatives, point, usable)
        return total

    def gradient(
        self,
        derivatives: Derivatives,
        x: Tensor,
        targets: Tensor,
        inner: InnerMaximum | None = None,
    ) -> Contribution:
        """The sums without any curvature."""
        total = Contribution.zero(derivatives.p, x.device)
        for point in self.points(derivatives, x, targets, inner):
            everyone = torch.ones(len(point.inputs), dtype=torch.bool, device=x.device)
            total = total + self._summary(derivatives, point, everyone)
        return total

    def _add_curvature(self, derivatives: Derivatives, point: Point, add: AddBlock) -> Tensor:
        curvature = METHODS[self.method].curvature
        usable = torch.ones(len(point.inputs), dtype=torch.bool, device=point.inputs.device)
        if curvature == "fisher":
            gradients = _gradients(derivatives, point)
            add(0, 0, gradients.T @ gradients)
            return usable
        for part in (point, point.rival):
            if part is not None and curvature == "hessian":
                derivatives.add_direct(part.inputs, part.targets, part.weights, add)
            elif part is not None:
                response = self.response.seeded(part.origin)
                usable &= derivatives.add_total(
                    part.inputs, part.targets, part.weights, part.geometry, response, add
                )
        if curvature == "total" and self.response.constrained and point.rival is not None:
            self._add_covariance(derivatives, point, point.rival, add)
        return usable

    def _add_covariance(
        self, derivatives: Derivatives, point: Point, rival: Point, add: AddBlock
    ) -> None:
        """Σ Cov_π(∇l) / T: how the weights of a mixed adversary move with ω."""
        assert self.threat.temperature is not None
        apart = (point.weights * rival.weights / self.threat.temperature).sqrt()
        some = apart > 0
        if not bool(some.any()):
            return
        gaps = derivatives.gradients(point.inputs[some], point.targets[some])
        gaps = gaps - derivatives.gradients(rival.inputs[some], rival.targets[some])
        gaps = gaps * apart[some].unsqueeze(1)
        add(0, 0, gaps.T @ gaps)

    def _summary(self, derivatives: Derivatives, point: Point, usable: Tensor) -> Contribution:
        n = len(point.inputs)
        if point.inner is None:
            with torch.no_grad():
                outputs = derivatives.module(point.inputs)
            loss = derivatives.loss(outputs, point.targets).double().sum()
            stationary, active = float(n), 0.0
        else:
            inner = point.inner
            hard = inner.losses + self.threat.merit(inner.delta, inner.grad)
            loss = (hard if point.value is None else point.value).sum()
            stationary = float(point.inner.stationary.sum())
            active = float(self.threat.active(point.origin, point.inner.delta).sum())
        gradient = derivatives.gradient_sum(point.inputs, point.targets, point.weights)
        if (rival := point.rival) is not None:
            gradient += derivatives.gradient_sum(rival.inputs, rival.targets, rival.weights)
        counts = [float(n), stationary, active, float(usable.sum())]
        return Contribution(gradient, loss, gradient.new_tensor(counts))


def _gradients(derivatives: Derivatives, point: Point) -> Tensor:
    """∇_ω l (n, p) of every point, of a mixed adversary the mean one."""
    gradients = derivatives.gradients(point.inputs, point.targets)
    if point.rival is None:
        return gradients
    other = derivatives.gradients(point.rival.inputs, point.rival.targets)
    weights = (point.weights.unsqueeze(1), point.rival.weights.unsqueeze(1))
    return weights[0] * gradients + weights[1] * other


def _flat(x: Tensor) -> Tensor:
    return x.detach().reshape(len(x), -1).double()
