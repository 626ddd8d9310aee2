"""`rebase`: the verb that makes forgetting final, for any trainer."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_muter.arguments import whole
from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.borrowed import RandomState, borrowed
from lightning_muter.lightning.commit import Destination
from lightning_muter.lightning.data import training_points
from lightning_muter.lightning.flavour import pl, rank_zero_info
from lightning_muter.lightning.keeper import keeper_of
from lightning_muter.lightning.process_group import process_group
from lightning_muter.lightning.progress import bar_of
from lightning_muter.lightning.remaining import RemainingPoints, places_of
from lightning_muter.lightning.unlearn import current_memory, module_of
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import ModelView
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.rebase import Rebased
from lightning_muter.unlearning.rebase import rebase as rebased
from lightning_muter.unlearning.result import RebaseResult

__all__ = ["rebase"]


def rebase(
    trainer: pl.Trainer,
    datamodule: pl.LightningDataModule | Dataset[Any],
    model: pl.LightningModule | None = None,
    memory: str | os.PathLike[str] | None = None,
    newton_steps: int = 10,
) -> RebaseResult:
    """`Trainer.rebase` for any trainer."""
    if isinstance(memory, UnlearningMemory):
        raise ConfigurationError(
            "memory=UnlearningMemory(...) has no place where the rebased one could go: give its "
            "folder, or none for the memory of the trainer's own callback"
        )
    newton_steps = whole("newton_steps", newton_steps)
    start, keeper = time.perf_counter(), keeper_of(trainer)
    module = module_of(trainer, model)
    destination = Destination.of(memory, keeper, process_group(trainer))
    group = destination.group
    with destination.writing():
        random_state = RandomState.now(group.device)
        with random_state.kept(), group.together():
            state = current_memory(destination, keeper, module)
            if not METHODS[state.settings.method].has_memory:
                raise ConfigurationError(
                    f"method={state.settings.method!r} keeps no curvature: there is nothing to "
                    "rebase"
                )
            view = state.settings.view(module)
            destination.check_model(state, view)
            points = training_points(datamodule, state.settings.batch)
            bar = bar_of(trainer)
            rest = RemainingPoints(state, points, places_of(state, points, bar), group, bar)
        with random_state.kept(), borrowed(view, group.device):
            found = _measured(state.to(group.device), view, rest, newton_steps)
        after = found.memory.to(state.omega_star.device)
        committed = destination.replace(after, view).memory
    result = RebaseResult(
        points=committed.n,
        gradient_before=found.before.residual,
        gradient=found.residual,
        gradient_of_training=found.level,
        newton_steps=found.steps,
        seconds=time.perf_counter() - start,
        openings=found.openings,
        warnings=committed.warnings,
    )
    rank_zero_info(str(result))
    return result


def _measured(
    state: UnlearningMemory, view: ModelView, rest: RemainingPoints, steps: int
) -> Rebased:
    """The new memory; the module is where it was."""
    before = view.get()
    try:
        with torch.inference_mode(False):
            return rebased(state, view, rest.numbered(view, os.urandom(16)), rest.group, steps)
    finally:
        view.set(before)
