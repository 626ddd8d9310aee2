"""Requests that are hard on purpose: the points whose removal a single step gets wrong most.

Source: the idea of adversarially chosen requests (Huang et al., Unlearn and burn: adversarial
machine unlearning requests destroy model accuracy, 2024), with influence in the place of their
optimisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.unlearning.influence import adversarial_influence, influence_on_losses

__all__ = ["hardest", "self_influence"]

_BLOCK = 1024


def self_influence(memory: UnlearningMemory, module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """How much each point's own robust loss rises when it is removed (m,), to first order.

    Args:
        memory: the memory at ω*.
        module: the model.
        batch: x (m, ...) and targets (m,) of training points.
    """
    parts = zip(*(torch.split(tensor, _BLOCK) for tensor in batch[:2]), strict=True)
    return torch.cat([influence_on_losses(memory, module, one, one).diagonal() for one in parts])


def hardest(
    memory: UnlearningMemory, module: nn.Module, batch: Sequence[Tensor], count: int
) -> Tensor:
    """Positions (count,) of the points that pull ω farthest in one common direction.

    A quadratic model is wrong by the square of the way, so that points are taken whose removals
    move ω the way of the strongest single one.

    Args:
        memory: the memory at ω*.
        module: the model.
        batch: x (m, ...) and targets (m,) of training points.
        count: how many, from 1 to m.

    Raises:
        ConfigurationError: another count.
    """
    m = len(batch[0])
    if not 1 <= count <= m:
        raise ConfigurationError(f"count={count} of {m} points: take from 1 to all of them")
    moves = -adversarial_influence(memory, module, batch)
    strongest = moves[moves.norm(dim=1).argmax()]
    along: Tensor = moves @ (strongest / strongest.norm())
    return along.argsort(descending=True)[:count]
