"""Adversarial training of a linear model as a user would run it, down to a certificate's radius.

Lightning's loop with `AdversarialTraining`'s perturbations and `torch.optim.LBFGS` on all points at
once: no second-order step of the package, no memory, no reading from a loader point by point. Run
by itself it prints what SGD with a falling rate, in batches of 128, comes to on Covtype (logistic).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from closed_form import LAMBDA, newton_optimum, value_and_slope
from common import QUIET, arguments
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_muter import AdversarialTraining, L2Ball, Trainer


def covtype(data: str) -> tuple[Tensor, Tensor]:
    """The 10,000-row sample: type 2 against the rest, columns in [0, 1]."""
    with np.load(Path(data) / "covtype10k.npz") as arrays:
        x = torch.tensor(arrays["features"]).double()
        y = (torch.tensor(arrays["cover_type"]) == 2).long()
    low, high = x.amin(dim=0), x.amax(dim=0)
    return (x - low) / (high - low).clamp(min=1), y


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


class Falling(Usual):
    """By SGD, its rate 1 / (λ (t + t_0)) at step t, from 1/2 on."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + 0.5 * LAMBDA * t))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


class UntilNear(pl.Callback):
    """Stops where the bound is at most the radius, or when the seconds are over.

    It looks after each ``every`` steps.
    """

    def __init__(
        self, x: np.ndarray, y: np.ndarray, eps: float, loss: str, radius: float, every: int
    ) -> None:
        self.given, self.radius, self.cap, self.every = (x, y, eps, loss), radius, 0.0, every
        self.bound, self.steps = np.inf, 0
        self.begun = self.checks = np.zeros(2)

    def read(self) -> np.ndarray:
        now = np.array([time.perf_counter(), time.process_time()])
        return now - self.begun - self.checks

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: object
    ) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
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
    loader: DataLoader[Any] = DataLoader(Whole(x, y), batch_size=None)
    return _trained(Usual(x.shape[1], loss), loader, x, y, eps, radius, cap)


def fallen(x: Tensor, y: Tensor, eps: float, radius: float, cap: float) -> Trained:
    """The same by SGD with a falling rate; its logistic loss is looked at after each epoch."""
    pl.seed_everything(1, verbose=False)
    loader: DataLoader[Any] = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True)
    return _trained(Falling(x.shape[1], "logistic"), loader, x, y, eps, radius, cap)


def _trained(
    model: Linear,
    loader: DataLoader[Any],
    x: Tensor,
    y: Tensor,
    eps: float,
    radius: float,
    cap: float,
) -> Trained:
    loss = model.loss
    adversary = AdversarialTraining(L2Ball(eps), loss=loss, attack_steps=2, random_start=False)
    until = UntilNear(x.numpy(), y.double().numpy(), eps, loss, radius, len(loader))
    trainer = Trainer(max_epochs=-1, callbacks=[adversary, until], precision="64-true", **QUIET)
    until.cap, until.begun = cap, np.array([time.perf_counter(), time.process_time()])
    trainer.fit(model, loader)
    seconds, processor = until.read().tolist()
    weights = model.head.weight.detach().numpy()[0]
    return Trained(weights, until.bound, until.steps, seconds, processor)


def main() -> None:
    """Print one JSON line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--cap", type=float, default=30.0, help="seconds of the processor")
    given = parser.parse_args()
    x, y = covtype(given.data)
    found = fallen(x, y, 0.1, 1e-6, given.cap)
    best = newton_optimum(found.weights, x.numpy(), y.double().numpy(), 0.1)
    line = {
        "setting": "covtype, logistic, SGD with a falling rate",
        "bound": found.bound,
        "distance": float(np.linalg.norm(found.weights - best)),
        "steps": found.steps,
        "seconds": found.seconds,
        "of the processor": found.processor,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
