"""`MUterCallback`: adversarial finetuning of a head, then Stage I."""

from __future__ import annotations

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

from lightning_muter.errors import ConfigurationError, MuterError, StateError
from lightning_muter.lightning.adversarial_training import AdversarialTraining, Attack
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.fidelity.averaging import check_order
from lightning_muter.lightning.fidelity.decay import decay_of, declared_penalty
from lightning_muter.lightning.fidelity.flow import holds
from lightning_muter.lightning.fidelity.watch import TrainingWatch
from lightning_muter.memory.memory import UnlearningMemory, size_estimate
from lightning_muter.models import Derivatives
from lightning_muter.objectives.losses import LossFunction
from lightning_muter.spec import Settings
from lightning_muter.threats import Threat
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
        strict: refuse training that is not what the memory assumes (its points, loss, outputs,
            steps, frozen part); False warns instead and keeps what was found in ``findings`` and
            the memory's ``warnings``.

    Raises:
        ConfigurationError: an argument is outside what it says here; in fit, training is not what
            the memory assumes.
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
        strict: bool = True,
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
        self.strict = strict
        self.horizon = horizon
        self.weight_decay = weight_decay
        self.memory_dir = memory_dir
        self.batch_size = batch_size
        self.memory: UnlearningMemory | None = None
        self.newton_history: list[float] = []
        self.initial: Tensor | None = None
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._was_training: list[nn.Module] = []
        #: how much each training point weighs in training's objective (n,), once training ended
        self.point_weights: Tensor | None = None
        #: what was found of training that the memory does not assume (``strict=False``)
        self.findings: list[str] = []
        self._watch: TrainingWatch | None = None
        self._resumed: dict[str, Any] = {}
        self._decay = 0.0

    # --- finetuning -------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not hasattr(trainer, "unlearn"):
            from lightning_muter.lightning.trainer import unlearn

            trainer.unlearn = types.MethodType(unlearn, trainer)  # type: ignore[attr-defined]
        if stage != "fit":
            return
        derivatives = self.settings.derivatives(pl_module)
        if METHODS[self.settings.method].has_memory and derivatives.p > _MEMORY_LIMIT:
            raise ConfigurationError(
                f"{size_estimate(derivatives.p)} is too large for a dense memory (at most "
                f"p = {_MEMORY_LIMIT:,}); choose a smaller head or fewer parameters"
            )
        self.initial = derivatives.get()
        trained = set(derivatives.names)
        self._flags = [(p, p.requires_grad) for p in pl_module.parameters()]
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(name in trained)
        self._watch, self._resumed, self.findings, self.point_weights = None, {}, [], None
        try:
            check_order(trainer.callbacks, self)  # type: ignore[attr-defined]
        except ConfigurationError as error:
            self._refuse(error)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        points = _points(trainer)
        points.check()
        derivatives = self.settings.derivatives(pl_module)
        holders = [o for o in trainer.optimizers if holds(o, derivatives.parameters)]
        rates = [flow_rate(optimizer, derivatives.parameters) for optimizer in holders]
        if self.horizon == "training" and None in rates:
            names = [type(optimizer).__name__ for optimizer in holders]
            raise ConfigurationError(
                f"horizon='training' with {names}: it needs torch.optim.SGD of one learning rate, "
                "since others follow no gradient flow; give a number, newton_steps, or horizon=None"
            )
        self._decay = decay_of(
            trainer.optimizers, derivatives.parameters, self.weight_decay, self.newton_steps
        )
        head = self.settings.head
        self._watch = TrainingWatch(
            trainer,
            pl_module,
            derivatives,
            None if head is None else pl_module.get_submodule(head),
            self._point_loss,
            points,
            declared_penalty(trainer.optimizers, derivatives.parameters, self.weight_decay)
            if not self.newton_steps
            else 0.0,
            self._resumed.get("flow_time", 0.0) if self.horizon == "training" else None,
            reducer(trainer),
            self._refuse,
        )
        if "points" in self._resumed:
            self._watch.load_state_dict(self._resumed["points"])

    def _watching(self) -> TrainingWatch:
        if self._watch is None:
            raise StateError("training has not started: the callback watches nothing yet")
        return self._watch

    def _refuse(self, error: MuterError) -> None:
        """Raise what makes the memory another problem's; with strict=False, warn and keep it."""
        if self.strict:
            raise error
        finding = str(error)
        if finding not in self.findings:
            self.findings.append(finding)
            warnings.warn(finding, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """Where training started and what was seen of it so far, for a run that is resumed."""
        if self._watch is None:
            return {**self._resumed, "initial": self.initial}
        return {
            "flow_time": self._watch.flow_time,
            "initial": self.initial,
            "points": self._watch.state_dict(),
            "findings": list(self.findings),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was."""
        self._resumed, self.initial = dict(state_dict), state_dict["initial"]
        self.findings = list(state_dict.get("findings", ()))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._freeze_modes(pl_module)
        watch = self._watching()
        watch.received(batch, batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        watch.perturbed(batch[0], batch[1])

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        self._watching().before_backward()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._watching().before_step(optimizer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._watching().ended()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watching().epoch_ended()

    def _freeze_modes(self, pl_module: nn.Module) -> None:
        trained = set(self.settings.derivatives(pl_module).names)
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
        if self._watch is not None:
            self._watch.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._watch is not None:
            self._watch.close()

    # --- Stage I ----------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        watch, points = self._watching(), _points(trainer)
        watch.finish()
        self.point_weights = watch.point_weights
        total = float(self.point_weights.sum())
        settings = self.settings.trained(self._decay, self._horizon(watch.flow_time, total))
        if self.newton_steps:  # ω* is every method's: the robust objective's own optimum
            robust = replace(settings, method="muter", response="constrained", space="input")
            target = self.objective(trainer, robust.derivatives(pl_module), robust, points)
            self.newton_history = newton(target, self.newton_steps, settings.damping)
        if METHODS[settings.method].has_memory:
            size = size_estimate(settings.derivatives(pl_module).p)
            rank_zero_info(f"Stage I ({settings.method}): {size}")
        batches = self._batches(trainer, points, range(len(points)))
        (memory,) = build_memories(
            pl_module,
            [settings],
            batches,
            watch.digests,
            watch.key,
            reducer(trainer),
            self.initial,
        )
        self._refuse_broken(memory)
        self._report_memory(memory)
        self.memory = replace(memory, warnings=(*memory.warnings, *self.findings))
        self.save()
        if self.memory_dir is not None:  # other checkpoints may precede the Newton steps
            trainer.save_checkpoint(Path(self.memory_dir) / MODEL_FILE, weights_only=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        memory, derivatives = self.memory, self.settings.derivatives(pl_module)
        if memory is None:
            return
        now = derivatives.get()
        kept = memory.omega.to(now.device).to(derivatives.dtype).double()
        if torch.allclose(now, kept, rtol=1e-6, atol=1e-8):
            return
        self._refuse(
            ConfigurationError(
                "a callback listed after MUterCallback changed the trained parameters by "
                f"{float(torch.linalg.vector_norm(now - kept)):.3g} when training ended, after "
                "their memory was built: list it before MUterCallback"
            )
        )
        self.memory = replace(memory, warnings=tuple(self.findings))
        self.save()

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
        total = -(-len(mine) // self.batch_size)
        dtype = None if self._watch is None else self._watch.dtype
        stream = points.batches(mine, self.batch_size, device, dtype)
        yield from tqdm(stream, "training points", total, leave=False, disable=quiet)

    def _horizon(self, flow_time: float, total: float) -> float | None:
        """Σ lr over the weight of all points, where training's own horizon is asked for."""
        if self.horizon != "training":
            return self.horizon
        return flow_time / total

    @staticmethod
    def _refuse_broken(memory: UnlearningMemory) -> None:
        if not bool(torch.isfinite(memory.residual_gradient).all()):
            raise ConfigurationError(
                "the robust gradient is not finite: a training point has NaN or infinite values, "
                "or training diverged; no memory was built"
            )

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
        """Write the memory to ``memory_dir``, where there is one."""
        if self.memory is not None and self.memory_dir is not None:
            self.memory.save(self.memory_dir)


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
