"""What follows training: the rehearsal before it, Newton's steps, Stage I."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.flavour import pl, rank_zero_info
from lightning_muter.lightning.preflight import Preflight, rehearse, time_pass
from lightning_muter.lightning.process_group import process_group
from lightning_muter.lightning.rescue import check_not_stopped
from lightning_muter.memory.ids import id_digests, ids_key
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.rebase_policy import RebasePolicy
from lightning_muter.models import BatchForm
from lightning_muter.spec import Settings
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.objective import RobustObjective, newton
from lightning_muter.unlearning.points import Batch
from lightning_muter.unlearning.representation import Representation, represented
from lightning_muter.unlearning.stage_one import build_memories

__all__ = ["AfterTraining", "points_of", "refuse_spawned", "report"]


@dataclass
class AfterTraining:
    """Newton's steps and Stage I of one fit, over its training points.

    Attributes:
        trainer: of the fit.
        module: that is trained.
        points: the training data set.
        settings: of the memory, as far as they are known before training.
        newton_steps: how many will be taken.
        batch_size: points a pass reads at once, at the most.
        preflight: what two points took before training.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    points: TrainingPoints
    settings: Settings
    newton_steps: int
    batch_size: int
    preflight: Preflight = Preflight(0.0, 0.0, 0.0)
    representation: str = "dense"

    def rehearse(self) -> None:
        """Two points through all that comes after training; what it takes, for a person."""
        settings, device = self.settings, self.trainer.strategy.root_device
        has_memory = METHODS[settings.method].has_memory
        kept = self._represented(settings if has_memory else settings.robust())
        self.representation = kept.settings.representation
        settings = self._kept_as(settings)
        stages = [settings.robust()] if self.newton_steps else []
        stages += [settings] if has_memory or not stages else []
        p = settings.view(self.module).p
        self.preflight = rehearse(self.module, stages, self._read, self.points.known_targets())
        if has_memory:
            self.preflight = time_pass(self.module, settings, self._read, self.preflight)
            mine = -(-len(self.points) // self.trainer.world_size)
            size = self.preflight.piece(self.batch_size)
            cost = self.preflight.cost(mine, p, size, self.newton_steps, kept, device)
            rank_zero_info(f"{kept.why}; {cost}")

    def _represented(self, settings: Settings) -> Representation:
        """How the memory is kept, and Newton's Hessians before it."""
        trainer, device = self.trainer, self.trainer.strategy.root_device
        inputs = self._read(1).x[0].numel()
        mine = -(-len(self.points) // trainer.world_size)
        sharing = trainer.num_devices if device.type == "cpu" else 1
        return represented(settings, settings.view(self.module), inputs, mine, device, sharing)

    def _kept_as(self, settings: Settings) -> Settings:
        return replace(settings, representation=self.representation)

    def _read(self, count: int) -> Batch:
        """Some points, spread over the data set."""
        n = len(self.points)
        some = sorted({i * (n - 1) // max(count - 1, 1) for i in range(count)})
        device = self.trainer.strategy.root_device
        return self._as_trained(next(self.points.batches(some, count, device)))

    def _as_trained(self, batch: Batch) -> Batch:
        """A batch in the dtype that the trainer's precision gives to training's own batches."""
        x, targets = self.trainer.precision_plugin.convert_input([batch.x, batch.targets])
        return replace(batch, x=x.to(next(self.module.parameters()).dtype), targets=targets)

    def newton(self, settings: Settings, weights: Tensor) -> list[float]:
        """Newton steps on the robust objective; if one fails, ω is again what training made it."""
        robust = self._kept_as(settings.robust())
        target = self.objective(robust, weights)
        trained = target.view.get()
        try:
            return newton(target, self.newton_steps, robust.damping)
        except BaseException:
            target.view.set(trained)  # exact: float64 holds every value of a smaller dtype
            raise

    def objective(self, settings: Settings, weights: Tensor) -> RobustObjective:
        """The robust objective over training points, each counted once over all processes."""
        view, group = settings.view(self.module), process_group(self.trainer)
        batches, empty = lambda: self._batches(weights), settings.empty_sum
        return RobustObjective(view, settings.problem(), batches, group, empty)

    def stage_one(
        self,
        settings: Settings,
        weights: Tensor,
        digests: Tensor,
        key: bytes,
        initial: Tensor | None,
    ) -> UnlearningMemory:
        """The memory at the trained ω.

        Args:
            settings: with the λ and the horizon of the training.
            weights: how much each point counted in training (n,).
            digests: of all points (n, 16).
            key: of the digests.
            initial: the ω (p,) that training started from.

        Raises:
            ConfigurationError: the robust gradient is not finite.
        """
        settings = self._kept_as(settings)
        if METHODS[settings.method].has_memory:
            p = settings.view(self.module).p
            rank_zero_info(f"Stage I ({settings.method}): p = {p:,}, {self.representation}")
        group = process_group(self.trainer)
        (memory,) = build_memories(
            self.module, [settings], self._batches(weights), digests, key, group, initial, weights
        )
        if not bool(torch.isfinite(memory.residual_gradient).all()):
            raise ConfigurationError(
                "the robust gradient is not finite: a training point has NaN or infinite values, "
                "or training diverged; no memory was built"
            )
        return memory

    def finished(
        self,
        memory: UnlearningMemory,
        texts: Sequence[str] | None,
        findings: Sequence[str],
        policy: RebasePolicy,
    ) -> UnlearningMemory:
        """The memory with the users' keys of its points, what was found, and one id everywhere.

        Args:
            memory: as Stage I made it.
            texts: a key a point, or None.
            findings: what the memory does not assume of its training.
            policy: when a rebase is due.
        """
        own = ids_key(memory.key)
        return replace(
            memory,
            warnings=(*memory.warnings, *findings),
            ids=None if texts is None else id_digests(own, texts),
            ids_key=own,
            rebase_policy=policy,
            memory_id=self.trainer.strategy.broadcast(memory.memory_id),
        )

    def _batches(self, weights: Tensor) -> Iterator[Batch]:
        """This process's share of the points that were trained on, with a progress bar."""
        trainer = self.trainer
        mine = process_group(trainer).share(torch.nonzero(weights > 0).flatten().tolist())
        quiet = trainer.progress_bar_callback is None or not trainer.is_global_zero
        size = self.preflight.piece(self.batch_size)
        device = trainer.strategy.root_device
        with tqdm(
            desc="training points", total=len(mine), unit="point", leave=False, disable=quiet
        ) as bar:
            for batch in self.points.batches(mine, size, device, weights):
                check_not_stopped(trainer, bar.n, len(mine))
                yield self._as_trained(batch)
                bar.update(len(batch))


def points_of(trainer: pl.Trainer, form: BatchForm) -> TrainingPoints:
    """The training points of a trainer that is set up, their batches read by ``form``.

    Raises:
        ConfigurationError: there is not one loader of one data set.
    """
    loader: Any = trainer.train_dataloader
    if not hasattr(loader, "dataset"):
        raise ConfigurationError(
            f"the training data is a {type(loader).__name__}; one DataLoader is needed"
        )
    return TrainingPoints(loader.dataset, loader.collate_fn, form)


def refuse_spawned(trainer: pl.Trainer, cause: BaseException | None = None) -> None:
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


def report(memory: UnlearningMemory) -> None:
    """Print what Stage I found, and warn of what is in doubt."""
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
    if memory.settings.response == "unconstrained" and usable < 1:
        rank_zero_info(
            f"the inverse of the input Hessian exists or its series converges at "
            f"{usable:.0%} of the points only"
        )
