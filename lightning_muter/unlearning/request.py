"""One request: δ* of the points to forget, Stage II, Stage III; without Lightning."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.linalg.cg import conjugate_gradients
from lightning_muter.linalg.cholesky import direct
from lightning_muter.linalg.minres import minres
from lightning_muter.linalg.solution import Solution
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import Derivatives
from lightning_muter.models.base import Products, measuring
from lightning_muter.threats import Geometry
from lightning_muter.unlearning.flow import retrace
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.recipe import Contribution, Point, Recipe

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
    points with ω^u = ω* + Δω (+ N(0, σ²I)). The methods without a downdate solve with M_r. With a
    horizon Δω is what a gradient flow of that length would have done otherwise without them.

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
        large = memory.p > _DIRECT_LIMIT and not settings.needs_direct
        if settings.solver == "schur" or (settings.solver == "auto" and large):
            mine_of_all = _Share(share, reduce)
            solution = _schur(memory, recipe, derivatives, x, targets, rhs, mine_of_all)
        else:
            matrix = remaining if method.downdate else memory.matrix
            if settings.damping > 0:
                matrix = matrix.clone()
                matrix.diagonal().add_(settings.damping)
            solution = _solve(memory, matrix, rhs)
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


def _solve(memory: UnlearningMemory, matrix: Tensor, rhs: Tensor) -> Solution:
    """Δω: the solution, or what the same training without the points would have done otherwise."""
    horizon = memory.settings.horizon
    if horizon is None:
        return direct(matrix, rhs)
    offset = memory.initial - memory.omega_star
    found = retrace(matrix, memory.residual_gradient - rhs, offset, horizon)
    return replace(found, value=found.value - memory.retraced)


@dataclass(frozen=True)
class _Share:
    """This process's slice of a request, and the sum over processes."""

    rows: slice
    reduce: Callable[[Tensor], Tensor]

    def before(self, m: int) -> int:
        """How many of m points belong to lower ranks, counted rank by rank."""
        step = self.rows.step or 1
        return sum(len(range(rank, m, step)) for rank in range(self.rows.start or 0))


def _schur(
    memory: UnlearningMemory,
    recipe: Recipe,
    derivatives: Derivatives,
    x: Tensor,
    targets: Tensor,
    rhs: Tensor,
    share: _Share,
) -> Solution:
    """Theorem 2's block system, matrix-free; each process applies the blocks of its own points.

    The vector is [Δω, Δα of all points], the same on every process.
    """
    method = METHODS[recipe.method]
    mine = (x[share.rows], targets[share.rows])
    points = list(recipe.points(derivatives, *mine)) if method.downdate else []
    if method.curvature == "total" and recipe.response.constrained:
        points = [_freeze_unusable(derivatives, recipe, point) for point in points]
    blocks = [_block(derivatives, recipe, point) for point in points]
    with_delta = method.curvature == "total"
    m, d, p = len(x) if method.downdate else 0, x[0].numel(), memory.p
    first = p + share.before(m) * d
    shift = memory.settings.damping - m * recipe.weight_decay
    length = p + m * d if with_delta else p

    def operator(vector: Tensor) -> Tensor:
        result, at = torch.zeros_like(vector), first
        for block in blocks:
            size = block.size if with_delta else 0
            top, bottom = block.apply(vector[:p], vector[at : at + size])
            result[:p] += top
            result[at : at + size] = bottom
            at += size
        result = share.reduce(result)
        result[:p] += memory.matrix @ vector[:p] + shift * vector[:p]
        return result

    inverse, at = rhs.new_zeros(length), first
    for block in blocks if with_delta else []:
        inverse[at : at + block.size] = block.inverse_diagonal()
        at += block.size
    inverse = share.reduce(inverse)
    inverse[:p] = memory.matrix.diagonal().clamp(min=1e-12).reciprocal()
    full = torch.cat([rhs, rhs.new_zeros(length - p)])
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
        point.inputs, point.targets, point.weights, point.geometry, recipe.response, ignore
    )
    return replace(point, geometry=point.geometry.freeze(~usable))


def _block(derivatives: Derivatives, recipe: Recipe, point: Point) -> _Block:
    curvature = METHODS[recipe.method].curvature
    if curvature == "fisher":
        return _FisherBlock(derivatives.gradients(point.inputs, point.targets))
    products = derivatives.products(point.inputs, point.targets)
    if curvature == "hessian":
        return _DirectBlock(products)
    return _TotalBlock(products, point.geometry)


class _Block(ABC):
    """The rows and columns of some points in the block system."""

    size: int = 0  # how many of the unknowns are Δα

    @abstractmethod
    def apply(self, v: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Products (p,) and (size,) with Δω and with the points' Δα."""

    def inverse_diagonal(self) -> Tensor:
        """A preconditioner (size,) of K."""
        return torch.ones(self.size, dtype=torch.float64)


class _FisherBlock(_Block):
    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients

    def apply(self, v: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return -(self.gradients.T @ (self.gradients @ v)), alpha


class _DirectBlock(_Block):
    def __init__(self, products: Products) -> None:
        self.products = products

    def apply(self, v: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return -self.products.ww(v), alpha


class _TotalBlock(_Block):
    """[-∂ωω, ∂ωδ P; P ∂δω, P K P + (I - P)]."""

    def __init__(self, products: Products, geometry: Geometry) -> None:
        self.products, self.geometry = products, geometry
        self.size = geometry.free.numel()

    def apply(self, v: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        geometry, products = self.geometry, self.products
        alpha = alpha.reshape(geometry.free.shape)
        free = geometry.project(alpha)
        top = products.wd(free) - products.ww(v)
        inner = geometry.shift * free - products.dd(free) + products.dw(v)
        return top, (geometry.project(inner) + (alpha - free)).reshape(-1)

    def inverse_diagonal(self) -> Tensor:
        shift = torch.where(self.geometry.free > 0, self.geometry.shift, 1.0)
        return torch.where(shift > 0, 1 / shift.clamp(min=1e-300), 1.0).reshape(-1)
