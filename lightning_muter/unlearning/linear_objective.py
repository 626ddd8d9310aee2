"""The robust objective of a linear model whose inner maximum is known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_muter.linalg.gram import gram
from lightning_muter.unlearning.inner_dual import LevelLoss
from lightning_muter.unlearning.reach import Reach

__all__ = ["LinearPoints", "LinearRobustObjective", "Outputs", "State"]

_ROWS = 4096
_UNIT = torch.finfo(torch.float64).eps / 2


@dataclass(frozen=True)
class Outputs:
    """How the trained parameters ω (p,) make the one number v = (w, b) that a point sees.

    One output is ω itself; of two outputs the loss sees their difference.

    Attributes:
        count: 1 or 2.
        features: F.
        biased: whether there is a bias.
    """

    count: int
    features: int
    biased: bool

    def seen(self, omega: Tensor) -> tuple[Tensor, Tensor]:
        """W (F,) and b () of the output, or of the second less the first."""
        weight = omega[: self.count * self.features].reshape(self.count, self.features)
        bias = omega[self.count * self.features :] if self.biased else omega.new_zeros(self.count)
        if self.count == 1:
            return weight[0], bias[0]
        return weight[1] - weight[0], bias[1] - bias[0]

    def back(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The transpose: a gradient (..., F) and (...) of what is seen as one of ω (..., p)."""
        signs = (1.0,) if self.count == 1 else (-1.0, 1.0)
        parts = [sign * weight for sign in signs]
        parts += [(sign * bias).unsqueeze(-1) for sign in signs] if self.biased else []
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class LinearPoints:
    """The points of the sum: inputs x (n, F), targets y (n,), weights (n,), all float64."""

    x: Tensor
    y: Tensor
    weights: Tensor

    @cached_property
    def lengths(self) -> Tensor:
        """‖x‖ of each (n,)."""
        found: Tensor = torch.linalg.vector_norm(self.x, dim=1)
        return found


@dataclass(frozen=True)
class State:
    """F and a subgradient of it at ω, with what they may be off by.

    Attributes:
        omega: ω (p,).
        value: F(ω).
        gradient: (p,); of F, or of a function below F that is short of it by ``gap`` at ω.
        gap: η, the sum over points of what their perturbation may fall short of the maximum.
        rounding: of the gradient's computation in float64, at the most.
        modulus: κ = λ Σ w, of strong convexity.
        level: a (n,), the margin's negative or the absolute residual.
        side: da/dz (n,), the side of zero that the residual is on.
        mixing: t (n,) in [-1, 1]: where it is no sign, the two perturbations of a point whose
            residual is next to zero are mixed in the shares (1 ± t) / 2.
        rho: the slope of the loss at the maximum (n,).
        reach: how far the perturbation moves the output (n,).
        errors: what rounding can move the levels by (n,), at the most.
    """

    omega: Tensor
    value: float
    gradient: Tensor
    gap: float
    rounding: float
    modulus: float
    level: Tensor
    side: Tensor
    mixing: Tensor
    rho: Tensor
    reach: Tensor
    errors: Tensor

    @property
    def bound(self) -> float:
        """(‖g‖ + √(‖g‖² + 4κη)) / (2κ): no point is farther from the optimum than that."""
        length = float(torch.linalg.vector_norm(self.gradient)) * (1 + 1e-12) + self.rounding
        return gap_bound(length, self.gap, self.modulus)


def gap_bound(gradient: float, gap: float, modulus: float) -> float:
    """How far the optimum of a κ-strongly convex F can be, from an η-subgradient's length.

    At η = 0 this is ‖g‖ / κ. Source: ours (docs/certificates.md).

    Args:
        gradient: ‖g‖ of a convex function below F that is short of F by η here.
        gap: η.
        modulus: κ.

    Example:
        >>> gap_bound(2.0, 0.0, 4.0), gap_bound(0.0, 1.0, 4.0)
        (0.5, 0.5)
    """
    return (gradient + math.sqrt(gradient**2 + 4 * modulus * gap)) / (2 * modulus)


