"""`Trainer`: pytorch_lightning's, with the verb ``unlearn``."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Subset

from lightning_muter.errors import ConfigurationError, RemovalError, StateError
from lightning_muter.lightning.callback import MUterCallback, reducer
from lightning_muter.lightning.data import RemovalDataModule, TrainingPoints, training_points
from lightning_muter.lightning.module import UnlearningModule
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.unlearning.corrector import Bound, correct, strong_convexity_bound
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.objective import Evaluation, RobustObjective
from lightning_muter.unlearning.result import UnlearningResult

__all__ = ["Trainer", "unlearn"]

_WORST = ("max_iterations", "indefinite", "minimum_norm", "converged")


class Trainer(pl.Trainer):
    """``pytorch_lightning.Trainer`` that can also forget training points."""

    def unlearn(
        self,
        datamodule: pl.LightningDataModule | DataLoader[Any],
        model: pl.LightningModule | None = None,
        memory: UnlearningMemory | str | os.PathLike[str] | None = None,
        noise_std: float = 0.0,
        corrector_steps: int = 0,
        bound: bool = False,
    ) -> UnlearningResult:
        """Forget the points of ``datamodule``; the model carries ω^u afterwards.

        Args:
            datamodule: a `RemovalDataModule`, or any datamodule or loader whose batches are
                (input, target[, index]); without an index points are found by their content.
            model: the trained module; the one of the last fit by default.
            memory: an `UnlearningMemory` or its folder; the callback's by default.
            noise_std: σ of Gaussian noise added to ω^u.
            corrector_steps: Newton steps on the remaining data afterwards (a pass each).
            bound: report ‖∇F_{-S}(ω^u)‖ / (λ(n-m)), which bounds the distance to a Retrain at
                its optimum for a linear head, λ > 0 and the exact inner maximum (a pass).

        Returns:
            The numbers of the requests.

        Raises:
            StateError: before fit, or a model that is not the memory's.
            RemovalError: points that cannot be forgotten; nothing was changed.
        """
        return unlearn(self, datamodule, model, memory, noise_std, corrector_steps, bound)


def unlearn(
    trainer: pl.Trainer,
    datamodule: pl.LightningDataModule | DataLoader[Any],
    model: pl.LightningModule | None = None,
    memory: UnlearningMemory | str | os.PathLike[str] | None = None,
    noise_std: float = 0.0,
    corrector_steps: int = 0,
    bound: bool = False,
) -> UnlearningResult:
    """`Trainer.unlearn` for any trainer; a trainer with a `MUterCallback` has it as a method."""
    if noise_std < 0:
        raise ConfigurationError(f"noise_std={noise_std} must be >= 0")
    callback = next((c for c in _callbacks(trainer) if isinstance(c, MUterCallback)), None)
    model = model if model is not None else trainer.lightning_module
    if isinstance(model, UnlearningModule):
        model = model.model
    state, folder = _memory(memory, callback)
    if model is None:
        raise StateError("there is no model to unlearn in: fit first, or give model=...")
    model.cpu()
    derivatives = state.settings.derivatives(model)
    state.check_model(derivatives)
    if isinstance(datamodule, RemovalDataModule):
        _check_points(state, datamodule)
    elif corrector_steps or bound:
        raise ConfigurationError("corrector_steps and bound need a RemovalDataModule")
    if corrector_steps and state.settings.horizon is not None:
        raise ConfigurationError(
            f"corrector_steps={corrector_steps} with horizon={state.settings.horizon}: they lead "
            "to the optimum, where a Retrain that stops early does not go; give one of the two"
        )
    before = derivatives.get()
    if not METHODS[state.settings.method].has_memory:
        return _without_memory(trainer, callback, datamodule, model, state)
    server = UnlearningModule(model, state, callback if memory is None else None, folder, noise_std)
    start = time.perf_counter()
    try:
        if isinstance(datamodule, pl.LightningDataModule):
            trainer.predict(server, datamodule=datamodule, return_predictions=False)
        else:
            trainer.predict(server, dataloaders=datamodule, return_predictions=False)
        if not server.outcomes:
            raise RemovalError("the removal data had no batch: name at least one point to forget")
        after = Bound(None, "no certificate")
        if isinstance(datamodule, RemovalDataModule) and (corrector_steps or bound):
            evaluation = _finish(server, datamodule.training_points(), corrector_steps)
            after = strong_convexity_bound(server.memory, evaluation) if bound else after
    finally:
        model.trainer = trainer
    result = _result(server, before, time.perf_counter() - start, after)
    _log(trainer, result, len(server.memory.ledger))
    return result


def _check_points(state: UnlearningMemory, datamodule: RemovalDataModule) -> None:
    """Refuse the whole call before its first request changes anything."""
    state.check_indices(datamodule.indices)
    points = datamodule.training_points()
    if len(points) != state.n:
        raise RemovalError(
            f"the data set has {len(points)} points, the memory was built on {state.n}"
        )
    for first in range(0, len(datamodule.indices), 512):
        indices = datamodule.indices[first : first + 512]
        state.check_content(indices, *points.batch(indices))


def _log(trainer: pl.Trainer, result: UnlearningResult, step: int) -> None:
    metrics = {
        "unlearn/points": float(len(result.indices)),
        "unlearn/update_norm": result.update_norm,
        "unlearn/residual": result.residual,
        "unlearn/stationary": result.stationary,
        "unlearn/active": result.active,
        "unlearn/seconds": result.seconds["total"],
    }
    if result.bound is not None:
        metrics["unlearn/bound"] = result.bound
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)
        logger.save()


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return list(getattr(trainer, "callbacks", []))


def _memory(
    memory: UnlearningMemory | str | os.PathLike[str] | None, callback: MUterCallback | None
) -> tuple[UnlearningMemory, str | None]:
    if isinstance(memory, UnlearningMemory):
        return memory, None
    if memory is not None:
        settings = callback.settings if callback is not None else None
        return UnlearningMemory.load(memory, settings), os.fspath(memory)
    if callback is None or callback.memory is None:
        raise StateError(
            "there is no memory yet: fit with a MUterCallback first, or give memory='its folder'"
        )
    return callback.memory, callback.memory_dir


def _result(
    server: UnlearningModule, before: torch.Tensor, total: float, after: Bound
) -> UnlearningResult:
    outcomes = server.outcomes
    known = len(server.memory.ledger) - len(outcomes)
    indices = [i for entry in server.memory.ledger[known:] for i in entry["indices"]]
    counts = torch.stack([o.contribution.counts.cpu() for o in outcomes]).sum(dim=0).tolist()
    statuses = {o.solution.status for o in outcomes}
    return UnlearningResult(
        method=server.memory.settings.method,
        indices=tuple(indices),
        requests=len(outcomes),
        update_norm=float(torch.linalg.vector_norm(server.memory.omega.cpu() - before.cpu())),
        residual=max(o.solution.residual for o in outcomes),
        iterations=sum(o.solution.iterations for o in outcomes),
        status=next(s for s in _WORST if s in statuses),
        stationary=counts[1] / counts[0],
        active=counts[2] / counts[0],
        seconds={
            "maximise_and_solve": sum(o.seconds for o in outcomes),
            "write": server.write_seconds,
            "total": total,
        },
        bound=after.value,
        certificate=after.certificate,
    )


def _finish(server: UnlearningModule, points: TrainingPoints, corrector_steps: int) -> Evaluation:
    """Corrector steps over the remaining points, and where they end."""
    state, trainer = server.memory, server.trainer
    derivatives = state.settings.derivatives(server.model)
    device = derivatives.parameters[0].device
    mine = state.remaining[trainer.global_rank :: trainer.world_size]
    objective = RobustObjective(
        derivatives,
        state.settings.recipe(),
        lambda: points.batches(mine, 512, device, derivatives.dtype),
        reducer(trainer),
    )
    if not corrector_steps:
        return objective.gradient()
    corrected, evaluation = correct(state, objective, corrector_steps)
    server.keep(corrected)
    return evaluation


def _without_memory(
    trainer: pl.Trainer,
    callback: MUterCallback | None,
    datamodule: Any,
    model: pl.LightningModule,
    state: UnlearningMemory,
) -> UnlearningResult:
    """The rows "none" and "retrain": nothing, or training again without the points."""
    if not isinstance(datamodule, RemovalDataModule) or callback is None:
        raise ConfigurationError(
            f"method={state.settings.method!r} needs a RemovalDataModule and the trainer's own "
            "MUterCallback"
        )
    start = time.perf_counter()
    derivatives = state.settings.derivatives(model)
    before = derivatives.get()
    indices = list(datamodule.indices)
    if state.settings.method == "retrain":
        gone = set(indices)
        keep = [i for i in state.remaining if i not in gone]
        _retrain(trainer, callback, datamodule, model, keep)
    omega = derivatives.get()
    empty = torch.zeros(0, 0, dtype=torch.float64)
    entry = {"m": len(indices), "status": state.settings.method}
    callback.memory = state.forget(indices, empty, torch.zeros_like(omega), omega, entry)
    callback.save()
    return UnlearningResult(
        method=state.settings.method,
        indices=tuple(indices),
        requests=1,
        update_norm=float(torch.linalg.vector_norm(omega - before)),
        residual=0.0,
        iterations=0,
        status="converged",
        stationary=1.0,
        active=0.0,
        seconds={"total": time.perf_counter() - start},
    )


def _retrain(
    trainer: pl.Trainer,
    callback: MUterCallback,
    datamodule: RemovalDataModule,
    model: pl.LightningModule,
    keep: list[int],
) -> None:
    """Train again from the same initial ω on the points of ``keep``, with the same callback."""
    points = training_points(datamodule.source)
    again = copy.copy(callback)
    again.memory, again.memory_dir = None, None
    if callback.initial is None:
        raise StateError("the callback has not seen a fit: there is no initial ω to retrain from")
    callback.settings.derivatives(model).set(callback.initial)
    loader = trainer.train_dataloader
    fresh = pl.Trainer(
        max_epochs=trainer.max_epochs,
        accelerator="cpu",
        precision=trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=trainer.progress_bar_callback is not None,
        enable_model_summary=False,
        callbacks=[again],
    )
    batch_size = getattr(loader, "batch_size", None) or callback.batch_size
    fresh.fit(
        model,
        DataLoader(
            Subset(points.dataset, keep),
            batch_size=batch_size,
            shuffle=True,
            collate_fn=points.collate,
        ),
    )
