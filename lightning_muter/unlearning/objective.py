"""The robust objective over a data set: one pass gives its sums; Newton's method on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_muter.adversary.maximiser import InnerMaximum
from lightning_muter.curvature.base import Curvature, CurvatureSum, Solver
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.models import ModelView, measuring
from lightning_muter.parallel import Group
from lightning_muter.unlearning.diagnosis import STATIONARY_LIMIT
from lightning_muter.unlearning.maxima import LastMaxima
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import Batch, Sums

__all__ = [
    "HALVINGS",
    "PAYS",
    "Evaluation",
    "RobustObjective",
    "line_search",
    "newton",
]

#: a Hessian is used again while a step lowers the gradient to this share
PAYS = 0.3
#: a step of F without a derivative that leaves a larger share of the gradient is the last
LOITERS = 0.7
HALVINGS = 20
#: as many halvings without a lower F, and a lower gradient serves
PATIENCE = 5

Batches = Callable[[], Iterable[Batch]]
#: a view -> the sum that its points' curvature goes into
EmptySum = Callable[[ModelView], CurvatureSum]
_Work = Callable[[Batch, "InnerMaximum | None"], Sums]


def _dense(view: ModelView) -> CurvatureSum:
    return DenseCurvature.zeros(view.p, view.device)


@dataclass(frozen=True)
class Evaluation:
    """F(ω), ∇F(ω) (p,) and the shares of a pass; sums over the points, λ included.

    ``weight`` is the sum of the points' weights: their number, where all weigh 1.
    """

    value: float
    gradient: Tensor
    points: int
    weight: float
    stationary: float
    active: float
    usable: float
    tied: float

    @property
    def residual(self) -> float:
        """‖∇F(ω)‖."""
        return float(torch.linalg.vector_norm(self.gradient))

    @classmethod
    def of(cls, sums: Sums, omega: Tensor, weight_decay: float) -> Evaluation:
        """Sums over all processes, at ω (p,), with their λ terms."""
        weight = float(sums.weight)
        decay = weight * weight_decay
        return cls(
            value=float(sums.loss) + 0.5 * decay * float(omega @ omega),
            gradient=sums.gradient + decay * omega,
            points=int(sums.points),
            weight=weight,
            stationary=sums.share(sums.stationary),
            active=sums.share(sums.active),
            usable=sums.share(sums.usable),
            tied=sums.share(sums.tied),
        )


@dataclass(frozen=True)
class RobustObjective:
    """F(ω) = Σ_i w_i max_δ l(ω, x_i + δ) + (Σw λ/2)‖ω‖² over the points that ``batches`` yields.

    Each process iterates its own share of the points, the same batches in the same order at every
    pass; ``group`` sums tensors over processes.
    Every pass looks for δ* from the same start: one that began at the last pass's δ* would follow
    a local maximum past the point where another one is higher. ``empty`` makes the sum of D_i.
    """

    view: ModelView
    problem: PointProblem
    batches: Batches
    group: Group = field(default_factory=Group)
    empty: EmptySum = _dense
    maxima: LastMaxima = field(default_factory=LastMaxima, repr=False, compare=False)

    def gradient(self, problem: PointProblem | None = None) -> Evaluation:
        """One pass for the value and gradient."""
        problem = problem or self.problem
        return self._pass(problem, lambda batch, inner: problem.gradient(self.view, batch, inner))

    def curvature(self, problem: PointProblem | None = None) -> tuple[Evaluation, Curvature]:
        """One pass for the value, the gradient and Σ D_i."""
        problem = problem or self.problem
        total = self.empty(self.view)
        evaluation = self._pass(
            problem, lambda batch, inner: problem.accumulate(self.view, batch, total, inner)
        )
        return evaluation, total.finished(self.group, evaluation.weight, problem.weight_decay)

    def _pass(self, problem: PointProblem, work: _Work) -> Evaluation:
        total = Sums.zero(self.view.p, self.view.device)
        self.maxima.begin(self.view.get(), problem)
        with measuring(self.view.module):
            for batch in self.batches():
                total = total + work(batch, self.maxima.of(self.view, batch))
        reduced = total.reduced(self.group)
        return Evaluation.of(reduced, self.view.get(), problem.weight_decay)


def newton(
    objective: RobustObjective, steps: int, damping: float = 0.0, tol: float = 1e-10
) -> list[float]:
    """Damped Newton steps with the total Hessian, δ* solved again at each; ‖∇F‖ after each.

    Each Hessian serves further steps, a gradient pass each, as long as they pay. A smoothed threat
    starts wide and ends at its own bandwidth half-way. A step that does not lower F is halved;
    where no step helps, Newton stops at its best point, and where most perturbations are no
    maximisers, so that F has no derivative, as soon as a step leaves most of the gradient. ω in the
    module is what changes.
    """
    view = objective.view
    tol = max(tol, 0.1 * torch.finfo(view.dtype).eps)
    history: list[float] = []
    homotopy = objective.problem.threat.relaxed(2.0) is not objective.problem.threat
    for k in range(steps):
        widening = max(1.0, 10.0 ** (4 - 8 * (k + 1) / steps)) if homotopy and steps > 1 else 1.0
        problem = objective.problem.at_bandwidth(widening) if widening > 1 else objective.problem
        start, curvature = objective.curvature(problem.rough())
        if start.residual <= tol * max(1.0, start.value) and widening == 1.0:
            history.append(start.residual)
            break
        omega = view.get()
        solver = curvature.damped(damping).solver()
        end = _descend(objective, problem, solver, start, tol)
        history.append(end.residual)
        del curvature, solver
        stuck = torch.equal(view.get(), omega)
        at_rounding = start.residual <= 1e4 * tol * max(1.0, start.value)
        if widening == 1.0 and (stuck or (at_rounding and history[-1] > PAYS * start.residual)):
            break
        lost = end.stationary < STATIONARY_LIMIT and widening == 1.0
        if lost and end.residual > LOITERS * start.residual:
            break
    return history


def _descend(
    objective: RobustObjective,
    problem: PointProblem,
    solver: Solver,
    start: Evaluation,
    tol: float,
) -> Evaluation:
    """Steps with one Hessian until they stop paying, and the evaluation where they end."""
    halvings = HALVINGS
    while True:
        omega = objective.view.get()
        step = solver.solve(start.gradient).value
        trial = line_search(objective, problem, omega, step, start, halvings)
        if trial is None:
            return start
        halvings = 0  # a Hessian of elsewhere is good for whole steps or for none
        paid = trial.residual < PAYS * start.residual
        start = trial
        if not paid or start.residual <= tol * max(1.0, start.value):
            return start


def line_search(
    objective: RobustObjective,
    problem: PointProblem,
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
    rounding = 100 * torch.finfo(objective.view.dtype).eps * max(1.0, abs(start.value))
    best, where = start, omega
    for halving in range(halvings + 1):
        scale = 0.5**halving
        objective.view.set(omega - scale * step)
        trial = objective.gradient(problem)
        lowers = trial.value <= start.value - 1e-4 * scale * slope
        if lowers or trial.residual < best.residual:
            best, where = trial, objective.view.get()
        if lowers or (trial.value <= start.value + rounding and best is trial):
            break
        if halving >= PATIENCE and best is not start:
            break
    objective.view.set(where)
    return None if best is start else best
