"""One request: δ* of the points to forget, Stage II, Stage III; without Lightning."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.derivatives import Derivatives
from lightning_muter.derivatives.base import Products, measuring
from lightning_muter.memory import UnlearningMemory
from lightning_muter.methods import METHODS
from lightning_muter.recipe import Contribution, Point, Recipe
from lightning_muter.solvers import Solution, conjugate_gradients, direct, minres

__all__ = ["Outcome", "forget"]

_DIRECT_LIMIT = 4096


@dataclass(frozen=True)
class Outcome:
    """The memory after a request, with the system's solution and the counts of its points."""

    memory: UnlearningMemory
    solution: Solution
    contribution: Contribution
    seconds: float


def forget(
    memory: UnlearningMemory,
    derivatives: Derivatives,
    indices: list[int],
    x: Tensor,
    targets: Tensor,
    noise_std: float = 0.0,
    share: slice = slice(None),
    reduce: Callable[[Tensor], Tensor] = lambda t: t,
) -> Outcome:
    """Stages II and III on the points x (m, ...), at ω*; neither memory nor module is changed.

    Solves (M_r - Σ_S D_i) Δω = G_r + Σ_S (∇l_i + λω*) and returns the memory of the remaining
    points with ω^u = ω* + Δω (+ N(0, σ²I)). The methods without a downdate solve with M_r.

    Args:
        memory: the memory before the request.
        derivatives: of the module in the user's hands.
        indices: which training points x and targets are.
        x: inputs (m, ...) on the module's device.
        targets: targets (m,).
        noise_std: σ of Gaussian noise on ω^u.
        share: this process's slice of the batch.
        reduce: sums a tensor over processes.
    """
    start = time.perf_counter()
    settings = memory.settings
    recipe = settings.recipe()
    method = METHODS[settings.method]
    removal = torch.zeros_like(memory.matrix)

    def add(i: int, j: int, block: Tensor) -> None:
        removal[i : i + block.shape[0], j : j + block.shape[1]] += block

    with measuring(derivatives.module), derivatives.at(memory.omega_star):
        mine = recipe.accumulate(derivatives, x[share], targets[share], add)
        total = Contribution(*(reduce(t) for t in (mine.gradient, mine.loss, mine.counts)))
        removal = reduce(removal)
        m = len(indices)
        decay = m * recipe.weight_decay
        removal.diagonal().add_(decay)
        gradient = total.gradient + decay * memory.omega_star
        rhs = memory.gradient + gradient
        remaining = removal.neg_().add_(memory.matrix)  # in place: p x p is what is large
        if settings.solver == "schur" or (settings.solver == "auto" and memory.p > _DIRECT_LIMIT):
            solution = _schur(memory, recipe, derivatives, x, targets, rhs)
        else:
            matrix = remaining if method.downdate else memory.matrix
            if settings.damping > 0:
                matrix = matrix.clone()
                matrix.diagonal().add_(settings.damping)
            solution = direct(matrix, rhs)
    if solution.status == "indefinite":
        warnings.warn(
            "the system of the remaining points is indefinite: its solution is a saddle of the "
            "quadratic model, not its minimum, and may lie farther from Retrain than doing "
            "nothing; use response='constrained', more newton_steps or damping",
            stacklevel=2,
        )
    omega = memory.omega_star + solution.value
    if noise_std > 0:
        omega = omega + noise_std * torch.randn_like(omega)
    entry = {"m": m, "residual": solution.residual, "status": solution.status}
    after = memory.forget(indices, remaining, gradient, omega, entry)
    return Outcome(after, solution, total, time.perf_counter() - start)


def _schur(
    memory: UnlearningMemory,
    recipe: Recipe,
    derivatives: Derivatives,
    x: Tensor,
    targets: Tensor,
    rhs: Tensor,
) -> Solution:
    """Theorem 2's block system, matrix-free in the points' blocks."""
    method = METHODS[recipe.method]
    points = list(recipe.points(derivatives, x, targets)) if method.downdate else []
    if method.curvature == "total" and recipe.response.constrained:
        points = [_freeze_unusable(derivatives, recipe, point) for point in points]
    blocks = [_PointBlock.of(derivatives, point) for point in points]
    m = sum(len(point.inputs) for point in points)
    with_delta = method.curvature == "total"
    fisher = method.curvature == "fisher"
    gradients = [derivatives.gradients(b.inputs, b.targets) for b in points] if fisher else []
    shift = memory.settings.damping - m * recipe.weight_decay
    p = memory.p
    sizes = [block.point.inputs[0].numel() * len(block.point.inputs) for block in blocks]

    def operator(vector: Tensor) -> Tensor:
        v, rest = vector[:p], vector[p:]
        top = memory.matrix @ v + shift * v
        for g in gradients:
            top = top - g.T @ (g @ v)
        if fisher:
            return top
        alphas = torch.split(rest, sizes) if with_delta else [None] * len(blocks)
        bottoms = []
        for block, alpha in zip(blocks, alphas, strict=True):
            top = top - block.products.ww(v)
            if alpha is not None:
                a = alpha.reshape(block.point.geometry.free.shape)
                top = top + block.products.wd(block.point.geometry.project(a))
                bottoms.append((block.cross(v) + block.k(a)).reshape(-1))
        return torch.cat([top, *bottoms])

    full = torch.cat([rhs, rhs.new_zeros(sum(sizes))]) if with_delta else rhs
    inverse = memory.matrix.diagonal().clamp(min=1e-12).reciprocal()
    if with_delta and recipe.response.constrained:
        shifts = [b.point.geometry.shift.clamp(min=1e-12).reshape(-1) for b in blocks]
        frees = [b.point.geometry.free.reshape(-1) for b in blocks]
        scale = [torch.where(f > 0, 1 / s, torch.ones_like(s)) for f, s in zip(frees, shifts)]  # noqa: B905
        inverse = torch.cat([inverse, *scale])
    elif with_delta:
        inverse = torch.cat([inverse, rhs.new_ones(sum(sizes))])
    tol = 1e-10 if derivatives.dtype == torch.float64 else 1e-6
    solution = conjugate_gradients(operator, full, lambda v: inverse * v, tol)
    if solution.status != "converged":
        solution = minres(operator, full, tol)
    return Solution(solution.value[:p], solution.residual, solution.iterations, solution.status)


def _freeze_unusable(derivatives: Derivatives, recipe: Recipe, point: Point) -> Point:
    """The point with δ held where K_i is not positive definite, as Stage I held it."""

    def ignore(i: int, j: int, block: Tensor) -> None:
        """Only the mask is wanted here."""

    usable = derivatives.add_total(
        point.inputs, point.targets, point.geometry, recipe.response, ignore
    )
    return replace(point, geometry=point.geometry.freeze(~usable))


@dataclass(frozen=True)
class _PointBlock:
    point: Point
    products: Products

    @classmethod
    def of(cls, derivatives: Derivatives, point: Point) -> _PointBlock:
        return cls(point, derivatives.products(point.inputs, point.targets))

    def cross(self, v: Tensor) -> Tensor:
        """P ∂δω l v (n, d)."""
        return self.point.geometry.project(self.products.dw(v))

    def k(self, alpha: Tensor) -> Tensor:
        """P (Δ - ∂δδ) P α + (I - P) α (n, d)."""
        geometry = self.point.geometry
        free = geometry.project(alpha)
        inner = geometry.shift * free - self.products.dd(free)
        return geometry.project(inner) + (alpha - free)
