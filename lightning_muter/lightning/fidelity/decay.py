"""The weight decay λ of the parameters that are trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_muter.errors import ConfigurationError
from lightning_muter.models import ModelView

__all__ = ["check_held", "decay_and_penalty", "decay_of"]


def decay_and_penalty(
    optimizers: list[Optimizer],
    view: ModelView,
    loader: DataLoader[Any],
    declared: float | None,
    newton_steps: int,
) -> tuple[float, float]:
    """λ of the objective, and the part of it that is an L2 penalty of the loss's own.

    Newton's steps end at the optimum of a declared λ, whatever training had.

    Raises:
        ConfigurationError: the weight decay is none of one objective's.
    """
    parameters = view.parameters
    summed = _points_of_a_sum(optimizers, parameters, loader) if view.loss.summed else 1
    decay = decay_of(optimizers, parameters, declared, newton_steps, summed)
    own = 0.0 if newton_steps else _declared_penalty(optimizers, parameters, declared, summed)
    return decay, own


def _decays(optimizers: Iterable[Optimizer], parameters: list[nn.Parameter]) -> set[float]:
    wanted = {id(p) for p in parameters}
    return {
        float(group.get("weight_decay", 0.0))
        for optimizer in optimizers
        for group in optimizer.param_groups
        if any(id(p) in wanted for p in group["params"])
    }


def _points_of_a_sum(
    optimizers: list[Optimizer], parameters: list[nn.Parameter], loader: DataLoader[Any]
) -> int:
    """The points a batch, b, of a training whose loss is their sum.

    A step follows Σ_b l + (λ/2)‖ω‖², which is b times the mean with a decay of λ / b: that is one
    objective where every batch has b points, in a Retrain as well, or where λ is 0.

    Raises:
        ConfigurationError: the weight decay counts for another number of points in some batches.
    """
    size = loader.batch_size
    if not any(_decays(optimizers, parameters)):
        return size or 1  # nothing is divided by it
    if size is None or not loader.drop_last:
        raise ConfigurationError(
            "reduction='sum' with a weight decay: it counts once a batch, however many points that "
            "holds, so that batches of another size, or all points in one, solve another problem "
            "with fewer points; use reduction='mean', a weight decay of 0, or "
            "DataLoader(batch_size=..., drop_last=True), whose batches are alike"
        )
    return size


def _decouples(optimizers: Iterable[Optimizer], parameters: list[nn.Parameter]) -> bool:
    """Whether a step takes λω off beside its rule for the gradient, as AdamW does."""
    wanted = {id(p) for p in parameters}
    return any(
        isinstance(one, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
        for one in optimizers
        for group in one.param_groups
        if group.get("weight_decay") and any(id(p) in wanted for p in group["params"])
    )


def check_held(optimizers: list[Optimizer], view: ModelView, newton_steps: int) -> None:
    """Refuse trained parameters that no optimizer holds, unless Newton's steps move them.

    Raises:
        ConfigurationError: naming them.
    """
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    pairs = zip(view.names, view.parameters, strict=True)
    missing = [name for name, parameter in pairs if id(parameter) not in held]
    if missing and not newton_steps:
        raise ConfigurationError(
            f"no optimizer holds the parameters {missing}, which head= or parameters= says are "
            "trained: give them to it in configure_optimizers"
        )


def decay_of(
    optimizers: list[Optimizer],
    parameters: list[nn.Parameter],
    declared: float | None,
    newton_steps: int,
    summed: int = 1,
) -> float:
    """λ as declared, or else that of the optimizer's groups that hold the trained parameters.

    ``summed`` is how many points a loss sums, 1 for a mean: it takes as much of the optimizer's.

    Raises:
        ConfigurationError: the groups disagree, and nothing is declared.
    """
    if declared is not None:
        return declared
    decays = _decays(optimizers, parameters)
    if len(decays) > 1:
        raise ConfigurationError(
            f"the optimizer has weight decays {sorted(decays)} for the trained parameters: a "
            "memory has one λ; give them one weight decay, or say by weight_decay= which λ the "
            "objective has"
        )
    if _decouples(optimizers, parameters) and not newton_steps:
        warnings.warn(
            "decoupled weight decay, as AdamW's, is no L2 term of the objective: ω* is not the "
            "optimum the memory assumes; use newton_steps, or SGD or Adam without it",
            stacklevel=2,
        )
    return decays.pop() / summed if decays else 0.0


def _declared_penalty(
    optimizers: list[Optimizer],
    parameters: list[nn.Parameter],
    declared: float | None,
    summed: int = 1,
) -> float:
    """The part of a declared λ that no optimizer has: an L2 penalty of the loss's own, or 0."""
    decays = _decays(optimizers, parameters)
    if declared is None or len(decays) != 1:
        return 0.0
    if _decouples(optimizers, parameters):
        return 0.0  # its decay is none of the objective's
    rest = declared - decays.pop() / summed
    return rest if abs(rest) > 1e-9 * max(declared, 1e-9) else 0.0
