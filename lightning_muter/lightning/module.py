"""`UnlearningModule`: a removal batch of a predict loop is a request."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_muter.errors import RemovalError
from lightning_muter.lightning.callback import MUterCallback, process_group
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import ModelView
from lightning_muter.unlearning.request import Outcome, forget

__all__ = ["UnlearningModule"]


class UnlearningModule(pl.LightningModule):
    """Serves removal batches (input, target[, index]): Stage II, Stage III, the write, the model.

    Args:
        model: the user's module; it carries ω^u after each request.
        memory: the memory to start from.
        callback: the callback that keeps the memory, or None for one read from a folder.
        noise_std: σ of Gaussian noise on ω^u.
    """

    def __init__(
        self,
        model: pl.LightningModule,
        memory: UnlearningMemory,
        callback: MUterCallback | None = None,
        memory_dir: str | None = None,
        noise_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.memory = memory
        self.outcomes: list[Outcome] = []
        self.write_seconds = 0.0
        self._callback, self._memory_dir, self._noise_std = callback, memory_dir, noise_std

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, float]:
        """One request; returns its residual and update norm."""
        if not isinstance(batch, (list, tuple)) or len(batch) < 2:
            raise RemovalError(
                f"a removal batch is a {type(batch).__name__}; expected (input, target[, index])"
            )
        with torch.inference_mode(False):
            x, targets = batch[0].clone(), batch[1].clone()
            memory = self.memory.to(x.device)
            indices = [int(i) for i in batch[2]] if len(batch) > 2 else memory.find(x, targets)
            memory.check_indices(indices)
            memory.check_content(indices, x, targets)
            view = memory.settings.view(self.model)
            memory.check_model(view)
            outcome = self._request(memory, view, indices, x, targets)
            self._commit(outcome, view)
        change = torch.linalg.vector_norm(outcome.memory.omega - memory.omega)
        return {"residual": outcome.solution.residual, "update_norm": float(change)}

    def _request(
        self,
        memory: UnlearningMemory,
        view: ModelView,
        indices: list[int],
        x: Tensor,
        targets: Tensor,
    ) -> Outcome:
        trainer = self.trainer
        outcome = forget(memory, view, indices, x, targets, self._noise_std, process_group(trainer))
        if self._noise_std > 0 and trainer.world_size > 1:
            omega = trainer.strategy.broadcast(outcome.memory.omega)
            outcome = replace(outcome, memory=replace(outcome.memory, omega=omega))
        return outcome

    def _commit(self, outcome: Outcome, view: ModelView) -> None:
        """Write first, then the memory in hand, then the model: a failed write changes nothing."""
        self.keep(outcome.memory)
        view.set(outcome.memory.omega)
        self.outcomes.append(outcome)

    def keep(self, memory: UnlearningMemory) -> None:
        """Make a memory the current one: on disk first, then in this process."""
        start = time.perf_counter()
        if self._memory_dir is not None and self.trainer.is_global_zero:
            memory.save(self._memory_dir)
        self.write_seconds += time.perf_counter() - start
        self.memory = memory
        if self._callback is not None:
            self._callback.memory = memory
