"""What a point did to a training that stopped early, to first order (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_muter.curvature.base import Curvature
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.errors import ConfigurationError, SolverError
from lightning_muter.linalg.lanczos import Krylov, TimeAverage, decay_integral, first_column
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.start import Start

__all__ = ["Way"]

_RATIO = 2.0**0.5  # of a node's time to the one before it
_NODES = 20  # the first of them at a thousandth of the way
_NEGLIGIBLE = 1e-6  # of the longest e(s), that is left out of it
_TOL = 1e-10
_STEPS = 500
_SERIES = 1e-2  # below it the closed form's cancellation loses more than its series leaves out


@dataclass(frozen=True)
class Way:
    """The way of a training's flow, ω(s) = ω* + e(s), and what a pull along it does to its end.

    A training without a point differs from the training by η' = -M η + f(s), f(s) = g + D e(s) with
    the point's own gradient and curvature at ω*; ω ends Σ_j a_j η(s_j) elsewhere. e(s) is taken at
    some nodes in time, is linear between them, and a combination of few directions b_r, so that the
    integral over exp(-(s_j - s) M) is a function of M alone, applied to g and each D b_r. As in a
    request, all curvature is that of ω*. Source: ours; Bae et al. 2024 unroll in this way.

    Attributes:
        start: where training began and how long it went.
        curvature: M of the points that are in the memory.
        gradient: ∇F(ω*) of these points (p,).
        omega_star: ω* (p,).
        times: the times that the end averages over, s_j with a_j, of a Retrain on these points.
        weight: of these points.
    """

    start: Start
    curvature: Curvature
    gradient: Tensor
    omega_star: Tensor
    times: TimeAverage
    weight: float

    @classmethod
    def of(cls, memory: UnlearningMemory) -> Way | None:
        """The way of a memory with a horizon; None where training went to its optimum."""
        start, curvature = memory.start, memory.curvature
        if start is None or curvature is None:
            return None
        weight = float(memory.weights[memory.remaining].sum())
        times = start.flow.of_remaining(weight / float(memory.weights.sum()))
        gradient = memory.residual_gradient - memory.gradient
        damped = curvature.damped(memory.settings.damping)
        return cls(start, damped, gradient, memory.omega_star, times, weight)

    @cached_property
    def nodes(self) -> Tensor:
        """Times (k,) at which points' gradients are taken: 0, then ever longer steps to the end."""
        back = torch.arange(_NODES - 1, -1, -1, dtype=torch.float64)
        ends = max(self.times.times) * _RATIO**-back
        return torch.cat([torch.zeros(1, dtype=torch.float64), ends]).to(self.gradient)

    @cached_property
    def offsets(self) -> Tensor:
        """e (k, p) at the nodes."""
        offset = self.start.initial - self.omega_star
        return offset + self._moved(self.nodes, offset)

    def _moved(self, times: Tensor, offset: Tensor) -> Tensor:
        """e(s) - e(0) = ∫₀ˢ exp(-tM) dt (-∇F - M e(0)) (k, p), at some times (k,)."""
        along = -self.gradient - self.curvature.matvec(offset)
        return self._function(along, lambda a: decay_integral(times, a.unsqueeze(1)))

    @cached_property
    def directions(self) -> Tensor:
        """b (r, p), of length 1 and orthogonal, whose combinations all e(s) are."""
        _, sizes, rows = torch.linalg.svd(self.offsets, full_matrices=False)
        directions: Tensor = rows[sizes > _NEGLIGIBLE * sizes[0]]
        return directions

    @cached_property
    def _profiles(self) -> Tensor:
        """How much of g and of each D b_r is in f at the nodes (k, 1 + r)."""
        return torch.cat(
            [torch.ones_like(self.nodes).unsqueeze(1), self.offsets @ self.directions.T], dim=1
        )

    @cached_property
    def lengthening(self) -> Tensor:
        """How the end moves (p,) as a training of as many steps has a point of weight 1 less.

        Each step is then longer, and so are the times: by 1/weight of themselves.
        """
        if self.start.flow.pace == "epochs":
            return torch.zeros_like(self.gradient)
        ends = self.gradient.new_tensor(self.times.times)
        shares = ends * self.gradient.new_tensor(self.times.shares) / self.weight
        offset = self.start.initial - self.omega_star
        way = offset + self._moved(ends, offset)
        pull = torch.stack([self.gradient + self.curvature.matvec(e) for e in way])
        return -(shares @ pull)

    def seen_from_the_end(self, u: Tensor) -> Tensor:
        """What (1 + r, p) g and each D b_r are multiplied with for uᵀ of how the end moves."""
        return self._function(u, self._functions)

    def ended(self, pulls: Sequence[Tensor]) -> Tensor:
        """How the end moves (m, p), for points of these g (m, p) and D b_r (m, p).

        Raises:
            ConfigurationError: the memory has no matrix.
        """
        if not isinstance(self.curvature, DenseCurvature):
            raise ConfigurationError(
                "the influence on parameters of a training that stopped early needs a memory with "
                "representation='dense'; influence_on_losses goes with any"
            )
        values, vectors = self._spectrum
        parts = zip(pulls, self._functions(values).T, strict=True)
        moved: Tensor = torch.stack([(f @ vectors) * w for f, w in parts]).sum(dim=0) @ vectors.T
        return moved

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.curvature, DenseCurvature)
        values, vectors = torch.linalg.eigh(self.curvature.matrix)
        return values, vectors

    def _functions(self, values: Tensor) -> Tensor:
        """Of M's eigenvalues (m,): what g and each D b_r are multiplied with (m, 1 + r)."""
        return self._weights(values) @ self._profiles.to(values)

    def _function(self, u: Tensor, functions: Callable[[Tensor], Tensor]) -> Tensor:
        """f_k(M) u (k, p) by Lanczos, for functions of M's eigenvalues (m,) -> (m, k)."""
        if not bool(u.any()):
            return u.expand(functions(u[:1]).shape[1], -1)
        krylov = Krylov(self.curvature.matvec, u)
        for _ in range(min(_STEPS, len(u))):
            krylov.step()
            values, vectors = krylov.spectrum()
            found = functions(values)
            columns = torch.stack([first_column(values, vectors, f) for f in found.T])
            size = float(torch.linalg.vector_norm(columns, dim=1).max())
            if float(columns[:, -1].abs().max()) <= _TOL * size or bool(krylov.exhausted):
                break
        result: Tensor = krylov.combine(columns)
        if not bool(torch.isfinite(result).all()):
            raise SolverError(
                "the flow of training is not finite: M is indefinite and the horizon long; train "
                "to the optimum, with newton_steps and no horizon"
            )
        return result

    def _weights(self, values: Tensor) -> Tensor:
        """Σ_j a_j ∫₀^{s_j} exp(-(s_j - s) a) N_k(s) ds (m, k), N_k linear between the nodes."""
        nodes = self.nodes.to(values)
        found = values.new_zeros(len(values), len(nodes))
        for end, share in zip(self.times.times, self.times.shares, strict=True):
            left, length = nodes[:-1], nodes.diff()
            inside = (end - left).clamp(min=0).minimum(length)  # of a panel before the end
            after = (end - left - inside).clamp(min=0)
            a = values.unsqueeze(1)
            decay = share * torch.exp(-after * a)
            whole, first = decay_integral(inside, a), _first_moment(inside, a)
            right = decay * (inside * whole - first) / length
            found[:, 1:] += right
            found[:, :-1] += decay * whole - right
        return found


def _first_moment(d: Tensor, a: Tensor) -> Tensor:
    """∫₀ᵈ v exp(-va) dv."""
    x = d * a
    small = x.abs() < _SERIES
    safe = torch.where(small, torch.ones_like(x), x)
    series = 0.5 - x / 3 + x.square() / 8 - x**3 / 30 + x**4 / 144
    exact = -(torch.expm1(-safe) + safe * torch.exp(-safe)) / safe.square()
    return d.square() * torch.where(small, series, exact)
