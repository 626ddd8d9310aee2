"""What a method asks of each point: its δ*, gradient and curvature, summed over batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from lightning_muter.adversary.maximiser import (
    InnerMaximum,
    InputGradient,
    Some,
    inspect,
    maximise,
)
from lightning_muter.adversary.mixture import Mixture, mix
from lightning_muter.adversary.two_sided import higher, seeded_start
from lightning_muter.curvature.base import CurvatureSum
from lightning_muter.curvature.point import PointCurvature
from lightning_muter.errors import ConfigurationError
from lightning_muter.models import ModelView
from lightning_muter.responses import Response
from lightning_muter.threats import Threat, unconstrained_geometry
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.points import Batch, Chunk, Sums
from lightning_muter.unlearning.sources import SOURCES

__all__ = ["PointProblem"]

_CHUNK_BYTES = 96 * 2**20
_ASCENT = 512  # points that ascend together
_PROBED = 64  # of which so many show whether the network bends


@dataclass(frozen=True)
class PointProblem:
    """How a method turns points into its system: method, threat, response and λ.

    ``weight_decay`` is the λ of one point of weight 1: every point carries w(λI) and w(λω)
    (docs/theory.md).
    """

    method: str
    threat: Threat
    response: Response
    weight_decay: float = 0.0
    max_iter: int = 200

    def at_bandwidth(self, factor: float) -> PointProblem:
        """The same on a more (factor > 1) smoothed inner problem."""
        return replace(self, threat=self.threat.relaxed(factor))

    def rough(self) -> PointProblem:
        """The same with rough inner responses, enough for a step of Newton's."""
        return replace(self, response=self.response.rough())

    def perturb(self, view: ModelView, batch: Batch, start: Tensor | None = None) -> InnerMaximum:
        """δ* of the points at the module's parameters, found from ``start`` (n, d).

        Without a start of the caller's the ascent begins at δ = 0; where the objective has no
        gradient there, at the point's own seeded perturbation, then at the opposite of what that
        found, and the higher of the two maxima serves. The losses are the objective's own.
        """
        found = []
        for first in range(0, len(batch), _ASCENT):
            some = slice(first, first + _ASCENT)
            part = batch.part(some)
            found.append(self._perturb(view, part, None if start is None else start[some]))
        return InnerMaximum.cat(found)

    def _perturb(self, view: ModelView, batch: Batch, start: Tensor | None) -> InnerMaximum:
        flat, reference = self._flat(view, batch), _reference(view, batch)
        ascent, some = _ascent(view, batch, reference), batch.part(slice(_PROBED))

        def climb(at: Tensor | None) -> InnerMaximum:
            link = view.objective.inner.link
            return maximise(
                ascent, flat, self.threat, self.max_iter, at, view.dtype, link=link, bends=bends
            )

        @cache
        def bends() -> bool:
            return view.beside(some.beside).bends(view.scaling.shaped(flat[:_PROBED], some.x))

        if start is None and view.objective.even:
            first = climb(seeded_start(self.threat, flat))
            # from -δ*, near the other maximum: from the seed's opposite some ascents come back
            second = climb(self.threat.project(flat, -first.delta))
            found = higher(self.threat, flat, first, second, view.dtype)
        else:
            found = climb(start)
        return _whole(view, batch, reference, found)

    def given(self, view: ModelView, batch: Batch, delta: Tensor) -> InnerMaximum:
        """Perturbations (n, ...) of the caller's own, with the evidence of how stationary."""
        reference, link = _reference(view, batch), view.objective.inner.link
        flat = delta.detach().reshape(len(delta), -1).double()
        ascent = _ascent(view, batch, reference)
        found = inspect(ascent, self._flat(view, batch), self.threat, flat, link)
        return _whole(view, batch, reference, found)

    def chunks(
        self, view: ModelView, batch: Batch, inner: InnerMaximum | None = None
    ) -> Iterator[Chunk]:
        """The batch in chunks of bounded memory, each at the perturbation the method sees.

        ``inner`` is δ* where it is known already.
        """
        if len(batch) == 0:  # a request of fewer points than processes
            return
        if METHODS[self.method].points == "clean":
            inner = None
        elif inner is None:
            inner = self.perturb(view, batch)
        mixture = self._mixture(view, batch, inner)
        step = view.chunk(batch.x, self.response, _CHUNK_BYTES)
        for start in range(0, len(batch), step):
            some = slice(start, start + step)
            part = batch.part(some)
            alone = torch.ones_like(part.weights)
            if inner is None:
                yield self._clean(view, part)
            elif mixture is None:
                yield self._chunk(view, part, inner.part(some), alone)
            else:
                mixed = mixture.part(some)
                rival = self._chunk(view, part, mixed.rival, mixed.second)
                first = self._chunk(view, part, inner.part(some), mixed.first)
                yield replace(first, rival=rival, value=mixed.value)

    def _clean(self, view: ModelView, batch: Batch) -> Chunk:
        origin = self._flat(view, batch)
        clean = view.scaling.shaped(origin, batch.x)
        seen = view.objective.seen(clean, clean)
        linearisation = view.beside(batch.beside).linearise(seen, batch.targets, batch.weights)
        ones = torch.ones_like(batch.weights)
        still = torch.zeros_like(ones)
        geometry = unconstrained_geometry(origin)
        return Chunk(origin, linearisation, geometry, None, ones, still, indices=batch.indices)

    def _chunk(self, view: ModelView, batch: Batch, inner: InnerMaximum, mixing: Tensor) -> Chunk:
        origin = self._flat(view, batch)
        if self.response.constrained:
            geometry = self.threat.geometry(origin, inner.delta, inner.grad)
        else:
            geometry = unconstrained_geometry(inner.delta)
        clean, perturbed = (
            view.scaling.shaped(flat, batch.x) for flat in (origin, origin + inner.delta)
        )
        seen = view.objective.seen(clean, perturbed)
        weights = batch.weights * mixing
        linearisation = view.beside(batch.beside).linearise(seen, batch.targets, weights)
        active = self.threat.active(origin, inner.delta)
        return Chunk(origin, linearisation, geometry, inner, mixing, active, indices=batch.indices)

    def _mixture(self, view: ModelView, batch: Batch, inner: InnerMaximum | None) -> Mixture | None:
        if inner is None or self.threat.temperature is None:
            return None
        rival = self.perturb(view, batch, start=-inner.delta)
        return mix(self.threat, self._flat(view, batch), inner, rival)

    def _flat(self, view: ModelView, batch: Batch) -> Tensor:
        """The points (n, d) on the threat's scale, float64."""
        if view.scaling != self.threat.scaling:
            raise ConfigurationError(
                f"the model's view has {view.scaling}, the threat {self.threat.scaling}: give "
                "view_of(...) the threat's own scaling"
            )
        return self.threat.flat_pixels(batch.x.double())

    def curvature(self, chunk: Chunk) -> PointCurvature:
        """Σ w_i D_i of a chunk, without λI."""
        source = SOURCES[METHODS[self.method].curvature]
        return source(chunk, self.response, self.threat.temperature)

    def accumulate(
        self,
        view: ModelView,
        batch: Batch,
        into: CurvatureSum,
        inner: InnerMaximum | None = None,
    ) -> Sums:
        """Add the batch's Σ w_i D_i (without λI) and return its other sums."""
        total = Sums.zero(view.p, batch.x.device)
        for chunk in self.chunks(view, batch, inner):
            part = self.curvature(chunk)
            into.add(part, chunk.facts)
            total = total + self._sums(chunk, part.usable)
        return total

    def measure(self, view: ModelView, batch: Batch) -> Iterator[tuple[PointCurvature, Sums]]:
        """Σ w_i D_i (without λI) and the other sums of every chunk of the batch."""
        for chunk in self.chunks(view, batch):
            part = self.curvature(chunk)
            yield part, self._sums(chunk, part.usable)

    def gradient(self, view: ModelView, batch: Batch, inner: InnerMaximum | None = None) -> Sums:
        """The sums without any curvature."""
        total = Sums.zero(view.p, batch.x.device)
        for chunk in self.chunks(view, batch, inner):
            everyone = torch.ones_like(chunk.mixing, dtype=torch.bool)
            total = total + self._sums(chunk, everyone)
        return total

    def _sums(self, chunk: Chunk, usable: Tensor) -> Sums:
        at, n = chunk.linearisation, len(chunk.origin)
        gradient, weights = at.gradient_sum(), at.weights
        points = gradient.new_full((), n)
        if chunk.inner is None:
            losses, stationary = at.losses(), points
            active = tied = torch.zeros_like(points)
        else:
            inner = chunk.inner
            losses = inner.losses + self.threat.merit(inner.delta, inner.grad)
            losses = losses if chunk.value is None else chunk.value
            stationary, tied = _count(inner.stationary), _count(inner.tied)
            active = chunk.active.sum()
        if chunk.rival is not None:
            other = chunk.rival.linearisation
            gradient = gradient + other.gradient_sum()
            weights = weights + other.weights
        loss, weight = (weights * losses).sum(), weights.sum()
        return Sums(gradient, loss, weight, points, stationary, active, _count(usable), tied)


def _count(flags: Tensor) -> Tensor:
    return flags.sum(dtype=torch.float64)


def _reference(view: ModelView, batch: Batch) -> Tensor:
    """What the adversary's loss compares a batch's perturbed outputs with."""

    def clean() -> Tensor:
        pixels = view.scaling.pixels(batch.x.double())
        return view.beside(batch.beside).outputs(view.scaling.shaped(pixels, batch.x))

    return view.objective.reference(clean, batch.targets)


def _whole(view: ModelView, batch: Batch, reference: Tensor, found: InnerMaximum) -> InnerMaximum:
    """The maxima with the objective's own losses: with what the adversary cannot move."""
    fixed = view.objective.fixed(reference, batch.targets)
    return replace(found, losses=found.losses + fixed)


def _ascent(view: ModelView, batch: Batch, reference: Tensor) -> InputGradient:
    """What the adversary ascends at flat float64 versions of the points."""

    def ascent(points: Tensor, which: Some) -> tuple[Tensor, Tensor]:
        there = view.beside(batch.beside.part(which) if batch.beside else batch.beside)
        return there.ascent(view.scaling.shaped(points, batch.x), reference[which])

    return ascent
