"""The training attack, and the callback that swaps batches for adversarial ones."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_muter.errors import ConfigurationError
from lightning_muter.models import measuring
from lightning_muter.objectives.losses import LossFunction, PointLoss, resolve_loss
from lightning_muter.threats import Threat

__all__ = ["AdversarialTraining", "Attack", "projected_gradient_ascent"]


def projected_gradient_ascent(
    module: nn.Module,
    loss: PointLoss,
    threat: Threat,
    x: Tensor,
    targets: Tensor,
    steps: int,
    step_size: float,
    random_start: bool,
) -> Tensor:
    """x + δ (n, ...) after ``steps`` ascent steps in the threat's geometry, any loss and shape."""
    flat = x.detach().reshape(len(x), -1)
    delta = threat.random_start(flat) if random_start else torch.zeros_like(flat)
    for _ in range(steps):
        inputs = (flat + delta).reshape(x.shape).requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(module(inputs), targets).sum(), inputs)
        delta = threat.step(flat, delta, grad.reshape(flat.shape), step_size).detach()
    return (flat + delta).reshape(x.shape)


@contextmanager
def _fixed_rng(x: Tensor) -> Iterator[None]:
    """The attack's random start is its own: the training's random numbers go on as without it."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


class _Outputs(nn.Module):
    """The module as torchattacks sees it: images in [0, 1] in, logits out."""

    def __init__(self, module: nn.Module, mean: Tensor | None, std: Tensor | None) -> None:
        super().__init__()
        self.module, self.mean, self.std = module, mean, std

    def forward(self, images: Tensor) -> Any:
        if self.mean is not None and self.std is not None:
            images = (images - self.mean.to(images)) / self.std.to(images)
        return self.module(images)


class Attack:
    """A torchattacks attack by class path, for image classifiers.

    Args:
        class_path: for example "torchattacks.PGDL2", "torchattacks.PGD", "torchattacks.FGSM".
        mean: per-channel mean that the module's inputs were normalised by, if they were.
        std: per-channel standard deviation, likewise.
        init_args: arguments of the attack's constructor, on the [0, 1] scale.

    Raises:
        ConfigurationError: the class cannot be imported.

    Example:
        >>> Attack("torchattacks.FGSM", init_args={"eps": 0.1}).class_path
        'torchattacks.FGSM'
    """

    def __init__(
        self,
        class_path: str,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        init_args: dict[str, Any] | None = None,
    ) -> None:
        module_name, _, name = class_path.rpartition(".")
        try:
            self._class = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(
                f"attack {class_path!r} cannot be imported ({error}); expected a class path such "
                "as 'torchattacks.PGDL2'"
            ) from error
        if (mean is None) != (std is None):
            raise ConfigurationError("mean and std of the normalisation go together: give both")
        self.class_path = class_path
        self.init_args = dict(init_args or {})
        self._mean = None if mean is None else torch.tensor(mean).reshape(1, -1, 1, 1)
        self._std = None if std is None else torch.tensor(std).reshape(1, -1, 1, 1)

    def __call__(self, module: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        """Adversarial inputs on the module's own scale, as x (n, C, H, W)."""
        if x.ndim != 4:
            raise ConfigurationError(
                f"{self.class_path} needs images (n, C, H, W), got {tuple(x.shape)}; use the "
                "threat's own ascent (attack=None)"
            )
        images = x
        if self._mean is not None and self._std is not None:
            images = x * self._std.to(x) + self._mean.to(x)
        if float(images.min()) < -1e-4 or float(images.max()) > 1 + 1e-4:
            raise ConfigurationError(
                f"{self.class_path} needs pixels in [0, 1], got [{float(images.min()):.3g}, "
                f"{float(images.max()):.3g}]; say mean= and std= if they are normalised"
            )
        attack = self._class(_Outputs(module, self._mean, self._std).eval(), **self.init_args)
        adversarial = attack(images.clamp(0, 1), targets)
        if self._mean is not None and self._std is not None:
            adversarial = (adversarial - self._mean.to(x)) / self._std.to(x)
        result: Tensor = adversarial.detach().to(x)
        return result


class AdversarialTraining(pl.Callback):
    """Swaps each training batch for its adversarial version; logs clean and robust accuracy.

    The batch's list is changed, never a tensor of the data set. In validation and test the clean
    and robust accuracy (mean loss for regression) are logged as ``val_clean_acc``,
    ``val_robust_acc``, ``test_clean_acc``, ``test_robust_acc``.

    Args:
        threat: the constraint set.
        attack: an `Attack`, or None for the threat's own projected gradient ascent.
        loss: what the attack ascends.
        attack_steps: steps of the threat's own ascent.
        attack_step_size: its step; None for 2.5 · eps / attack_steps.
        random_start: start at a random allowed perturbation.
    """

    def __init__(
        self,
        threat: Threat,
        attack: Attack | None = None,
        loss: str | LossFunction = "cross_entropy",
        attack_steps: int = 10,
        attack_step_size: float | None = None,
        random_start: bool = True,
    ) -> None:
        self.threat = threat
        self.attack = attack
        self.loss = loss
        self.attack_steps = attack_steps
        self.attack_step_size = attack_step_size or 2.5 * threat.eps / max(attack_steps, 1)
        self.random_start = random_start
        self._point_loss = resolve_loss(loss)
        self._clean, self._robust = MeanMetric(), MeanMetric()

    def perturb(self, module: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        """Adversarial inputs (n, ...); module mode, gradients and RNG are left as they were."""
        with measuring(module), _fixed_rng(x):
            x = x.detach().clone()
            if self.attack is not None:
                return self.attack(module, x, targets.clone())
            return projected_gradient_ascent(
                module,
                self._point_loss,
                self.threat,
                x,
                targets.clone(),
                self.attack_steps,
                self.attack_step_size,
                self.random_start,
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, list):
            raise ConfigurationError(
                f"a training batch is a {type(batch).__name__}; expected a list [input, target], "
                "as default_collate makes it: return one from collate_fn"
            )
        batch[0] = self.perturb(pl_module, batch[0], batch[1])

    def _measure(self, pl_module: pl.LightningModule, batch: Any) -> None:
        x, targets = batch[0], batch[1]
        adversarial = self.perturb(pl_module, x, targets)
        with torch.no_grad():
            for metric, inputs in ((self._clean, x), (self._robust, adversarial)):
                outputs = pl_module(inputs)
                correct = self._point_loss.is_correct(outputs, targets)
                value = self._point_loss(outputs, targets) if correct is None else correct.float()
                metric.to(x.device).update(value)

    def _report(self, pl_module: pl.LightningModule, stage: str) -> None:
        kind = "loss" if self._point_loss.name == "squared" else "acc"
        for name, metric in (("clean", self._clean), ("robust", self._robust)):
            pl_module.log(f"{stage}_{name}_{kind}", metric.compute())
            metric.reset()

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
