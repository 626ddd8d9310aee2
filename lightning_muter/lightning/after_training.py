"""What follows training: the rehearsal before it, Newton's steps, Stage I."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_muter.display import counted
from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.flavour import pl, rank_zero_info
from lightning_muter.lightning.half_precision import check_precision
from lightning_muter.lightning.preflight import Preflight, rehearse, time_pass
from lightning_muter.lightning.process_group import process_group
from lightning_muter.lightning.progress import bar_of
from lightning_muter.lightning.rescue import check_not_stopped
from lightning_muter.memory.ids import id_digests, ids_key
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.rebase_policy import RebasePolicy
from lightning_muter.memory.start import TrainingFlow
from lightning_muter.models import BatchForm, computing, measuring
from lightning_muter.spec import Settings
from lightning_muter.unlearning.cost import Cost
from lightning_muter.unlearning.maxima import LastMaxima
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.objective import RobustObjective, newton
from lightning_muter.unlearning.points import Batch
from lightning_muter.unlearning.representation import Representation, represented, with_probes
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
        representation: how the memory is kept.
        sketch: probes a point.
        flows: whether a request goes as far as training did.
        maxima: of the last pass: Stage I begins where Newton's steps end.
        cost: what Stage I and a request will take by that; None where no curvature is kept.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    points: TrainingPoints
    settings: Settings
    newton_steps: int
    batch_size: int
    preflight: Preflight = Preflight(0.0, 0.0, 0.0)
    representation: str = "dense"
    sketch: int | str = 0
    flows: bool = False
    maxima: LastMaxima = field(default_factory=LastMaxima, repr=False)
    cost: Cost | None = None

    def rehearse(self) -> None:
        """Two points through all that comes after training; what it takes, for a person."""
        settings, device = self.settings, self.trainer.strategy.root_device
        check_precision(self.trainer, settings.view(self.module))
        has_memory = METHODS[settings.method].has_memory
        kept = self._represented(settings if has_memory else settings.robust())
        self.representation, self.sketch = kept.settings.representation, kept.settings.sketch
        settings = self._kept_as(settings)
        stages = [settings.robust()] if self.newton_steps else []
        stages += [settings] if has_memory or not stages else []
        p = settings.view(self.module).p
        self.preflight = rehearse(self.module, stages, self._read, self.points.known_targets())
        if has_memory:
            self.preflight = time_pass(self.module, settings, self._read, self.preflight)
            mine = -(-len(self.points) // self.trainer.world_size)
            size = self.preflight.piece(self.batch_size)
            self.cost = self.preflight.cost(
                mine, p, size, self.newton_steps, kept, device, self.flows
            )
            chosen = f"sketch='auto' is {counted(settings.probes, 'probe')} a point; "
            said = chosen if self.settings.sketch == "auto" else ""
            rank_zero_info(f"{said}{kept.why}; {self.cost}")

    def _represented(self, settings: Settings) -> Representation:
        """How the memory is kept, and Newton's Hessians before it."""
        trainer, device = self.trainer, self.trainer.strategy.root_device
        inputs = self._read(1).x[0].numel()
        mine = -(-len(self.points) // trainer.world_size)
        sharing = trainer.num_devices if device.type == "cpu" else 1
        view, world = settings.view(self.module), trainer.world_size
        settings = with_probes(settings, view, inputs, len(self.points))
        return represented(settings, view, inputs, mine, device, sharing, world)

    def _kept_as(self, settings: Settings) -> Settings:
        return replace(settings, representation=self.representation, sketch=self.sketch)

    def _read(self, count: int) -> Batch:
        """Some points, spread over the data set."""
        n = len(self.points)
        some = sorted({i * (n - 1) // max(count - 1, 1) for i in range(count)})
        device = self.trainer.strategy.root_device
        return self._as_trained(next(self.points.batches(some, count, device)))

    def _as_trained(self, batch: Batch) -> Batch:
        """A batch in the dtype that the trainer's precision gives to training's own batches.

        Under half precision it is not rounded: what is differentiated is of single precision, and
        so are the points of a request.
        """
        dtype = computing(next(self.module.parameters()).dtype)
        given: list[Any] = [batch.x, batch.targets, batch.beside.rows]
        converted = self.trainer.precision_plugin.convert_input(given)
        rounded = computing(converted[0].dtype) != converted[0].dtype
        x, targets, rows = given if rounded else converted
        beside = replace(batch.beside, rows=rows).to(None, dtype)
        return replace(batch, x=x.to(dtype), targets=targets, beside=beside)

    def newton(self, settings: Settings, weights: Tensor) -> list[float]:
        """Newton steps on the robust objective; if one fails, ω is again what training made it."""
        robust = self._kept_as(settings.robust())
        target = self.objective(robust, weights)
        trained = target.view.get()
        try:
            with measuring(self.module):  # no step is rounded, the last one is
                return newton(target, self.newton_steps, robust.damping)
        except BaseException:
            target.view.set(trained)  # exact: float64 holds every value of a smaller dtype
            raise

    def objective(self, settings: Settings, weights: Tensor) -> RobustObjective:
        """The robust objective over training points, each counted once over all processes."""
        view, group = settings.view(self.module), process_group(self.trainer)
        passes = itertools.count(1)

        def batches() -> Iterator[Batch]:
            return self._batches(weights, f"newton_steps, pass {next(passes)}")

        problem, empty = settings.problem(), settings.empty_sum
        return RobustObjective(view, problem, batches, group, empty, self.maxima)

    def stage_one(
        self,
        settings: Settings,
        weights: Tensor,
        digests: Tensor,
        key: bytes,
        initial: Tensor | None,
        flow: TrainingFlow | None = None,
    ) -> UnlearningMemory:
        """The memory at the trained ω.

        Args:
            settings: with the λ and the horizon of the training.
            weights: how much each point counted in training (n,).
            digests: of all points (n, 16).
            key: of the digests.
            initial: the ω (p,) that training started from.
            flow: how long training went, where ``settings`` take its horizon.

        Raises:
            ConfigurationError: the robust gradient is not finite.
        """
        settings = self._kept_as(settings)
        group = process_group(self.trainer)
        (memory,) = build_memories(
            self.module,
            [settings],
            self._batches(weights, "Stage I"),
            digests,
            key,
            group,
            initial,
            weights,
            flow,
            self.maxima,
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
        blocks: Tensor,
    ) -> UnlearningMemory:
        """The memory with the users' keys of its points, what was found, and one id everywhere.

        Args:
            memory: as Stage I made it.
            texts: a key a point, or None.
            findings: what the memory does not assume of its training.
            policy: when a rebase is due.
            blocks: digests (k, 16) of 512 points each.
        """
        own = ids_key(memory.key)
        return replace(
            memory,
            warnings=(*memory.warnings, *findings),
            ids=None if texts is None else id_digests(own, texts),
            ids_key=own,
            rebase_policy=policy,
            blocks=blocks,
            memory_id=self.trainer.strategy.broadcast(memory.memory_id),
        )

    def _batches(self, weights: Tensor, what: str) -> Iterator[Batch]:
        """This process's share of the points that were trained on, with a progress bar."""
        trainer, done = self.trainer, 0
        mine = process_group(trainer).share(torch.nonzero(weights > 0).flatten().tolist())
        size = self.preflight.piece(self.batch_size)
        device = trainer.strategy.root_device
        found = self.points.batches(mine, size, device, weights)
        for batch in bar_of(trainer)(found, what, len(mine), len):
            check_not_stopped(trainer, done, len(mine))
            yield self._as_trained(batch)
            done += len(batch)


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


def report(
    memory: UnlearningMemory, cost: Cost | None, folder: str | None, known: Sequence[str] = ()
) -> None:
    """Three lines on a new memory, and a warning of each thing that is in doubt.

    Args:
        memory: as Stage I built it.
        cost: what a request was estimated to take; None for a method that keeps no curvature.
        folder: where the memory is kept, None where it is in the process alone.
        known: what was warned of before.
    """
    for line in (_kept(memory, cost, folder), _trust(memory), _price(memory, cost)):
        rank_zero_info(line)
    for sentence in memory.warnings:
        if sentence not in known:
            warnings.warn(sentence, stacklevel=2)


def _kept(memory: UnlearningMemory, cost: Cost | None, folder: str | None) -> str:
    where = "in this process alone" if folder is None else f"in {folder}, with the current model"
    points = counted(memory.summary["n"], "training point")
    if cost is None:
        return f"Kept: which {points} there were, {where}; method {memory.settings.method!r}."
    return (
        f"Kept: the curvature of {points} in {memory.p:,} trained parameters "
        f"({memory.settings.method}, {memory.settings.representation}, {cost.kept}), {where}."
    )


def _trust(memory: UnlearningMemory) -> str:
    summary = memory.summary
    said = [f"{summary['stationary']:.0%} of the perturbations are stationary"]
    if "retrace_error" in summary:
        said.append(f"training's way is retraced to {summary['retrace_error']:.1%}")
    elif "distance_to_optimum" in summary:
        said.append(f"the optimum is {summary['distance_to_optimum']:.2g} away")
    if "sketch_noise" in summary:
        said.append(f"the probes' noise is {summary['sketch_noise']:.1%} of an update")
    if memory.settings.response == "unconstrained" and summary["usable_response"] < 1:
        said.append(f"the response exists at {summary['usable_response']:.0%} of the points only")
    verdict = "nothing speaks against it"
    if memory.warnings:
        verdict = f"in doubt, see {counted(len(memory.warnings), 'warning')}"
    return f"Trust: {verdict}; {', '.join(said)}; memory.summary has the rest."


def _price(memory: UnlearningMemory, cost: Cost | None) -> str:
    if cost is None:
        method = memory.settings.method
        return "A request: a training again." if method == "retrain" else "A request: nothing."
    return f"A request: {cost.request} for one point, with no training."
