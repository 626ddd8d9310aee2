"""The loss of a `training_step` beside a memory's, where no training runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.fidelity.difference import Comparison
from lightning_muter.lightning.flavour import pl
from lightning_muter.models import evaluating
from lightning_muter.spec import Settings

__all__ = ["check_own_loss"]

_SLACK, _VANISHED = 1e-2, 1e-6


def check_own_loss(
    module: pl.LightningModule,
    settings: Settings,
    batch: Any,
    context: Callable[[], AbstractContextManager[None]],
) -> bool:
    """Compare the gradients of ``training_step``'s loss and of the memory's on a batch.

    A copy of the module takes the step, in eval mode and without a trainer.

    Args:
        module: as it was trained.
        settings: of the memory, with the λ of training.
        batch: in the loader's shape, in the precision and on the device of training.
        context: the precision that training's forward runs in.

    Returns:
        Whether the step ran, so that there was something to compare.

    Raises:
        ConfigurationError: the two differ.
    """
    own = copy.deepcopy(module)
    view = settings.view(own)
    for parameter in view.parameters:
        parameter.requires_grad_(True)
    with evaluating(own), context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a log without a trainer
        found = _gradient(_step(own, batch), view.parameters)
        if found is None:
            return False
        x, targets, beside = settings.batch.read(batch)
        logits = view.beside(beside).logits
        mine = _gradient(view.loss(logits(x), targets).mean(), view.parameters)
    if mine is None:
        return False
    found = found / len(x) if view.loss.summed else found
    omega = tuple(p.detach().reshape(-1).double() for p in view.parameters)
    comparison = Comparison(found, mine, omega, len(x), _SLACK, _VANISHED)
    if not comparison.agrees() and not comparison.agrees(settings.weight_decay):
        raise ConfigurationError(comparison.explain())
    return True


def _step(module: pl.LightningModule, batch: Any) -> Any:
    """The loss of the module's step, or None where it needs a trainer around it."""
    try:
        found = module.training_step(batch, 0)
    except Exception:  # whatever a step of the user's wants of a trainer that is not there
        return None
    return found.get("loss") if isinstance(found, Mapping) else found


def _gradient(loss: Any, parameters: list[torch.nn.Parameter]) -> Tensor | None:
    if not isinstance(loss, Tensor) or not loss.requires_grad or loss.numel() != 1:
        return None
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    parts = [
        torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)
    ]
    flat = torch.cat([part.reshape(-1).double() for part in parts])
    return flat if bool(torch.isfinite(flat).all()) else None
