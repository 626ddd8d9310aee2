"""`AdversarialTraining`: the callback that swaps batches for adversarial ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from lightning_muter.adversary.ascent import (
    own_random_numbers,
    projected_gradient_ascent,
    without_blind_spots,
)
from lightning_muter.adversary.attack_library import Attack
from lightning_muter.adversary.two_sided import seeded_start
from lightning_muter.arguments import optional, whole
from lightning_muter.errors import ConfigurationError, MuterError
from lightning_muter.lightning.fidelity.attacked import AttackedPoints
from lightning_muter.lightning.flavour import pl
from lightning_muter.lightning.kept_state import untouched
from lightning_muter.lightning.two_points import check_gradient, check_outputs, check_targets
from lightning_muter.models import NOTHING, BatchForm, Beside, Logits, LogitsForm, evaluating
from lightning_muter.models.batches import Where
from lightning_muter.models.logits import Forward, Output
from lightning_muter.objectives.base import Objective
from lightning_muter.objectives.losses import PointLoss
from lightning_muter.objectives.module_loss import ModuleLoss, asked_loss, loss_in
from lightning_muter.objectives.resolve import AnyLoss, resolve_loss, resolve_objective
from lightning_muter.objectives.standard import Standard
from lightning_muter.objectives.trades import TRADES
from lightning_muter.threats import Threat

__all__ = ["AdversarialTraining"]


class AdversarialTraining(pl.Callback):
    """Swaps each training batch for its adversarial version; logs clean and robust accuracy.

    The batch's list, dictionary or object is changed, never a tensor of the data set, and
    ``training_step`` sees it in the shape in which the loader gave it. In validation and test the
    clean and robust accuracy (mean loss for regression) are logged as ``val_clean_acc``,
    ``val_robust_acc``, ``test_clean_acc``, ``test_robust_acc``. A point at which the attack had no
    gradient is attacked again from random starts before it counts as robust. Inputs outside the
    threat's ``data_range`` are refused before anything is trained on them.

    Args:
        threat: the constraint set.
        attack: an `Attack`, or None for the threat's own projected gradient ascent.
        loss: what the attack ascends; the name of an attribute of the module takes its loss object.
        attack_steps: steps of the threat's own ascent, at least 1.
        attack_step_size: its step, in the units of ``eps``; None for 2.5 · eps / attack_steps.
        random_start: start at a random allowed perturbation.
        objective: `TRADES`: the attack moves the outputs away from those of the clean point,
            training batches are [input, target, perturbed input], and accuracies are of attacks
            on ``loss``, as they are without; None for adversarial training.
        batch: where a batch's input and target are, and after them what forward takes beside x:
            names or positions, or a function batch -> (x, target, ...); None to find them.
        output: where the logits are in what the module returns: a key, a position, an attribute, or
            a function of it; None to find them.
        forward: a method's name or a function (module, x) -> logits, where calling the module with
            x alone gives none.

    Raises:
        ConfigurationError: an argument is outside what it says here; while a trainer runs, inputs
            outside the threat's range, NaN among them, outputs or targets that the loss does not
            fit, or an attack that leaves the threat's set.
    """

    def __init__(
        self,
        threat: Threat,
        attack: Attack | None = None,
        loss: AnyLoss = "cross_entropy",
        attack_steps: int = 10,
        attack_step_size: float | None = None,
        random_start: bool = True,
        objective: TRADES | None = None,
        batch: Where | None = None,
        output: Output | None = None,
        forward: Forward | None = None,
    ) -> None:
        if not isinstance(threat, Threat):
            raise ConfigurationError(f"threat={threat!r} must be a Threat: L2Ball(eps=0.5)")
        self.threat = threat
        if not isinstance(attack, (Attack, type(None))):
            raise ConfigurationError(
                f"attack={attack!r} must be an Attack, as Attack('torchattacks.PGDL2', "
                "init_args={...}), or None for the threat's own ascent"
            )
        self.attack = None if attack is None else attack.scaled(threat.scaling)
        self._moved = None if attack is None else AttackedPoints(threat, attack.class_path)
        self._attack_refused = False
        self.loss = loss
        self.attack_steps = whole("attack_steps", attack_steps, 1)
        step = optional("attack_step_size", attack_step_size, positive=True)
        self.attack_step_size = threat.step_size(self.attack_steps) if step is None else step
        self.random_start = random_start
        self._batch, self._logits = BatchForm.of(batch), LogitsForm(forward, output)
        if not isinstance(asked_loss(loss), ModuleLoss):  # which is looked up in the module
            resolve_objective(objective, loss)
        self._trades = objective
        _check_attack(attack, objective)
        self._put_back: Callable[[], None] | None = None
        self._tried = False
        self._clean, self._robust = MeanMetric(), MeanMetric()
        self._blind = SumMetric()
        self._inputs_refused = False

    def perturb(
        self, module: nn.Module, x: Tensor, targets: Tensor, beside: Beside = NOTHING
    ) -> Tensor:
        """Adversarial inputs (n, ...), of x's dtype and on its device.

        Module mode, gradients and random states are left as they were.

        Args:
            module: whose loss is ascended.
            x: inputs (n, ...), on the scale that the module receives.
            targets: as the loss takes them, (n,) of classes.
            beside: what forward takes of the points beside x.
        """
        logits = self._logits.of(module, beside)
        return self._attacked(logits, self._objective_in(module), x, targets)

    def _attacked(self, logits: Logits, objective: Objective, x: Tensor, targets: Tensor) -> Tensor:
        self._try(logits, objective.loss, x, targets)
        with evaluating(logits), own_random_numbers(x):
            x = x.detach().clone()
            if self.attack is not None:
                moved = self.attack(logits, x, targets.clone())
                self._check_moved(x, moved)
                return moved
            return projected_gradient_ascent(
                logits,
                objective.inner,
                self.threat,
                x,
                objective.reference(lambda: logits(x), targets.clone()),
                self.attack_steps,
                self.attack_step_size,
                self._start(objective, x),
            )

    def _check_moved(self, x: Tensor, adversarial: Tensor) -> None:
        """Refuse an attack that leaves the threat's set; once, where it goes on."""
        if self._moved is None or self._attack_refused:
            return
        try:
            self._moved.see(x, adversarial)
        except ConfigurationError as error:
            self._attack_refused = True
            self._refuse(error)

    def _start(self, objective: Objective, x: Tensor) -> Tensor:
        """The perturbations (n, d) that training's own ascent starts from."""
        flat = self.threat.flat_pixels(x)
        if self.random_start:
            return self.threat.random_start(flat)
        return seeded_start(self.threat, flat) if objective.even else torch.zeros_like(flat)

    def _loss_in(self, module: nn.Module) -> PointLoss:
        return resolve_loss(loss_in(self.loss, module))

    def _objective_in(self, module: nn.Module) -> Objective:
        return resolve_objective(self._trades, loss_in(self.loss, module))

    def _try(self, logits: Logits, loss: PointLoss, x: Tensor, targets: Tensor) -> None:
        """Two points first: what the module cannot do is said by what would help."""
        if not self._tried:
            two = logits.form.of(logits.module, logits.beside.part(slice(2)))
            with untouched(two), evaluating(two):
                outputs = check_outputs(two, x[:2].clone())
                check_targets(loss, targets[:2], outputs)
                check_gradient(two, loss, x[:2].clone(), targets[:2].clone())
        self._tried = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._tried = False
        self._loss_in(pl_module)
        self._batch = self._batch.taking(self._logits.takes(pl_module))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._inputs_refused = self._attack_refused = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        x, targets, beside = self._batch.read(batch)
        self._check_inputs(x)
        perturbed = self.perturb(pl_module, x, targets, beside)
        if self._trades is None:
            self._put_back = self._batch.put(batch, x, perturbed)
        else:
            self._trades.hand_over(batch, perturbed)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._unperturb()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._unperturb()

    def _unperturb(self) -> None:
        """A tensor that showed the perturbed values shows its own again."""
        if self._put_back is not None:
            self._put_back()
        self._put_back = None

    def _check_inputs(self, x: Tensor) -> None:
        """Refuse inputs (n, ...) on which the threat is not what it says; once, where it goes on.

        Every batch is looked at: the first may lie inside by chance.
        """
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise ConfigurationError("a batch has NaN or infinite inputs: mend the data set")
        if self._inputs_refused:
            return
        try:
            self.threat.check_inputs(x)
        except ConfigurationError as error:
            self._refuse(error)
            self._inputs_refused = True

    def _refuse(self, error: MuterError) -> None:
        """What happens on a refusal: it is raised. A subclass may let some pass with a warning."""
        raise error

    def _attack_hard(self, logits: Logits, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Adversarial inputs to measure by, and the points (n,) that no gradient led anywhere."""
        loss = self._loss_in(logits.module)
        adversarial = self._attacked(logits, Standard(loss), x, targets)
        with evaluating(logits), own_random_numbers(x):
            return without_blind_spots(
                logits,
                loss,
                self.threat,
                x.detach().clone(),
                targets.clone(),
                adversarial.clone(),
                self.attack_steps,
                self.attack_step_size,
            )

    def _measure(self, pl_module: pl.LightningModule, batch: Any) -> None:
        x, targets, beside = self._batch.read(batch)
        logits, loss = self._logits.of(pl_module, beside), self._loss_in(pl_module)
        self._check_inputs(x)
        adversarial, blind = self._attack_hard(logits, x, targets)
        self._blind.to(x.device).update(blind.sum())
        for metric, inputs in ((self._clean, x), (self._robust, adversarial)):
            with evaluating(logits), torch.no_grad():
                outputs = logits(inputs).detach()
                correct = loss.is_correct(outputs, targets)
                value = loss(outputs, targets) if correct is None else correct.float()
            metric.to(x.device).update(value)

    def _report(self, pl_module: pl.LightningModule, stage: str) -> None:
        kind = "acc" if self._loss_in(pl_module).classifies else "loss"
        for name, metric in (("clean", self._clean), ("robust", self._robust)):
            pl_module.log(f"{stage}_{name}_{kind}", metric.compute())
            metric.reset()
        blind = int(self._blind.compute())
        self._blind.reset()
        if blind:
            warnings.warn(
                f"at {blind} points the gradient of the loss in the input is exactly zero, from "
                f"random starts as well: no attack by gradients finds anything there, and "
                f"{stage}_robust_{kind} counts them as robust without evidence; a network with "
                "dead units, a rounding or an output that is constant does this",
                stacklevel=2,
            )

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._measure(pl_module, batch)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._measure(pl_module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(pl_module, "test")


def _check_attack(attack: Attack | None, objective: TRADES | None) -> None:
    """Refuse a library's attack that does not maximise what the objective's adversary does."""
    if attack is None or objective is None or attack.class_path.endswith(".TPGD"):
        return
    raise ConfigurationError(
        f"attack={attack.class_path!r} with objective={objective}: it maximises the cross-entropy, "
        "not the divergence that TRADES trains against; leave attack out for the threat's own "
        "ascent, or use 'torchattacks.TPGD'"
    )
