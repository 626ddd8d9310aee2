"""`MUterCallback`: adversarial finetuning of a head, then Stage I."""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_muter.adversary.attack_library import Attack
from lightning_muter.arguments import whole
from lightning_muter.errors import ConfigurationError, MuterError, StateError
from lightning_muter.lightning.adversarial_training import AdversarialTraining
from lightning_muter.lightning.after_training import (
    AfterTraining,
    points_of,
    refuse_spawned,
    report,
)
from lightning_muter.lightning.callback_arguments import Arguments
from lightning_muter.lightning.fidelity.averaging import averaging_of, check_order, check_unmoved
from lightning_muter.lightning.fidelity.decay import check_held, decay_and_penalty
from lightning_muter.lightning.fidelity.flow import horizon_of
from lightning_muter.lightning.fidelity.frozen import check_finetuning
from lightning_muter.lightning.fidelity.watch import TrainingWatch
from lightning_muter.lightning.flavour import pl, refuse_other
from lightning_muter.lightning.folder import check_free, create, folder_name, model_path, rewritten
from lightning_muter.lightning.keeper import (
    MemoryKeeper,
    check_resumed,
    forgotten,
    refuse_relearning,
)
from lightning_muter.lightning.kept_state import KeptState
from lightning_muter.lightning.point_ids import Ids, ids_of
from lightning_muter.lightning.process_group import process_group
from lightning_muter.lightning.rescue import Rescue
from lightning_muter.lightning.unlearn import unlearn
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.rebase_policy import RebasePolicy
from lightning_muter.models.batches import Where
from lightning_muter.models.logits import Forward, Output
from lightning_muter.objectives.module_loss import loss_in
from lightning_muter.objectives.resolve import AnyLoss
from lightning_muter.objectives.trades import TRADES
from lightning_muter.options import Ascent, Options
from lightning_muter.threats import Threat

