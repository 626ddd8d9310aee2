"""The comparison's rows "none" and "retrain" as requests: nothing, or training again."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.errors import ConfigurationError, StateError
from lightning_muter.lightning.commit import Destination
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.flavour import pl
from lightning_muter.lightning.keeper import MemoryKeeper
from lightning_muter.lightning.removals import Asked
from lightning_muter.linalg.solution import Status
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import ModelView
from lightning_muter.unlearning.result import UnlearningResult

__all__ = ["serve_without_memory"]


def serve_without_memory(
    trainer: pl.Trainer,
    keeper: MemoryKeeper | None,
    asked: Asked,
    view: ModelView,
    memory: UnlearningMemory,
    destination: Destination,
) -> UnlearningResult:
    """Serve a request with a method that keeps no curvature; a failure changes nothing.

    Raises:
        ConfigurationError: it needs a RemovalDataModule and the trainer's own callback.
    """
    method = memory.settings.method
    if asked.points is None or keeper is None:
        raise ConfigurationError(
            f"method={method!r} needs a RemovalDataModule and the MUterCallback that saw the fit: "
            "unlearn in the process that trained, or build the memory with method='muter'"
        )
    start = time.perf_counter()
    module = view.module
    before, state = view.get(), copy.deepcopy(module.state_dict())
    indices = list(asked.indices)
    if not indices:
        view.set(memory.omega)
        spent = time.perf_counter() - start
        return UnlearningResult.unchanged(method, asked.already, memory.warnings, spent)
    try:
        if method == "retrain" and asked.places is not None:
            rows = asked.places[memory.without(indices).remaining].tolist()
            rest = Subset(asked.points.dataset, rows)
            weights = memory.weights[memory.without(indices).remaining]
            _retrain(trainer, keeper, _loader(trainer, keeper, rest, weights, asked.points), view)
        omega = view.get()
        entry = {"m": len(indices), "status": method}
        nothing = torch.zeros_like(memory.omega)
        after = memory.forget(indices, None, RemovedPoints(), nothing, omega, entry)
        committed = destination.commit(after, view)
    except BaseException:
        module.load_state_dict(state)
        raise
    return UnlearningResult(
        method=method,
        indices=tuple(indices),
        requests=1,
        update_norm=float(torch.linalg.vector_norm(omega - before)),
        residual=0.0,
        iterations=0,
        status=Status.DOUBTFUL if memory.warnings else Status.CONVERGED,
        stationary=1.0,
        active=0.0,
        seconds={"write": committed.seconds, "total": time.perf_counter() - start},
        warnings=memory.warnings,
        already=asked.already,
    )


def _loader(
    trainer: pl.Trainer,
    keeper: MemoryKeeper,
    rest: Subset[Any],
    weights: Tensor,
    points: TrainingPoints,
) -> DataLoader[Any]:
    """The remaining points, in batches as large and drawn by the same weights as training's."""
    of_training = trainer.train_dataloader
    batch_size = getattr(of_training, "batch_size", None) or keeper.batch_size
    even = bool((weights == weights[0]).all())
    sampler = None if even else WeightedRandomSampler(weights.tolist(), len(rest))
    return DataLoader(
        rest,
        batch_size=batch_size,
        shuffle=even,
        sampler=sampler,
        drop_last=bool(getattr(of_training, "drop_last", False)),
        collate_fn=points.collate,
    )


def _retrain(
    trainer: pl.Trainer,
    keeper: MemoryKeeper,
    loader: DataLoader[Any],
    view: ModelView,
) -> None:
    """Train again from the same initial ω on the remaining points, with the same callback.

    Length, accumulation and clipping are the trainer's; its other callbacks have no part in it.
    """
    module = view.module
    if not isinstance(module, pl.LightningModule):
        raise ConfigurationError(f"a {type(module).__name__} cannot be trained again")
    if keeper.initial is None:
        raise StateError(
            "the callback has not seen a fit: there is no initial ω to retrain from; unlearn in "
            "the process that trained, or build the memory with method='muter'"
        )
    again = copy.copy(keeper)
    again.memory, again.memory_dir, again.ids = None, None, None
    view.set(keeper.initial)
    fresh = pl.Trainer(
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        limit_train_batches=trainer.limit_train_batches,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        accelerator="cpu",
        precision=trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=trainer.progress_bar_callback is not None,
        enable_model_summary=False,
        callbacks=[again],
    )
    attached = module._trainer  # the public property raises where there is none
    modes = [(one, one.training) for one in module.modules()]
    try:
        fresh.fit(module, loader)
    finally:
        module.trainer = attached
        for one, mode in modes:
            one.training = mode
