"""Adversarial training of a linear model as a user would run it, down to a certificate's radius.

Lightning's loop with `AdversarialTraining`'s perturbations and `torch.optim.LBFGS` on all points at
once: no second-order step of the package, no memory, no reading from a loader point by point.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
from closed_form import LAMBDA, value_and_slope
from common import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_muter import AdversarialTraining, L2Ball, Trainer


@dataclass(frozen=True)
class Trained:
    """Where a training ended, and after how long; checks of its bound are not counted."""

    weights: np.ndarray
    bound: float
    steps: int
    seconds: float
    processor: float


class Whole(Dataset[list[Tensor]]):
    """All points as one batch."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.batch = [x, y]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[Tensor]:
        return list(self.batch)


class Linear(pl.LightningModule):
    """A linear model without a bias."""

    def __init__(self, features: int, loss: str) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(features, 1, bias=False), loss
        nn.init.normal_(self.head.weight, std=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        z, y = self(batch[0]).squeeze(1), batch[1].to(batch[0])
        if self.loss == "squared":
            return 0.5 * (z - y).square().mean()
        return nn.functional.binary_cross_entropy_with_logits(z, y)


class Usual(Linear):
    """The same with its weight decay in the loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        decay = 0.5 * LAMBDA * self.head.weight.square().sum()
        return super().training_step(batch, batch_idx) + decay

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            self.parameters(),
            max_iter=1,  # a fresh perturbation each
            max_eval=20,
            history_size=50,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )


class UntilNear(pl.Callback):
    """Stops where the bound is at most the radius, or when the seconds are over."""

    def __init__(self, x: np.ndarray, y: np.ndarray, eps: float, loss: str, radius: float) -> None:
        self.given, self.radius, self.cap = (x, y, eps, loss), radius, 0.0
        self.bound, self.steps = np.inf, 0
        self.begun = self.checks = np.zeros(2)

    def read(self) -> np.ndarray:
        now = np.array([time.perf_counter(), time.process_time()])
        return now - self.begun - self.checks

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: object
    ) -> None:
        self.steps += 1
        spent = self.read()
        w = module.head.weight.detach().numpy()[0]
        slope = value_and_slope(w, *self.given)[1]
        bound = float(np.linalg.norm(slope)) / (LAMBDA * len(self.given[0]))
        self.bound = min(self.bound, bound)
        trainer.should_stop = self.bound <= self.radius or spent[1] > self.cap
        self.checks = self.checks + (self.read() - spent)


def trained(
    x: Tensor, y: Tensor, eps: float, loss: str, radius: float, cap: float = 120.0
) -> Trained:
    """A training from scratch until ‖∇F‖/κ is at most the radius, or for ``cap`` seconds."""
    pl.seed_everything(1, verbose=False)
    adversary = AdversarialTraining(L2Ball(eps), loss=loss, attack_steps=2, random_start=False)
    until = UntilNear(x.numpy(), y.double().numpy(), eps, loss, radius)
    trainer = Trainer(max_epochs=-1, callbacks=[adversary, until], precision="64-true", **QUIET)
    until.cap, until.begun = cap, np.array([time.perf_counter(), time.process_time()])
    model = Usual(x.shape[1], loss)
    trainer.fit(model, DataLoader(Whole(x, y), batch_size=None))
    seconds, processor = until.read().tolist()
    weights = model.head.weight.detach().numpy()[0]
    return Trained(weights, until.bound, until.steps, seconds, processor)
