"""Stage I for one method or several: one pass over the training points builds every memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.adversary.maximiser import InnerMaximum
from lightning_muter.errors import ConfigurationError
from lightning_muter.linalg.cg import conjugate_gradients
from lightning_muter.linalg.cholesky import direct
from lightning_muter.memory.fingerprint import fingerprint
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models.base import AddBlock, measuring
from lightning_muter.spec import Settings
from lightning_muter.threats import Threat
from lightning_muter.unlearning.flow import retrace
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.objective import Evaluation, evaluation_of
from lightning_muter.unlearning.recipe import Contribution

__all__ = ["build_memories", "summarise"]

_EIGEN_LIMIT = 2000


def build_memories(
    module: nn.Module,
    settings: Sequence[Settings],
    batches: Iterable[tuple[Tensor, Tensor]],
    digests: Tensor,
    key: bytes,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    initial: Tensor | None = None,
) -> list[UnlearningMemory]:
    """Memories of several methods at the module's ω* from one pass and one δ* a point.

    The settings must share loss, λ and trained parameters, and those of one threat share its δ*;
    each process passes its own batches and ``reduce`` sums over processes.

    Args:
        module: the trained module; left as it was.
        settings: one for each memory.
        batches: the training points, each once over all processes.
        digests: of all points (n, 16), in the order of their indices.
        key: of the digests.
        reduce: sums a tensor over processes.
        initial: the ω (p,) that training started from; needed by settings with a horizon.
    """
    providers = [s.derivatives(module) for s in settings]
    recipes = [s.recipe() for s in settings]
    p, device = providers[0].p, providers[0].parameters[0].device
    sizes = [p if METHODS[s.method].has_memory else 0 for s in settings]
    matrices = [torch.zeros(q, q, dtype=torch.float64, device=device) for q in sizes]
    totals = [Contribution.zero(p, device) for _ in settings]
    with measuring(module):
        for x, targets in batches:
            shared: dict[Threat, InnerMaximum] = {}
            for k, (derivatives, recipe) in enumerate(zip(providers, recipes, strict=True)):
                if recipe.threat not in shared and METHODS[recipe.method].points != "clean":
                    shared[recipe.threat] = recipe.perturb(derivatives, x, targets)
                inner = shared.get(recipe.threat)
                if matrices[k].numel():
                    add = _adder(matrices[k])
                    totals[k] += recipe.accumulate(derivatives, x, targets, add, inner)
                else:
                    totals[k] += recipe.gradient(derivatives, x, targets, inner)
    built = []
    omega = providers[0].get()
    for k, one in enumerate(settings):
        evaluation = evaluation_of(totals[k], omega, one.weight_decay, reduce)
        matrix = reduce(matrices[k]) if matrices[k].numel() else matrices[k]
        matrix.diagonal().add_(evaluation.points * one.weight_decay)
        memory = UnlearningMemory(
            settings=one,
            omega_star=omega,
            omega=omega,
            matrix=matrix,
            gradient=torch.zeros_like(omega),
            residual_gradient=evaluation.gradient,
            digests=digests,
            removed=torch.zeros(len(digests), dtype=torch.bool),
            key=key,
            fingerprint=fingerprint(module, providers[k].names),
            summary=summarise(evaluation, matrix, p),
        )
        built.append(_with_start(memory, initial))
    return built


def _with_start(memory: UnlearningMemory, initial: Tensor | None) -> UnlearningMemory:
    """The memory with what a Retrain that stops early needs, where its settings have a horizon."""
    horizon = memory.settings.horizon
    if horizon is None or not memory.matrix.numel():
        return memory
    if initial is None:
        raise ConfigurationError(f"horizon={horizon} needs the parameters that training started at")
    start, matrix = initial.to(memory.matrix), memory.matrix
    if memory.settings.damping > 0:
        matrix = matrix.clone()  # p x p is what is large: only where it must be
        matrix.diagonal().add_(memory.settings.damping)
    offset = start - memory.omega_star
    retraced = retrace(matrix, memory.residual_gradient, offset, horizon).value
    error = torch.linalg.vector_norm(offset + retraced) / torch.linalg.vector_norm(offset)
    summary = {**memory.summary, "horizon": horizon, "retrace_error": float(error)}
    return replace(memory, initial=start, retraced=retraced, summary=summary)


def _adder(matrix: Tensor) -> AddBlock:
    def add(i: int, j: int, block: Tensor) -> None:
        matrix[i : i + block.shape[0], j : j + block.shape[1]] += block

    return add


def summarise(evaluation: Evaluation, matrix: Tensor, p: int) -> dict[str, Any]:
    """What a person should know of a memory: sizes, residual, shares, extreme eigenvalues."""
    summary: dict[str, Any] = {
        "n": evaluation.points,
        "p": p,
        "objective": evaluation.value,
        "residual_gradient": evaluation.residual,
        "stationary": evaluation.stationary,
        "active": evaluation.active,
        "usable_response": evaluation.usable,
    }
    if matrix.numel():
        summary["smallest_eigenvalue"], summary["largest_eigenvalue"] = _extremes(matrix)
        if summary["smallest_eigenvalue"] > 0:
            newton_step = _solved(matrix, evaluation.gradient)
            summary["distance_to_optimum"] = float(torch.linalg.vector_norm(newton_step))
    return summary


def _solved(matrix: Tensor, rhs: Tensor) -> Tensor:
    """M⁻¹ times a vector: a number for people, so that a rough one does where M is large."""
    if len(matrix) <= _EIGEN_LIMIT:
        return direct(matrix, rhs).value
    inverse = matrix.diagonal().reciprocal()
    rough = conjugate_gradients(lambda v: matrix @ v, rhs, lambda v: inverse * v, 1e-3, 100)
    return rough.value


def _extremes(matrix: Tensor) -> tuple[float, float]:
    """Smallest and largest eigenvalue; beyond some size by LOBPCG."""
    if not bool(torch.isfinite(matrix).all()):
        return float("nan"), float("nan")
    if len(matrix) <= _EIGEN_LIMIT:
        values = torch.linalg.eigvalsh(matrix)
        return float(values[0]), float(values[-1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        low = torch.lobpcg(matrix, k=1, largest=False, niter=30)[0]
        high = torch.lobpcg(matrix, k=1, largest=True, niter=30)[0]
    return float(low[0]), float(high[0])
