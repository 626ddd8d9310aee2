"""The weight decay λ of the parameters that are trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_muter.errors import ConfigurationError
from lightning_muter.models import ModelView

__all__ = ["check_held", "decay_of", "declared_penalty"]


def _decays(optimizers: Iterable[Optimizer], parameters: list[nn.Parameter]) -> set[float]:
    wanted = {id(p) for p in parameters}
    return {
        float(group.get("weight_decay", 0.0))
        for optimizer in optimizers
        for group in optimizer.param_groups
        if any(id(p) in wanted for p in group["params"])
    }


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
) -> float:
    """λ as declared, or else that of the optimizer's groups that hold the trained parameters.

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
    return decays.pop() if decays else 0.0


def declared_penalty(
    optimizers: list[Optimizer], parameters: list[nn.Parameter], declared: float | None
) -> float:
    """The part of a declared λ that no optimizer has: an L2 penalty of the loss's own, or 0."""
    decays = _decays(optimizers, parameters)
    if declared is None or len(decays) != 1:
        return 0.0
    if _decouples(optimizers, parameters):
        return 0.0  # its decay is none of the objective's
    rest = declared - decays.pop()
    return rest if abs(rest) > 1e-9 * max(declared, 1e-9) else 0.0
