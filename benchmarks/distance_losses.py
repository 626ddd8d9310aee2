"""Torch's loss modules: distance of one step to a Retrain that was really run.

A linear head on scikit-learn's digits of 4 x 4 pixels is trained adversarially by label smoothing,
by binary cross-entropies of several labels, or by squares of several outputs, to the optimum of its
objective, and again without the forgotten points.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import QUIET, Points, keep
from distance_trades import memory_of
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_muter import L2Ball, MUterCallback, Trainer, UnlearningMemory
from lightning_muter.unlearning.request import forget

SHARES = (0.01, 0.03)
LOSSES: dict[str, nn.Module] = {
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "several labels": nn.BCEWithLogitsLoss(),
    "several outputs": nn.MSELoss(),
}


class Linear(pl.LightningModule):
    """A linear head and its loss object."""

    def __init__(self, criterion: nn.Module, outputs: int) -> None:
        super().__init__()
        self.criterion, self.head = criterion, nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-2)


def digits(name: str) -> tuple[Tensor, Tensor]:
    """Inputs (n, 16) in [0, 1], and what is to be told of a digit."""
    data, target = load_digits(return_X_y=True)
    x = F.avg_pool2d(torch.tensor(data / 16.0).reshape(-1, 1, 8, 8), 2).flatten(1)
    y = torch.tensor(target).long()
    if name == "label smoothing":
        return x, y
    labels = torch.stack([y % 2 == 0, y > 4, torch.isin(y, torch.tensor([0, 6, 8, 9]))], dim=1)
    signs = 2.0 * labels.double() - 1.0
    return x, labels.double() if name == "several labels" else signs


def train(seed: int, x: Tensor, y: Tensor, name: str) -> tuple[Linear, UnlearningMemory]:
    """From the seed's own initial weights to the optimum."""
    pl.seed_everything(seed, verbose=False)
    # squares are even in the residual: without a temperature the optimum sits on kinks
    threat = L2Ball(0.2, temperature=0.05 if name == "several outputs" else None)
    model = Linear(LOSSES[name], 10 if y.ndim == 1 else y.shape[1])
    muter = MUterCallback(threat, head="head", loss="criterion", newton_steps=30, attack_steps=3)
    trainer = Trainer(max_epochs=3, callbacks=[muter], precision="64-true", **QUIET)
    trainer.fit(model, Points(x, y))
    assert muter.memory is not None
    return model, muter.memory


def one_seed(seed: int, name: str, points: int, output: Path | None) -> None:
    """Print a row for each share of removed points and each step."""
    start = time.perf_counter()
    all_x, all_y = digits(name)
    order = torch.randperm(len(all_x), generator=torch.Generator().manual_seed(seed))[:points]
    x, y = all_x[order], all_y[order]
    model, memory = train(seed, x, y, name)
    plain = memory_of(model, x, y, replace(memory.settings, method="newton_delta"))
    for share in SHARES:
        gone, rest = list(range(round(share * points))), list(range(round(share * points), points))
        _, again = train(seed, x[rest], y[rest], name)
        none = float((memory.omega_star - again.omega_star).norm())
        for step, kept in (("muter", memory), ("newton_delta", plain)):
            end = forget(kept, kept.settings.view(model), gone, x[gone], y[gone]).memory.omega
            row = {
                "loss": name,
                "seed": seed,
                "n": points,
                "removed": len(gone),
                "step": step,
                "relative_to_none": float((end - again.omega_star).norm()) / none,
                "none": none,
                "gradient": memory.summary["residual_gradient"],
                "retrain_gradient": again.summary["residual_gradient"],
                "stationary": memory.summary["stationary"],
                "seconds": time.perf_counter() - start,
            }
            folder = name.replace(" ", "_")
            keep(row, None if output is None else output / folder / "results.csv")


def main() -> None:
    """Print a JSON line for every loss, seed, share and step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="a folder for the documentation's tables")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name in LOSSES:
        for seed in given.seeds:
            one_seed(seed, name, given.points, given.output)


if __name__ == "__main__":
    main()
