"""Adversarial influence: the direction in which ω moves as a point's weight grows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_muter.errors import StateError
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import measuring
from lightning_muter.unlearning.points import unweighted

__all__ = ["adversarial_influence", "influence_on_losses"]


def adversarial_influence(
    memory: UnlearningMemory, module: nn.Module, batch: Sequence[Tensor]
) -> Tensor:
    """I(x, y) = -[(1/n) Σ D_i]^{-1} ∇_ω l(ω*, x + δ*) of each point of a batch.

    ω moves along I as the point's weight grows; removing a training point moves ω by -I/n to
    first order (its own λω* left aside).

    Args:
        memory: the memory at ω*; n is the number of points still in it.
        module: the model; measured at ω* and left as it was.
        batch: x (m, ...) and targets (m,).

    Returns:
        Influences (m, p), float64, on the memory's device. Source: the paper, Definition 2.

    Raises:
        StateError: the memory's method keeps no curvature.
    """
    if memory.curvature is None:
        raise StateError(
            f"a memory of method={memory.settings.method!r} keeps no curvature: influence needs "
            "one of a method that does, as 'muter'"
        )
    solver = memory.curvature.damped(memory.settings.damping).solver()
    gradients = _gradients(memory, module, batch)
    n = len(memory.remaining)
    return torch.stack([-n * solver.solve(g.to(memory.omega_star)).value for g in gradients])


def _gradients(memory: UnlearningMemory, module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """∇_ω l(ω*, x + δ*) (m, p) of each point."""
    view, problem = memory.settings.view(module), memory.settings.problem()
    with measuring(module), view.at(memory.omega_star):
        chunks = problem.chunks(view, unweighted(batch[0], batch[1]))
        return torch.cat([chunk.linearisation.gradients() for chunk in chunks])


def influence_on_losses(
    memory: UnlearningMemory,
    module: nn.Module,
    train_batch: Sequence[Tensor],
    test_batch: Sequence[Tensor],
) -> Tensor:
    """First-order change (m, t) of the robust test losses when each training point is removed.

    Positive where the removal raises the loss: the training point had helped. The test points'
    perturbations are held still, as their gradients at a maximum allow.

    Args:
        memory: the memory at ω*.
        module: the model; measured at ω* and left as it was.
        train_batch: x (m, ...) and targets (m,) of training points.
        test_batch: x (t, ...) and targets (t,).

    Returns:
        Changes (m, t), float64: ∇l_testᵀ (-I/n). Source: the paper, Definition 2.

    Raises:
        StateError: the memory's method keeps no curvature.
    """
    influence = adversarial_influence(memory, module, train_batch)
    gradients = _gradients(memory, module, test_batch)
    return -influence @ gradients.to(influence).T / len(memory.remaining)
