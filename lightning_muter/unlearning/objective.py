"""The robust objective over a data set: one pass gives its sums; Newton's method on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.linalg.cholesky import direct
from lightning_muter.models import Derivatives
from lightning_muter.models.base import measuring
from lightning_muter.unlearning.recipe import Contribution, Recipe

__all__ = [
    "HALVINGS",
    "PAYS",
    "Evaluation",
    "RobustObjective",
    "evaluation_of",
    "line_search",
    "newton",
]

#: a Hessian is used again while a step lowers the gradient to this share
PAYS = 0.3
HALVINGS = 20
#: as many halvings without a lower F, and a lower gradient serves
PATIENCE = 5

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Evaluation:
    """F(ω), ∇F(ω) (p,) and the counts of a pass; sums over the points, λ included."""

    value: float
    gradient: Tensor
    points: int
    stationary: float
    active: float
    usable: float

    @property
    def residual(self) -> float:
        """‖∇F(ω)‖."""
        return float(torch.linalg.vector_norm(self.gradient))


@dataclass(frozen=True)
class RobustObjective:
    """F(ω) = Σ_i max_δ l(ω, x_i + δ) + (nλ/2)‖ω‖² over the points that ``batches`` yields.

    Each process iterates its own share of the points; ``reduce`` sums tensors over processes.
    Every pass looks for δ* from the same start: one that began at the last pass's δ* would follow
    a local maximum past the point where another one is higher.
    """

    derivatives: Derivatives
    recipe: Recipe
    batches: Batches
    reduce: Callable[[Tensor], Tensor]

    def gradient(self, recipe: Recipe | None = None) -> Evaluation:
        """One pass for the value and gradient."""
        return self._evaluate(recipe or self.recipe, None)[0]

    def curvature(self, recipe: Recipe | None = None) -> tuple[Evaluation, Tensor]:
        """One pass for the value, the gradient and Σ D_i (p, p)."""
        p = self.derivatives.p
        device = self.derivatives.parameters[0].device
        matrix = torch.zeros(p, p, dtype=torch.float64, device=device)
        return self._evaluate(recipe or self.recipe, matrix)

    def _evaluate(self, recipe: Recipe, matrix: Tensor | None) -> tuple[Evaluation, Tensor]:
        derivatives = self.derivatives
        omega = derivatives.get()
        total = Contribution.zero(derivatives.p, omega.device)

        def add(i: int, j: int, block: Tensor) -> None:
            if matrix is not None:
                matrix[i : i + block.shape[0], j : j + block.shape[1]] += block

        with measuring(derivatives.module):
            for x, targets in self.batches():
                if matrix is None:
                    total = total + recipe.gradient(derivatives, x, targets)
                else:
                    total = total + recipe.accumulate(derivatives, x, targets, add)
        result = evaluation_of(total, omega, recipe.weight_decay, self.reduce)
        if matrix is None:
            return result, omega
        matrix = self.reduce(matrix)
        matrix.diagonal().add_(result.points * recipe.weight_decay)
        return result, matrix


def evaluation_of(
    total: Contribution, omega: Tensor, weight_decay: float, reduce: Callable[[Tensor], Tensor]
) -> Evaluation:
    """The sums of a pass with their λ terms, over all processes."""
    n, stationary, active, usable = reduce(total.counts).tolist()
    decay = n * weight_decay
    return Evaluation(
        value=float(reduce(total.loss)) + 0.5 * decay * float(omega @ omega),
        gradient=reduce(total.gradient) + decay * omega,
        points=int(n),
        stationary=stationary / max(n, 1),
        active=active / max(n, 1),
        usable=usable / max(n, 1),
    )


def newton(
    objective: RobustObjective, steps: int, damping: float = 0.0, tol: float = 1e-10
) -> list[float]:
    """Damped Newton steps with the total Hessian, δ* solved again at each; ‖∇F‖ after each.

    Each Hessian serves further steps, a gradient pass each, as long as they pay. A smoothed threat
    starts wide and ends at its own bandwidth half-way. A step that does not lower F is halved;
    where no step helps, Newton stops at its best point. ω in the module is what changes.
    """
    derivatives = objective.derivatives
    tol = max(tol, 0.1 * torch.finfo(derivatives.dtype).eps)
    history: list[float] = []
    homotopy = objective.recipe.threat.relaxed(2.0) is not objective.recipe.threat
    for k in range(steps):
        widening = max(1.0, 10.0 ** (4 - 8 * (k + 1) / steps)) if homotopy and steps > 1 else 1.0
        recipe = objective.recipe.at_bandwidth(widening) if widening > 1 else objective.recipe
        start, matrix = objective.curvature(recipe.rough())
        if start.residual <= tol * max(1.0, start.value) and widening == 1.0:
            history.append(start.residual)
            break
        matrix.diagonal().add_(damping)
        omega = derivatives.get()
        history.append(_descend(objective, recipe, matrix, start, tol).residual)
        del matrix
        stuck = torch.equal(derivatives.get(), omega)
        at_rounding = start.residual <= 1e4 * tol * max(1.0, start.value)
        if widening == 1.0 and (stuck or (at_rounding and history[-1] > PAYS * start.residual)):
            break
    return history


def _descend(
    objective: RobustObjective, recipe: Recipe, matrix: Tensor, start: Evaluation, tol: float
) -> Evaluation:
    """Steps with one Hessian until they stop paying, and the evaluation where they end."""
    halvings = HALVINGS
    while True:
        omega = objective.derivatives.get()
        step = direct(matrix, start.gradient).value
        trial = line_search(objective, recipe, omega, step, start, halvings)
        if trial is None:
            return start
        halvings = 0  # a Hessian of elsewhere is good for whole steps or for none
        paid = trial.residual < PAYS * start.residual
        start = trial
        if not paid or start.residual <= tol * max(1.0, start.value):
            return start


def line_search(
    objective: RobustObjective,
    recipe: Recipe,
    omega: Tensor,
    step: Tensor,
    start: Evaluation,
    halvings: int,
) -> Evaluation | None:
    """The first halving that lowers F enough (Armijo); at F's rounding, that lowers the gradient.

    Where no halving does, as when a maximiser jumps, the one of the lowest gradient serves; the
    long search is for a smoothed threat, whose curvature falls fast away from a zero weight.
    """
    slope = float(start.gradient @ step)
    rounding = 100 * torch.finfo(objective.derivatives.dtype).eps * max(1.0, abs(start.value))
    best, where = start, omega
    for halving in range(halvings + 1):
        scale = 0.5**halving
        objective.derivatives.set(omega - scale * step)
        trial = objective.gradient(recipe)
        lowers = trial.value <= start.value - 1e-4 * scale * slope
        if lowers or trial.residual < best.residual:
            best, where = trial, objective.derivatives.get()
        if lowers or (trial.value <= start.value + rounding and best is trial):
            break
        if halving >= PATIENCE and best is not start:
            break
    objective.derivatives.set(where)
    return None if best is start else best