@dataclass(frozen=True)
class LinearRobustObjective:
    """F(ω) = Σ_i w_i max_δ l(v·(x_i + δ), y_i) + (λ Σw / 2) ‖ω‖², exactly. Source: ours.

    Attributes:
        points: the points of the sum.
        outputs: how ω makes their output.
        loss: of the level.
        reach: of the threat.
        weight_decay: λ.
        scale: of the loss, as 2 for a mean squared error.
    """

    points: LinearPoints
    outputs: Outputs
    loss: LevelLoss
    reach: Reach
    weight_decay: float
    scale: float = 1.0

    @property
    def modulus(self) -> float:
        """κ = λ Σ w: F less κ‖ω‖²/2 is convex."""
        return self.weight_decay * float(self.points.weights.sum())

    def at(self, omega: Tensor, mixing: Tensor | None = None) -> State:
        """One pass over the points at ω (p,).

        Args:
            omega: where.
            mixing: t (n,), for points that sit on the kink of their loss; their sides by default.
        """
        x, y, weights = self.points.x, self.points.y, self.points.weights * self.scale
        w, b = self.outputs.seen(omega)
        level, side = self.loss.level(x @ w + b, y)
        found = self.loss.maximum(level, self.reach, w)
        reach = self.reach.slope(found, w)
        rho = self.loss.slope(level + reach)
        mixing = side if mixing is None else mixing
        apart = (side - mixing) * side
        along = weights * (rho * side - (side - mixing) * reach)  # of x
        across = weights * (rho - apart * level)  # of the perturbation
        plain = x.T @ along
        pull = self.reach.pull(across, found, w, plain)
        gradient = self.outputs.back(plain + pull, along.sum()) + self.modulus * omega
        losses = self.loss.value(level + reach) + self.reach.merit(found, w)
        value = float(weights @ losses) + 0.5 * self.modulus * float(omega @ omega)
        lengths, errors = self._errors(omega, y, reach, rho)
        gap = weights * (apart * (level + errors) * reach)
        if self.loss.kinked:  # rounding hides which side they are on
            gap += torch.where(level <= errors, 2 * weights * errors * reach, 0.0)
        if not self.reach.rigid:  # else its one perturbation is the maximiser, whatever ρ is
            gap += weights * self.loss.gap(level, found, self.reach, w)
        return State(
            omega=omega,
            value=value,
            gradient=gradient,
            gap=float(gap.clamp(min=0).sum()),
            rounding=self._rounding(weights, rho, lengths, errors, omega),
            modulus=self.modulus,
            level=level,
            side=side,
            mixing=mixing,
            rho=found,
            reach=reach,
            errors=errors,
        )

    def _errors(
        self, omega: Tensor, y: Tensor, reach: Tensor, rho: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Lengths (n,) of the perturbed points, and what rounding can move their levels by."""
        lengths = self.points.lengths
        unit = (self.outputs.features + 16) * _UNIT
        size = math.sqrt(2.0) * float(omega.norm())
        errors = unit * ((lengths + 1) * size + y.abs() + reach)
        return lengths + 1 + self.reach.length(self.outputs.features), errors

    def _rounding(
        self, weights: Tensor, rho: Tensor, lengths: Tensor, errors: Tensor, omega: Tensor
    ) -> float:
        """The gradient's error at the most, whatever the order of the sums."""
        terms = len(weights) + self.outputs.features + 16
        sums = terms * _UNIT * (weights * rho) @ lengths
        slopes = self.loss.smoothness * (weights * errors) @ lengths
        decay = 4 * _UNIT * self.modulus * omega.norm()
        return 1.01 * math.sqrt(self.outputs.count) * float(sums + slopes + decay)

    def hessian(self, state: State) -> Tensor:
        """∂_ωω F (p, p) at a state, its perturbations moving with ω."""
        f, x, weights = self.outputs.features, self.points.x, self.points.weights * self.scale
        w, _ = self.outputs.seen(state.omega)
        rest = self.loss.conjugate_bend(state.rho) - self.reach.bend(state.rho, w)
        stiff = rest.clamp(min=1e-9).reciprocal()
        total = x.new_zeros(f + 1, f + 1)
        for some in torch.split(torch.arange(len(x), device=x.device), _ROWS):
            bent = self.reach.mixed(state.rho[some], w)
            t = state.mixing[some].unsqueeze(1)
            rows = torch.cat([t * x[some] + bent, t], dim=1)
            total += gram(rows, (weights * stiff)[some])
        mixed = torch.nonzero(state.mixing.abs() < 1).flatten()
        if len(mixed):
            rows = torch.cat([x[mixed], torch.ones_like(x[mixed, :1])], dim=1)
            folding = self.loss.folding(state.level, state.rho, stiff)
            folding = (weights * folding * (1 - state.mixing.square()))[mixed]
            total += gram(rows, folding)
        total[:f, :f] += self.reach.curvature(weights, state.rho, w)
        half = self.outputs.back(total[:, :f], total[:, f])
        whole = self.outputs.back(half[:f].T, half[f])
        whole.diagonal().add_(self.modulus)
        return whole