__all__ = ["MUterCallback"]


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
        loss: "cross_entropy", "logistic", "squared"; a loss module of torch by its own arguments,
            ``nn.CrossEntropyLoss(label_smoothing=0.1)``; a callable (outputs, targets) -> (n,); or
            the name of the module's attribute that holds its loss module, as "criterion".
        method: a row of ``METHODS``.
        attack: the training attack: an `Attack` of a library, or an `Ascent`; None for the threat's
            own ascent as the three keywords below describe it.
        response: "constrained" (ours) or "unconstrained" (the paper's eq. 4); or a
            `ConstrainedResponse` or `UnconstrainedResponse`, in the place of the keywords.
        inverse: with "unconstrained": "neumann" or "exact".
        neumann_order: where the series is clipped.
        space: "input", or "features": the paper's variant for networks.
        newton_steps: Newton steps on the robust objective before Stage I.
        damping: added to M before each solve.
        solver: "direct", "schur" (Theorem 2, matrix-free), "auto" by size; or a `DirectSolver` or
            `BlockSolver`.
        sketch: seeded probes a point for the inner response where all of ∂φ/∂x is too dear (a
            wide network's head); "auto" for as many as keep the rows of all points within 1 GiB,
            one to sixteen; 0 for the exact response. Without effect on a linear model and with a
            threat's temperature, whose responses are exact.
        representation: how the curvature is kept: "dense" (p, p), "sharded" (the same matrix,
            its rows over the trainer's processes), "rows" (a few vectors a point, for a linear head
            of any size), or "auto", dense or rows by both sizes and the free memory; or a `Rows`.
        row_dtype: of the rows: "float64", or "float32" for half the memory.
        solver_tol: relative residual at which a solve with rows stops; None for 1e-8 in float64 and
            1e-5 in float32.
        weight_decay: λ; None reads it from the optimizer.
        memory_dir: where to save the memory and the model, and keep both current
            (``model.ckpt``, always the current one); None keeps the memory in the process.
        horizon: how long a Retrain would train, where training does not reach its optimum: the
            step goes as far as a gradient flow of that time. "training" is this training's own,
            Σ lr / n of plain SGD, averaged where a Lightning callback averages the weights;
            a number is taken as it is; None is an infinite one, the paper's.
        batch_size: points a pass reads at once.
        attack_steps: steps of the threat's own ascent.
        attack_step_size: its step length.
        random_start: start the training attack at a random allowed perturbation.
        strict: refuse training that is not what the memory assumes (its points, loss, outputs,
            steps, frozen part, range of inputs); False warns instead and keeps what was found in
            ``findings``, the memory's ``warnings`` and every result.
        overwrite: let the new memory take the place of one that ``memory_dir`` holds; that one is
            whole until the new one is complete.
        ids: a key (a string or an integer) a training point, or the name of the data set's
            attribute that holds them, so that ``RemovalDataModule(data, ids=[...])`` can name
            points; the memory keeps keyed digests of them.
        rebase_every: requests after which a result asks for a rebase; None never asks.
        rebase_after: days from the first request that was not followed by a rebase, likewise.
        objective: ``TRADES(beta=6.0)``, with ``loss`` at the clean point; training batches are then
            [input, target, perturbed input], and ``training_step`` may return
            ``objective.loss(self, batch)``; None for adversarial training.
        batch: where a batch's input and target are, and after them what forward takes beside x:
            names or positions, or a function batch -> (x, target, ...); None to find them.
        output: where the logits are in what the module returns: a key, a position, an attribute, or
            a function of it; None to find them.
        forward: a method's name or a function (module, x) -> logits, where calling the module with
            x alone gives none: it flattens elsewhere, runs its backbone without gradients, or has
            no ``forward``.

    Raises:
        ConfigurationError: an argument is outside what it says here; in fit, training is not what
            the memory assumes.
    """

    def __init__(
        self,
        threat: Threat,
        head: str | None = None,
        parameters: Sequence[str] | None = None,
        loss: AnyLoss = "cross_entropy",
        method: str = "muter",
        attack: Attack | Ascent | None = None,
        response: str | Options = "constrained",
        inverse: str = "neumann",
        neumann_order: int = 3,
        space: str = "input",
        newton_steps: int = 0,
        damping: float = 0.0,
        solver: str | Options = "auto",
        sketch: int | Literal["auto"] = 0,
        representation: str | Options = "auto",
        row_dtype: str = "float64",
        solver_tol: float | None = None,
        weight_decay: float | None = None,
        memory_dir: str | os.PathLike[str] | None = None,
        horizon: float | Literal["training"] | None = None,
        batch_size: int = 512,
        attack_steps: int = 10,
        attack_step_size: float | None = None,
        random_start: bool = True,
        strict: bool = True,
        overwrite: bool = False,
        ids: Ids | None = None,
        rebase_every: int | None = None,
        rebase_after: float | None = None,
        objective: TRADES | None = None,
        batch: Where | None = None,
        output: Output | None = None,
        forward: Forward | None = None,
    ) -> None:
        asked = Arguments.of(locals())
        super().__init__(**asked.training)
        self.settings, self.newton_steps = asked.settings, asked.newton_steps
        self.weight_decay, self.horizon = asked.weight_decay, asked.horizon
        self.strict, self.overwrite, self.ids = strict, overwrite, ids
        self.rebase_policy = RebasePolicy(rebase_every, rebase_after)
        self.memory_dir = self.folder = folder_name(memory_dir)
        self.batch_size = whole("batch_size", batch_size, 1)
        self.memory: UnlearningMemory | None = None
        self.newton_history: list[float] = []
        self.initial: Tensor | None = None
        #: how much each training point weighs in training's objective (n,), once training ended
        self.point_weights: Tensor | None = None
        #: what was found of training that the memory does not assume (``strict=False``)
        self.findings: list[str] = []
        self._kept: KeptState | None = None
        self._watch: TrainingWatch | None = None
        self._after: AfterTraining | None = None
        self._resumed: dict[str, Any] = {}
        self._id_texts: list[str] | None = None
        self._lambda = 0.0

    # --- before training ------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_other(trainer=trainer, model=pl_module)
        super().setup(trainer, pl_module, stage)
        self.settings = replace(
            self.settings, loss=loss_in(self.loss, pl_module), batch=self._batch
        )
        if not hasattr(trainer, "unlearn"):
            trainer.unlearn = types.MethodType(unlearn, trainer)  # type: ignore[attr-defined]
        if stage != "fit":
            return
        refuse_spawned(trainer)
        view = self.settings.view(pl_module)
        self.initial = view.get()
        self.folder = None if getattr(trainer, "fast_dev_run", False) else self.memory_dir
        check_free(self.folder, self.overwrite)
        refuse_relearning(forgotten(self.memory), self.overwrite)
        self._restore()
        self._kept = KeptState(pl_module)
        self._kept.train_only(pl_module, set(view.names))
        self._watch, self._resumed, self.findings, self.point_weights = None, {}, [], None
        try:
            check_order(trainer.callbacks, self)  # type: ignore[attr-defined]
            check_finetuning(trainer.callbacks)  # type: ignore[attr-defined]
        except ConfigurationError as error:
            self._refuse(error)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        points = points_of(trainer, self.settings.batch).settled()
        self.settings = replace(self.settings, batch=points.form)
        view = self.settings.view(pl_module)
        points.check()
        self._id_texts = ids_of(points.dataset, self.ids)
        check_held(trainer.optimizers, view, self.newton_steps)
        self._lambda, penalty = decay_and_penalty(
            trainer.optimizers,
            view,
            trainer.train_dataloader,  # type: ignore[arg-type]
            self.weight_decay,
            self.newton_steps,
        )
        check_resumed(self, self._resumed, trainer.ckpt_path)
        self._after = AfterTraining(
            trainer,
            pl_module,
            points,
            self.settings,
            self.newton_steps,
            self.batch_size,
            flows=self.horizon is not None,
        )
        self._after.rehearse()
        self._watch = TrainingWatch(
            trainer,
            pl_module,
            view,
            self.settings.head,
            points,
            penalty=penalty,
            flow=self._resumed if self.horizon == "training" else None,
            averaging=averaging_of(trainer, self),
            newton=self.newton_steps > 0,
            reduce=process_group(trainer).sum,
            refuse=self._refuse,
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
        known = {"initial": self.initial, "forgotten": forgotten(self.memory)}
        if self._watch is None:
            return {**self._resumed, **known}
        return {
            **known,
            **self._watch.flow_state(),
            "points": self._watch.state_dict(),
            "findings": list(self.findings),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was."""
        self._resumed, self.initial = dict(state_dict), state_dict["initial"]
        self.findings = list(state_dict.get("findings", ()))

    # --- while training -------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._kept is not None:
            self._kept.evaluate_frozen(pl_module, set(self.settings.view(pl_module).names))
        watch = self._watching()
        watch.received(batch, batch_idx)
        _, targets, beside = self.settings.batch.read(batch)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        trades = self.settings.objective
        seen = self.settings.batch.read(batch)[:1] if trades is None else trades.trained_on(batch)
        watch.perturbed(seen, targets, beside)

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
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watching().epoch_ended()
        if self._moved is not None and not self._attack_refused:
            try:
                self._moved.check_reached(process_group(trainer).sum)
            except ConfigurationError as error:
                self._attack_refused = True
                self._refuse(error)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._kept is not None:  # Lightning does not call teardown after an exception
            self._kept.restore_modes()
        self._restore()
        if trainer.state.fn == "fit":
            refuse_spawned(trainer, exception)

    def _restore(self) -> None:
        """Flags, modes and hooks as they were before fit; any number of times."""
        if self._kept is not None:
            self._kept.restore()
        self._kept = None
        if self._watch is not None:
            self._watch.close()
            self._resumed = self.state_dict()
        self._watch = self._after = None  # with them the trainer and its data

    # --- after training -------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        watch, after = self._watching(), self._after
        assert after is not None  # made with the watch
        rescue = Rescue(trainer, model_path(self.folder))
        rescue.keep()
        watch.finish()
        weights, contents = watch.point_weights, watch.contents
        self.point_weights = weights
        horizon, flow = horizon_of(self.horizon, watch.flow, weights)
        settings = self.settings.trained(self._lambda, horizon)
        if self.newton_steps:
            with rescue.guarding("newton_steps"):
                self.newton_history = after.newton(settings, weights)
            rescue.keep()
        with rescue.guarding("Stage I"):
            start = self.initial, flow
            memory = after.stage_one(settings, weights, contents.digests, contents.key, *start)
        known = self._id_texts, self.findings, self.rebase_policy
        self.memory = after.finished(memory, *known, contents.blocks)
        create(self.memory, self.folder, rescue, self.overwrite)
        rescue.done()
        report(self.memory, after.cost, self.folder, self.findings)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        memory, view = self.memory, self.settings.view(pl_module)
        if memory is None:
            return
        try:
            check_unmoved(memory.omega, view)
            return
        except ConfigurationError as error:
            self._refuse(error)
        said = tuple(dict.fromkeys((*memory.warnings, *self.findings)))
        self.memory = replace(memory, warnings=said)
        self.memory = rewritten(self.memory, self.folder, trainer.is_global_zero)
