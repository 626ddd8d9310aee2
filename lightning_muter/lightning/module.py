"""`UnlearningModule`: a removal batch of a predict loop is a request."""

from __future__ import annotations

from typing import Any

import torch

from lightning_muter.arguments import number
from lightning_muter.errors import StateError
from lightning_muter.lightning.commit import Destination
from lightning_muter.lightning.flavour import pl
from lightning_muter.lightning.keeper import MemoryKeeper
from lightning_muter.lightning.process_group import process_group
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.request import Outcome
from lightning_muter.unlearning.serving import Server

__all__ = ["UnlearningModule"]


class UnlearningModule(pl.LightningModule):
    """Serves removal batches (input, target[, index]) in a predict loop of one's own.

    Each batch is a request of its own: Stage II, Stage III, the write, the model. It goes through
    the trainer's loop with all that the trainer was told (limits, callbacks, precision);
    ``trainer.unlearn`` does not, and checks and commits all batches together.

    Args:
        model: the user's module; it carries ω^u after each request.
        memory: the memory to start from.
        callback: the callback that keeps the memory, or None for one read from a folder.
        memory_dir: the folder that is kept current, or None.
        noise_std: σ of Gaussian noise on each parameter of ω^u.

    Raises:
        ConfigurationError: ``noise_std`` is no finite number >= 0.
        RemovalError: in the loop, a batch of points that cannot be forgotten.
        StateError: in the loop, a method that keeps no curvature, or a model that is not the
            memory's.
    """

    def __init__(
        self,
        model: pl.LightningModule,
        memory: UnlearningMemory,
        callback: MemoryKeeper | None = None,
        memory_dir: str | None = None,
        noise_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.memory = memory
        self.outcomes: list[Outcome] = []
        self._callback, self._memory_dir = callback, memory_dir
        self._noise_std = number("noise_std", noise_std)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, float]:
        """One request, of one batch: "residual" of its system, "update_norm" of all parameters."""
        if not METHODS[self.memory.settings.method].has_memory:
            raise StateError(
                f"method={self.memory.settings.method!r} keeps no curvature to serve a request "
                "with: use trainer.unlearn"
            )
        with torch.inference_mode(False):
            group = process_group(self.trainer)
            view = self.memory.settings.view(self.model)
            self.memory.check_model(view)
            before = self.memory.to(view.parameters[0].device)
            server = Server(before, view, group)
            server.serve(batch)
            (outcome,) = server.outcomes
            after = server.memory
            if self._noise_std > 0:
                noise = group.broadcast(torch.randn(after.p, dtype=torch.float64))
                after = after.at(after.omega + self._noise_std * noise.to(after.omega))
            memory = after.to(self.memory.omega_star.device)
            folder = self._memory_dir
            store = None if folder is None else MemoryStore(folder, memory.memory_id)
            if folder is not None and store is not None and not store.exists():
                self.memory.save(folder)
            destination = Destination(store, self._callback, group, self.memory)
            with destination.writing():
                self.memory = destination.commit(memory, view).memory
            self.outcomes.append(outcome)
        change = torch.linalg.vector_norm(after.omega - before.omega)
        return {"residual": outcome.solution.residual, "update_norm": float(change)}
