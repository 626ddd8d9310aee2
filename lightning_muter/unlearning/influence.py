"""Adversarial influence: what a training point's weight does to ω, and to robust test losses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_muter.arguments import integer
from lightning_muter.curvature.rows import RowsSolver
from lightning_muter.errors import ConfigurationError, SolverError, StateError
from lightning_muter.linalg.cholesky import DenseSolver
from lightning_muter.linalg.solution import Status
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import measuring
from lightning_muter.unlearning.diagnosis import influence_warnings
from lightning_muter.unlearning.early_influence import Way
from lightning_muter.unlearning.points import checked

__all__ = ["TopInfluences", "adversarial_influence", "influence_on_losses", "top_influences"]

_BLOCK = 512
#: points from which on a bar says how far it is
_MANY = 4 * _BLOCK
#: systems of rows that share the passes over them
_TOGETHER = 16
_GOOD = (Status.CONVERGED, Status.MINIMUM_NORM)


def adversarial_influence(
    memory: UnlearningMemory, module: nn.Module, batch: Sequence[Tensor]
) -> Tensor:
    """I(x, y) = -[(1/n) Σ D_i]^{-1} ∇_ω l(ω*, x + δ*) of each point of a batch.

    ω moves along I as the point's weight grows; removing a training point moves ω by -I/n to
    first order (its own λω* left aside). Of a memory with a horizon ω is where a training of that
    length ends (ours, docs/theory.md).

    Args:
        memory: the memory at ω*; n is the number of points still in it.
        module: the model; measured at ω* and left as it was.
        batch: x (m, ...), targets (m,), and what else forward takes, as training has them.

    Returns:
        Influences (m, p), float64, on the memory's device. Source: the paper, Definition 2.

    Raises:
        ConfigurationError: points that are none, targets that the loss has no meaning for, or a
            memory with a horizon and no matrix.
        StateError: the memory keeps no curvature, or the model is not the memory's.
        SolverError: its system has no solution that means anything, as an indefinite one.
    """
    n, way = len(memory.remaining), Way.of(memory)
    if way is None:
        return -n * _solved(memory, _gradients(memory, module, batch))
    blocks = _along(memory, module, batch, way)
    return -n * torch.cat([way.ended(pulls) + way.lengthening for pulls in blocks])


def influence_on_losses(
    memory: UnlearningMemory,
    module: nn.Module,
    train_batch: Sequence[Tensor],
    test_batch: Sequence[Tensor],
) -> Tensor:
    """First-order change (m, t) of each robust test loss when one training point is removed.

    ∇l_testᵀ M⁻¹ (∇l_train + λω*): positive where the training point kept the test point's loss
    low. The losses are of single points, neither summed nor divided by n, at perturbations that
    move with ω. Of a memory with a horizon the change is that of a training as long without the
    point (ours, docs/theory.md).

    Args:
        memory: the memory at ω*.
        module: the model; measured at ω* and left as it was.
        train_batch: x (m, ...) and targets (m,) of training points, of weight 1.
        test_batch: x (t, ...) and targets (t,) of any points.

    Returns:
        float64, on the memory's device. Source: the paper, Definition 2, with the training
        point's own share of the weight decay.

    Raises:
        ConfigurationError: points that are none, or targets that the loss has no meaning for.
        StateError: the memory keeps no curvature, or the model is not the memory's.
        SolverError: its system has no solution that means anything, as an indefinite one.
    """
    way, decay = Way.of(memory), memory.settings.weight_decay
    test = _gradients(memory, module, test_batch)
    if way is None:
        train = _gradients(memory, module, train_batch) + decay * memory.omega_star
        return train @ _solved(memory, test).T
    seen = torch.stack([way.seen_from_the_end(u) for u in test], dim=1)
    own = decay * torch.cat([memory.omega_star.unsqueeze(0), way.directions])
    every = torch.einsum("qtp,qp->t", seen, own) + test @ way.lengthening
    blocks = _along(memory, module, train_batch, way)
    return torch.cat(
        [sum(f @ u.T for f, u in zip(pulls, seen, strict=True)) + every for pulls in blocks]
    )


@dataclass(frozen=True)
class TopInfluences:
    """The training points that mattered most to one test point.

    Attributes:
        robust: positions, in the batch that was given, of those whose removal would raise its
            robust loss most.
        gains: by how much, one each, to first order.
        fragile: positions of those whose removal would lower it most.
        losses: by how much (negative), one each.
    """

    robust: tuple[int, ...]
    gains: tuple[float, ...]
    fragile: tuple[int, ...]
    losses: tuple[float, ...]


def top_influences(
    memory: UnlearningMemory,
    module: nn.Module,
    train_batch: Sequence[Tensor],
    test_point: Sequence[Tensor],
    count: int = 5,
) -> TopInfluences:
    """Which training points made a test point robust, and which made it fragile.

    The largest and the smallest numbers of `influence_on_losses`, whose source is this function's.

    Args:
        memory: the memory at ω*.
        module: the model; measured at ω* and left as it was.
        train_batch: x (m, ...) and targets (m,) of training points.
        test_point: x (1, ...) and target (1,).
        count: how many of each, at the most; only points of that sign are named.

    Raises:
        ConfigurationError: not one test point, no number of points, or as in
            `influence_on_losses`.
        StateError: the memory keeps no curvature, or the model is not the memory's.
        SolverError: its system has no solution that means anything.
    """
    if len(test_point[0]) != 1 or (integer(count) or 0) < 1:
        raise ConfigurationError(
            f"{len(test_point[0])} test points and count={count!r}: give one point, x (1, ...) "
            "and target (1,), and a count of at least 1"
        )
    change = influence_on_losses(memory, module, train_batch, test_point).squeeze(1)
    order = change.argsort(descending=True)
    first, last = order[:count], order.flip(0)[:count]
    robust, fragile = first[change[first] > 0], last[change[last] < 0]
    return TopInfluences(
        tuple(robust.tolist()),
        tuple(change[robust].tolist()),
        tuple(fragile.tolist()),
        tuple(change[fragile].tolist()),
    )


def _gradients(memory: UnlearningMemory, module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """∇_ω l(ω*, x + δ*) (m, p) of each point."""
    return torch.cat([one for (one,) in _measured(memory, module, batch, [memory.omega_star])])


def _along(
    memory: UnlearningMemory, module: nn.Module, batch: Sequence[Tensor], way: Way
) -> Iterator[list[Tensor]]:
    """∇_ω l (m, p) and each D b_r (m, p), of some points at a time.

    D b is the difference of two gradients, each at its own δ*.
    """
    omega, view = memory.omega_star, memory.settings.view(module)
    reach = max(float(torch.linalg.vector_norm(v)) for v in (omega, *way.offsets))
    size = reach * torch.finfo(view.dtype).eps ** 0.25
    steps = size * way.directions
    at = [omega, *chain.from_iterable((omega + step, omega - step) for step in steps)]
    for first, *pairs in _measured(memory, module, batch, at):
        yield [first, *((a - b) / (2 * size) for a, b in zip(pairs[::2], pairs[1::2], strict=True))]


def _measured(
    memory: UnlearningMemory, module: nn.Module, batch: Sequence[Tensor], at: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """∇_ω l(ω, x + δ*) (m, p) at each of some ω, of some points at a time."""
    view, problem = memory.settings.view(module), memory.settings.problem()
    memory.check_architecture(view)
    points = checked(view, *memory.settings.batch.read(batch))
    starts, stationary = range(0, len(points), _BLOCK), len(points)
    for k in tqdm(starts, "maximisers", leave=False, disable=len(points) < _MANY):
        some, found = points.part(slice(k, k + _BLOCK)), []
        for omega in at:
            with measuring(module), view.at(omega):
                chunks = [
                    (c.linearisation.gradients(), c.inner) for c in problem.chunks(view, some)
                ]
            found.append(torch.cat([gradients for gradients, _ in chunks]).to(omega))
            if omega is memory.omega_star:
                lost = [~inner.stationary for _, inner in chunks if inner is not None]
                stationary -= sum(int(one.sum()) for one in lost)
        yield found
    for sentence in influence_warnings(memory.warnings, stationary / len(points)):
        warnings.warn(sentence, stacklevel=4)


def _solved(memory: UnlearningMemory, rows: Tensor) -> Tensor:
    """M⁻¹ g (m, p) for rows g (m, p): all at once where M has one factor."""
    if memory.curvature is None:
        raise StateError(
            f"a memory of method={memory.settings.method!r} keeps no curvature: influence needs "
            "one of a method that does, as 'muter'"
        )
    solver = memory.curvature.damped(memory.settings.damping).solver()
    if isinstance(solver, DenseSolver) and solver.definite:
        return solver.solve_columns(rows.T).T
    parts = torch.split(rows, _TOGETHER) if isinstance(solver, RowsSolver) else rows
    quiet = len(rows) < _MANY
    solutions = [solver.solve(part) for part in tqdm(parts, "systems", leave=False, disable=quiet)]
    worst = Status.worst([one.status for one in solutions])
    if worst not in _GOOD:
        raise SolverError(
            f"the memory's system ended {worst}: no influence can be read off it; {worst.remedy}"
        )
    return torch.cat([one.value.reshape(-1, rows.shape[1]) for one in solutions])
