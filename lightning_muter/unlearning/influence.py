"""Adversarial influence: the direction in which ω moves as a point's weight grows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_muter.linalg.cholesky import direct
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models.base import measuring

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
        Influences (m, p), float64. Source: the paper, Definition 2.
    """
    derivatives = memory.settings.derivatives(module)
    recipe = memory.settings.recipe()
    with measuring(module), derivatives.at(memory.omega_star):
        gradients = torch.cat(
            [
                derivatives.gradients(point.inputs, point.targets)
                for point in recipe.points(derivatives, batch[0], batch[1])
            ]
        )
    matrix = memory.matrix + memory.settings.damping * torch.eye(
        memory.p, dtype=torch.float64, device=memory.matrix.device
    )
    n = len(memory.remaining)
    return torch.stack([-n * direct(matrix, g.to(matrix.device)).value for g in gradients])


def influence_on_losses(
    memory: UnlearningMemory,
    module: nn.Module,
    train_batch: Sequence[Tensor],
    test_batch: Sequence[Tensor],
) -> Tensor:
    """First-order change (m, t) of the robust test losses when each training point is removed."""
    derivatives = memory.settings.derivatives(module)
    recipe = memory.settings.recipe()
    influence = adversarial_influence(memory, module, train_batch)
    with measuring(module), derivatives.at(memory.omega_star):
        gradients = torch.cat(
            [
                derivatives.gradients(point.inputs, point.targets)
                for point in recipe.points(derivatives, test_batch[0], test_batch[1])
            ]
        )
    return -influence @ gradients.to(influence).T / len(memory.remaining)
