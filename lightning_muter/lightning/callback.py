"""`MUterCallback`: adversarial finetuning of a head, then Stage I."""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.adversarial_training import AdversarialTraining, Attack
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.kept_state import KeptState
from lightning_muter.lightning.preflight import Preflight, rehearse, time_pass
from lightning_muter.lightning.rescue import Rescue, check_not_stopped
from lightning_muter.memory.memory import UnlearningMemory, digest, size_estimate
from lightning_muter.models import Derivatives
from lightning_muter.models.names import listed
from lightning_muter.objectives.losses import LossFunction
from lightning_muter.spec import Settings
from lightning_muter.threats import Threat
from lightning_muter.unlearning.cost import check_fits
from lightning_muter.unlearning.flow import flow_rate
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.objective import RobustObjective, newton
from lightning_muter.unlearning.stage_one import build_memories

__all__ = ["MODEL_FILE", "MUterCallback", "reducer"]

#: the checkpoint of the model at ω*, beside the memory
MODEL_FILE = "model.ckpt"

_MEMORY_LIMIT = 60_000
#: a Newton step longer than this share of ω* means that training did not converge
_UNFINISHED = 0.1


class MUterCallback(AdversarialTraining):
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
            parameters=listed(parameters),
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
        self.folder: str | None = memory_dir  # where the current memory is kept
        self._kept: KeptState | None = None
        self._preflight = Preflight(0.0, 0.0, 0.0)
        self._checked = False
        self._flow_time = 0.0

    # --- finetuning -------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not hasattr(trainer, "unlearn"):
            from lightning_muter.lightning.trainer import unlearn

            trainer.unlearn = types.MethodType(unlearn, trainer)  # type: ignore[attr-defined]
        if stage != "fit":
            return
        _refuse_spawned(trainer)
        derivatives = self.settings.derivatives(pl_module)
        if METHODS[self.settings.method].has_memory and derivatives.p > _MEMORY_LIMIT:
            raise ConfigurationError(
                f"{size_estimate(derivatives.p)} is too large for a dense memory (at most "
                f"p = {_MEMORY_LIMIT:,}); choose a smaller head or fewer parameters"
            )
        self.initial = derivatives.get()
        self.folder = None if getattr(trainer, "fast_dev_run", False) else self.memory_dir
        self._restore()
        self._kept = KeptState(pl_module)
        self._kept.train_only(pl_module, set(derivatives.names))
        self._checked = False
        self._flow_time = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        points = _points(trainer)
        points.check()
        self._decay(trainer, pl_module)
        self._rehearse(trainer, pl_module, points)
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
        trained = set(self.settings.derivatives(pl_module).names)
        for name, module in pl_module.named_modules():
            own = {f"{name}.{k}" if name else k for k, _ in module.named_parameters()}
            if name and not own & trained and self._kept is not None:
                self._kept.evaluate(module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._kept is not None:  # Lightning does not call teardown after an exception
            self._kept.restore_modes()
        self._restore()
        if trainer.state.fn == "fit":
            _refuse_spawned(trainer, exception)

    def _restore(self) -> None:
        """Flags and modes as they were before fit; any number of times."""
        if self._kept is not None:
            self._kept.restore()
        self._kept = None

    # --- Stage I ----------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        points = _points(trainer)
        path = None if self.folder is None else Path(self.folder) / MODEL_FILE
        rescue = Rescue(trainer, path)
        rescue.keep()
        with rescue.guarding("newton_steps"):
            decay, horizon = self._decay(trainer, pl_module), self._horizon(len(points))
            settings = self.settings.trained(decay, horizon)
            if self.newton_steps:  # ω* is every method's: the robust objective's own optimum
                self._newton(trainer, pl_module, _robust(settings), points)
        if self.newton_steps:
            rescue.keep()
        with rescue.guarding("Stage I"):
            self.memory = self._stage_one(trainer, pl_module, settings, points)
        self.save()
        rescue.done(path)

    def _newton(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        robust: Settings,
        points: TrainingPoints,
    ) -> None:
        """Newton steps; if one fails, the parameters are again what training made them."""
        derivatives = robust.derivatives(pl_module)
        trained = derivatives.get()
        target = self.objective(trainer, derivatives, robust, points)
        try:
            self.newton_history = newton(target, self.newton_steps, robust.damping)
        except BaseException:
            derivatives.set(trained)  # exact: float64 holds every value of a smaller dtype
            raise

    def _stage_one(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        settings: Settings,
        points: TrainingPoints,
    ) -> UnlearningMemory:
        if METHODS[settings.method].has_memory:
            size = size_estimate(settings.derivatives(pl_module).p)
            rank_zero_info(f"Stage I ({settings.method}): {size}")
        key = trainer.strategy.broadcast(os.urandom(16))
        batches = self._batches(trainer, points, range(len(points)))
        digests = self._digests(trainer, points, key)
        (memory,) = build_memories(
            pl_module, [settings], batches, digests, key, reducer(trainer), self.initial
        )
        self._refuse_broken(memory)
        self._report_memory(memory)
        return memory

    def _rehearse(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, points: TrainingPoints
    ) -> None:
        """Two points through all that comes after training; what it takes, for a person."""
        settings, device = self.settings, trainer.strategy.root_device
        has_memory = METHODS[settings.method].has_memory
        stages = [_robust(settings)] if self.newton_steps else []
        stages += [settings] if has_memory or not stages else []
        p = settings.derivatives(pl_module).p
        if stages != [settings] or has_memory:
            check_fits(p, device, trainer.num_devices if device.type == "cpu" else 1)

        def read(count: int) -> tuple[Tensor, Tensor]:
            n = len(points)
            some = sorted({i * (n - 1) // max(count - 1, 1) for i in range(count)})
            return self._as_trained(trainer, next(points.batches(some, count, device)))

        self._preflight = rehearse(pl_module, stages, read, points.known_targets())
        if has_memory:
            self._preflight = time_pass(pl_module, settings, read, self._preflight)
            mine = -(-len(points) // trainer.world_size)
            size = self._preflight.piece(self.batch_size)
            cost = self._preflight.cost(mine, p, size, self.newton_steps, device)
            rank_zero_info(f"{cost}")

    @staticmethod
    def _as_trained(trainer: pl.Trainer, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A batch in the dtype that the trainer's precision gives to training's own batches."""
        converted: tuple[Tensor, Tensor] = trainer.precision_plugin.convert_input(batch)
        return converted

    def objective(
        self,
        trainer: pl.Trainer,
        derivatives: Derivatives,
        settings: Settings,
        points: TrainingPoints,
    ) -> RobustObjective:
        """The robust objective over training points, each counted once over all processes."""

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            return self._batches(trainer, points, range(len(points)))

        return RobustObjective(derivatives, settings.recipe(), batches, reducer(trainer))

    def _batches(
        self, trainer: pl.Trainer, points: TrainingPoints, indices: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the points, with a progress bar."""
        mine = list(indices[trainer.global_rank :: trainer.world_size])
        device = trainer.strategy.root_device
        quiet = trainer.progress_bar_callback is None or not trainer.is_global_zero
        size = self._preflight.piece(self.batch_size)
        with tqdm(
            desc="training points", total=len(mine), unit="point", leave=False, disable=quiet
        ) as bar:
            for batch in points.batches(mine, size, device):
                check_not_stopped(trainer, bar.n, len(mine))
                yield self._as_trained(trainer, batch)
                bar.update(len(batch[0]))

    def _decay(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """λ of the trained parameters."""
        derivatives = self.settings.derivatives(pl_module)
        trained = {
            id(parameter): name
            for name, parameter in zip(derivatives.names, derivatives.parameters, strict=True)
        }
        groups = [
            (optimizer, group, trained.keys() & {id(p) for p in group["params"]})
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]
        missing = trained.keys() - {i for _, _, held in groups for i in held}
        if missing and not self.newton_steps:
            raise ConfigurationError(
                f"no optimizer holds the parameters {[trained[i] for i in trained if i in missing]}"
                ", which head= or parameters= says are trained: give them to it in "
                "configure_optimizers"
            )
        if self.weight_decay is not None:
            return self.weight_decay
        decays = {float(g.get("weight_decay", 0.0)) for _, g, held in groups if held}
        if len(decays) > 1:
            raise ConfigurationError(
                f"the optimizer trains {derivatives.names} with weight decays {sorted(decays)}, "
                "but the objective has one λ: give them one group, or say by weight_decay= which "
                "λ counts"
            )
        decoupled = any(isinstance(o, torch.optim.AdamW) for o, _, held in groups if held)
        if decoupled and decays != {0.0} and not self.newton_steps:
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
            check_not_stopped(trainer, i, len(points))
            x, target = points.batch([i])
            rows[i] = torch.tensor(list(digest(key, x[0], target[0])), dtype=torch.float32)
        total: Tensor = reducer(trainer)(rows.to(trainer.strategy.root_device))
        return total.cpu().to(torch.uint8)

    def _report_memory(self, memory: UnlearningMemory) -> None:
        rank_zero_info(
            "memory: "
            + ", ".join(
                f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                for k, v in memory.summary.items()
            )
        )
        left = memory.summary.get("distance_to_optimum", 0.0)
        size = float(torch.linalg.vector_norm(memory.omega_star))
        taken_as_converged = memory.settings.horizon is None and not self.newton_steps
        if taken_as_converged and left > _UNFINISHED * size:
            warnings.warn(
                f"training stopped about {left:.3g} from its optimum (‖ω*‖ = {size:.3g}): the "
                "full step assumes that it converged, and may end farther from a Retrain than "
                "doing nothing; give newton_steps=..., or horizon='training' for a Retrain that "
                "stops as early",
                stacklevel=2,
            )
        usable = memory.summary["usable_response"]
        if self.settings.response == "unconstrained" and usable < 1:
            rank_zero_info(
                f"the inverse of the input Hessian exists or its series converges at "
                f"{usable:.0%} of the points only"
            )

    @rank_zero_only
    def save(self) -> None:
        """Write the memory to its folder, where there is one."""
        if self.memory is not None and self.folder is not None:
            self.memory.save(self.folder)


def reducer(trainer: pl.Trainer) -> Callable[[Tensor], Tensor]:
    """A function that sums a tensor over the processes of a trainer."""
    if trainer.world_size == 1:
        return lambda tensor: tensor

    def total(tensor: Tensor) -> Tensor:
        summed: Tensor = trainer.strategy.reduce(tensor, reduce_op="sum")
        return summed

    return total


def _points(trainer: pl.Trainer) -> TrainingPoints:
    loader: Any = trainer.train_dataloader
    if not hasattr(loader, "dataset"):
        raise ConfigurationError(
            f"the training data is a {type(loader).__name__}; one DataLoader is needed"
        )
    return TrainingPoints(loader.dataset, loader.collate_fn)


def _robust(settings: Settings) -> Settings:
    """The settings of the robust objective itself, whose optimum Newton's steps look for."""
    return replace(settings, method="muter", response="constrained", space="input")


def _refuse_spawned(trainer: pl.Trainer, cause: BaseException | None = None) -> None:
    """Refuse strategies whose processes are started with copies of model and callback.

    Raises:
        ConfigurationError: from ``cause``, the error of such a process.
    """
    # only launchers that spawn or fork from within fit have a start method; no public name says so
    method = getattr(trainer.strategy.launcher, "_start_method", None)
    if method is not None:
        raise ConfigurationError(
            f"the strategy starts its processes by {method!r} from within fit: they would build "
            "the memory on copies, and this process would be left without memory and without the "
            "trained model; use strategy='ddp', which starts the script once for each device"
        ) from cause
