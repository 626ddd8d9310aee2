"""`MUterCallback`: adversarial finetuning of a head, then Stage I."""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_muter.adversary.attack_library import Attack
from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.adversarial_training import AdversarialTraining
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.keeper import MemoryKeeper
from lightning_muter.lightning.process_group import process_group
from lightning_muter.lightning.unlearn import unlearn
from lightning_muter.memory.memory import UnlearningMemory, size_estimate
from lightning_muter.memory.points import digest
from lightning_muter.models import ModelView
from lightning_muter.objectives.losses import LossFunction
from lightning_muter.spec import Settings
from lightning_muter.threats import Threat
from lightning_muter.unlearning.flow import flow_rate
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.objective import RobustObjective, newton
from lightning_muter.unlearning.points import Batch
from lightning_muter.unlearning.stage_one import build_memories

__all__ = ["MODEL_FILE", "MUterCallback"]

#: the checkpoint of the model at ω*, beside the memory
MODEL_FILE = "model.ckpt"

_MEMORY_LIMIT = 60_000


class MUterCallback(MemoryKeeper, AdversarialTraining):
    """Finetunes a head adversarially and builds the unlearning memory when training ends.

    Freezes everything but ``head`` (or ``parameters``) while it trains, with the frozen part in
    eval mode; swaps batches as `AdversarialTraining` does; at the end takes ``newton_steps``
    towards stationarity and sums the method's curvature over the training points, each once.
    Afterwards ``trainer.unlearn`` forgets points. Source: the paper's Stage I; the constrained
    response is ours (docs/theory.md).

    Args:
        threat: the constraint set.
        head: dotted name of the linear layer that is trained.
        parameters: names of the trained parameters instead of a head.
        loss: "cross_entropy", "logistic", "squared", or a callable (outputs, targets) -> (n,).
        method: a row of ``METHODS``.
        attack: the training attack; None for the threat's own ascent.
        response: "constrained" (ours) or "unconstrained" (the paper's eq. 4).
        inverse: with "unconstrained": "neumann" or "exact".
        neumann_order: where the series is clipped.
        space: "input", or "features": the paper's variant for networks.
        newton_steps: Newton steps on the robust objective before Stage I.
        damping: added to M before each solve.
        solver: "direct", "schur" (Theorem 2, matrix-free) or "auto" by size.
        sketch: seeded probes a point for the inner response where all of ∂φ/∂x is too dear (a
            wide network's head); 0 for the exact response.
        weight_decay: λ; None reads it from the optimizer.
        memory_dir: where to save the memory, keep it current, and put the model at ω*
            (``model.ckpt``); None keeps the memory in the process.
        horizon: how long a Retrain would train, where training does not reach its optimum: the
            step goes as far as a gradient flow of that time. "training" is this training's own,
            Σ lr / n of plain SGD; a number is taken as it is; None is an infinite one, the
            paper's.
        batch_size: points a pass reads at once.
        attack_steps: steps of the threat's own ascent.
        attack_step_size: its step length.
        random_start: start the training attack at a random allowed perturbation.

    Raises:
        ConfigurationError: an argument is outside what it says here.
    """

    def __init__(
        self,
        threat: Threat,
        head: str | None = None,
        parameters: Sequence[str] | None = None,
        loss: str | LossFunction = "cross_entropy",
        method: str = "muter",
        attack: Attack | None = None,
        response: str = "constrained",
        inverse: str = "neumann",
        neumann_order: int = 3,
        space: str = "input",
        newton_steps: int = 0,
        damping: float = 0.0,
        solver: str = "auto",
        sketch: int = 0,
        weight_decay: float | None = None,
        memory_dir: str | None = None,
        horizon: float | Literal["training"] | None = None,
        batch_size: int = 512,
        attack_steps: int = 10,
        attack_step_size: float | None = None,
        random_start: bool = True,
    ) -> None:
        self.settings = Settings(
            method=method,
            threat=threat,
            head=head,
            parameters=None if parameters is None else tuple(parameters),
            loss=loss,
            response=response,
            inverse=inverse,
            neumann_order=neumann_order,
            space=space,
            damping=damping,
            solver=solver,
            sketch=sketch,
            weight_decay=weight_decay or 0.0,
            horizon=None if horizon == "training" else horizon,
        )
        super().__init__(threat, attack, loss, attack_steps, attack_step_size, random_start)
        if newton_steps < 0 or batch_size < 1:
            raise ConfigurationError(
                f"newton_steps={newton_steps} must be >= 0 and batch_size={batch_size} >= 1"
            )
        if horizon is not None and newton_steps:
            raise ConfigurationError(
                f"horizon={horizon!r} with newton_steps={newton_steps}: a model at its optimum has "
                "none; give one of the two"
            )
        self.newton_steps = newton_steps
        self.horizon = horizon
        self.weight_decay = weight_decay
        self.memory_dir = memory_dir
        self.batch_size = batch_size
        self.memory: UnlearningMemory | None = None
        self.newton_history: list[float] = []
        self.initial: Tensor | None = None
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._was_training: list[nn.Module] = []
        self._checked = False
        self._flow_time = 0.0

    # --- finetuning -------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not hasattr(trainer, "unlearn"):
            trainer.unlearn = types.MethodType(unlearn, trainer)  # type: ignore[attr-defined]
        if stage != "fit":
            return
        view = self.settings.view(pl_module)
        if METHODS[self.settings.method].has_memory and view.p > _MEMORY_LIMIT:
            raise ConfigurationError(
                f"{size_estimate(view.p)} is too large for a dense memory (at most "
                f"p = {_MEMORY_LIMIT:,}); choose a smaller head or fewer parameters"
            )
        self.initial = view.get()
        trained = set(view.names)
        self._flags = [(p, p.requires_grad) for p in pl_module.parameters()]
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(name in trained)
        self._checked = False
        self._flow_time = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _points(trainer).check()
        rates = [flow_rate(optimizer) for optimizer in trainer.optimizers]
        if self.horizon == "training" and None in rates:
            names = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            raise ConfigurationError(
                f"horizon='training' with {names}: it needs torch.optim.SGD of one learning rate, "
                "since others follow no gradient flow; give a number, newton_steps, or horizon=None"
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._flow_time += flow_rate(optimizer) or 0.0

    def state_dict(self) -> dict[str, Any]:
        """Where training started and its time so far, for a run that is resumed."""
        return {"flow_time": self._flow_time, "initial": self.initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was."""
        self._flow_time, self.initial = state_dict["flow_time"], state_dict["initial"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._freeze_modes(pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._checked:
            with torch.no_grad():
                outputs = pl_module(batch[0])
                self._expected = float(self._point_loss(outputs, batch[1]).mean())

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._checked or trainer.accumulate_grad_batches != 1:
            return
        self._checked = True
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            value = float(loss)
            if abs(value - self._expected) > 0.05 * max(abs(value), abs(self._expected), 1e-3):
                warnings.warn(
                    f"training_step returned {value:.4g} on the first batch, loss="
                    f"{self._point_loss.name!r} gives a mean of {self._expected:.4g}: the memory "
                    "would be of another objective than training's; give the same loss to both",
                    stacklevel=2,
                )

    def _freeze_modes(self, pl_module: nn.Module) -> None:
        trained = set(self.settings.view(pl_module).names)
        for name, module in pl_module.named_modules():
            own = {f"{name}.{k}" if name else k for k, _ in module.named_parameters()}
            if name and not own & trained and module.training:
                self._was_training.append(module)
                module.training = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._flags = []
        for module in self._was_training:
            module.training = True
        self._was_training = []

    # --- Stage I ----------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        points = _points(trainer)
        settings = self.settings.trained(self._decay(trainer), self._horizon(len(points)))
        if self.newton_steps:  # ω* is every method's: the robust objective's own optimum
            robust = replace(settings, method="muter", response="constrained", space="input")
            target = self.objective(trainer, robust.view(pl_module), robust, points)
            self.newton_history = newton(target, self.newton_steps, settings.damping)
        if METHODS[settings.method].has_memory:
            size = size_estimate(settings.view(pl_module).p)
            rank_zero_info(f"Stage I ({settings.method}): {size}")
        key = trainer.strategy.broadcast(os.urandom(16))
        batches = self._batches(trainer, points, range(len(points)))
        digests = self._digests(trainer, points, key)
        (memory,) = build_memories(
            pl_module, [settings], batches, digests, key, process_group(trainer), self.initial
        )
        self._refuse_broken(memory)
        self._report_memory(memory)
        self.memory = memory
        self.save()
        if self.memory_dir is not None:  # other checkpoints may precede the Newton steps
            trainer.save_checkpoint(Path(self.memory_dir) / MODEL_FILE, weights_only=True)

    def objective(
        self,
        trainer: pl.Trainer,
        view: ModelView,
        settings: Settings,
        points: TrainingPoints,
    ) -> RobustObjective:
        """The robust objective over training points, each counted once over all processes."""

        def batches() -> Iterator[Batch]:
            return self._batches(trainer, points, range(len(points)))

        return RobustObjective(view, settings.problem(), batches, process_group(trainer))

    def _batches(
        self, trainer: pl.Trainer, points: TrainingPoints, indices: Sequence[int]
    ) -> Iterator[Batch]:
        """This process's share of the points, with a progress bar."""
        mine = list(indices[trainer.global_rank :: trainer.world_size])
        device = trainer.strategy.root_device
        quiet = trainer.progress_bar_callback is None or not trainer.is_global_zero
        total = -(-len(mine) // self.batch_size)
        stream = points.batches(mine, self.batch_size, device)
        yield from tqdm(stream, "training points", total, leave=False, disable=quiet)

    def _decay(self, trainer: pl.Trainer) -> float:
        if self.weight_decay is not None:
            return self.weight_decay
        decays = {
            float(group.get("weight_decay", 0.0))
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        }
        if len(decays) > 1:
            raise ConfigurationError(
                f"the optimizer has weight decays {sorted(decays)}: say which λ the head was "
                "trained with by weight_decay="
            )
        if any(isinstance(o, torch.optim.AdamW) for o in trainer.optimizers) and decays != {0.0}:
            warnings.warn(
                "AdamW's decoupled weight decay is no L2 term of the objective: ω* is not the "
                "optimum the memory assumes; use newton_steps, or SGD or Adam",
                stacklevel=2,
            )
        return decays.pop() if decays else 0.0

    def _horizon(self, n: int) -> float | None:
        if self.horizon != "training":
            return self.horizon
        return self._flow_time / n

    @staticmethod
    def _refuse_broken(memory: UnlearningMemory) -> None:
        if not bool(torch.isfinite(memory.residual_gradient).all()):
            raise ConfigurationError(
                "the robust gradient is not finite: a training point has NaN or infinite values, "
                "or training diverged; no memory was built"
            )

    def _digests(self, trainer: pl.Trainer, points: TrainingPoints, key: bytes) -> Tensor:
        rows = torch.zeros(len(points), 16, dtype=torch.float32)
        for i in range(trainer.global_rank, len(points), trainer.world_size):
            x, target = points.batch([i])
            rows[i] = torch.tensor(list(digest(key, x[0], target[0])), dtype=torch.float32)
        total: Tensor = process_group(trainer).sum(rows.to(trainer.strategy.root_device))
        return total.cpu().to(torch.uint8)

    def _report_memory(self, memory: UnlearningMemory) -> None:
        rank_zero_info(
            "memory: "
            + ", ".join(
                f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                for k, v in memory.summary.items()
            )
        )
        for sentence in memory.warnings:
            warnings.warn(sentence, stacklevel=2)
        usable = memory.summary["usable_response"]
        if self.settings.response == "unconstrained" and usable < 1:
            rank_zero_info(
                f"the inverse of the input Hessian exists or its series converges at "
                f"{usable:.0%} of the points only"
            )

    @rank_zero_only
    def save(self) -> None:
        """Write the memory to ``memory_dir``, where there is one."""
        if self.memory is not None and self.memory_dir is not None:
            self.memory.save(self.memory_dir)


def _points(trainer: pl.Trainer) -> TrainingPoints:
    loader: Any = trainer.train_dataloader
    if not hasattr(loader, "dataset"):
        raise ConfigurationError(
            f"the training data is a {type(loader).__name__}; one DataLoader is needed"
        )
    return TrainingPoints(loader.dataset, loader.collate_fn)
