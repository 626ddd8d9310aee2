"""A head of 10 classes on a frozen convolutional network, real MNIST: distance to Retrain.

The network is pretrained adversarially (eps = 1) on 10,000 images; its head is finetuned on 5,000
others with an L2 threat and the data range [0, 1], to stationarity; every method forgets the same
random points.
"""

from __future__ import annotations

import copy
import json
import logging
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import QUIET, Points, arguments, mnist
from torch import Tensor, nn

from lightning_muter import (
    METHODS,
    AdversarialTraining,
    L2Ball,
    MUterCallback,
    RemovalDataModule,
    Trainer,
)
from lightning_muter.evaluation import Cell, Table

COUNTS = (1, 50, 250)


class ConvNet(pl.LightningModule):
    """Two convolutions, 16 smooth features, a linear head of 10 classes."""

    def __init__(self, lr: float = 5e-3, weight_decay: float = 1e-2) -> None:
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=3, padding=1),
            nn.SiLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(400, 16),
            nn.SiLU(),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return [adam], [torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.trainer.max_epochs)]


def finetune(
    model: ConvNet, x: Tensor, y: Tensor, threat: L2Ball, method: str, newton_steps: int
) -> tuple[Trainer, MUterCallback]:
    """Thirty epochs and Newton steps; with none of them only Stage I, at the weights there."""
    muter = MUterCallback(
        threat,
        head="head",
        method=method,
        newton_steps=newton_steps,
        attack_steps=3 if newton_steps else 1,
    )
    model.lr = 1e-2 if newton_steps else 0.0
    epochs = 30 if newton_steps else 1
    trainer = Trainer(max_epochs=epochs, callbacks=[muter], precision="64-true", **QUIET)
    trainer.fit(model, Points(x, y))
    return trainer, muter


def one_seed(
    seed: int, data: str, eps: float, points: int, newton_steps: int, table: Table | None
) -> None:
    """Print a JSON line for every method and removal count, and add it to the table."""
    pl.seed_everything(seed, verbose=False)
    threat = L2Ball(eps, data_range=(0, 1))
    x, y, test_x, test_y = mnist(data)
    order = torch.randperm(len(x))
    x, y, test_x = x[order].unsqueeze(1), y[order], test_x.unsqueeze(1)
    model = ConvNet(weight_decay=1e-4)
    pretraining = AdversarialTraining(L2Ball(1.0, data_range=(0, 1)), attack_steps=5)
    trainer = Trainer(max_epochs=4, callbacks=[pretraining], precision="64-true", **QUIET)
    trainer.fit(model, Points(x[points : points + 10_000], y[points : points + 10_000]))
    x, y = x[:points], y[:points]
    model.head.reset_parameters()
    model.weight_decay = 1e-2
    initial = copy.deepcopy(model)

    def report(**row: Any) -> None:
        print(json.dumps({"seed": seed, **row}), flush=True)
        if table is not None and "method" in row:
            m, method = row["removed"], row["method"]
            metrics = ("distance", "relative_to_none", "seconds")
            names = ("distance", "distance_relative", "seconds")
            cells = [
                Cell(seed, m, m / points, method, name, row[metric])
                for name, metric in zip(names, metrics, strict=True)
            ]
            table.add(cells)

    start = time.perf_counter()
    _, muter = finetune(model, x, y, threat, "muter", newton_steps)
    memory = muter.memory
    assert memory is not None
    clean = float((model(test_x).argmax(dim=1) == test_y).double().mean())
    report(
        memory=memory.summary,
        newton=muter.newton_history,
        test_acc=clean,
        seconds=time.perf_counter() - start,
    )
    order = torch.randperm(points)
    retrained = {}
    for m in COUNTS:
        again, keep = copy.deepcopy(initial), order[m:].sort().values
        _, other = finetune(again, x[keep], y[keep], threat, "none", newton_steps)
        assert other.memory is not None
        retrained[m] = other.memory.omega_star
        none = float((memory.omega_star - retrained[m]).norm())
        residual = other.memory.summary["residual_gradient"]
        report(removed=m, none=none, retrain_residual=residual)
        report(method="none", removed=m, distance=none, relative_to_none=1.0, seconds=0.0)
    for method in METHODS:
        if METHODS[method].has_memory:
            trainer, callback = finetune(copy.deepcopy(model), x, y, threat, method, 0)
            built = callback.memory
            assert built is not None
            for m in COUNTS:
                forgetful = copy.deepcopy(model)
                result = trainer.unlearn(
                    RemovalDataModule(Points(x, y), order[:m].tolist()), forgetful, built
                )
                weights = nn.utils.parameters_to_vector(forgetful.head.parameters()).detach()
                distance = float((weights - retrained[m]).norm())
                none = float((memory.omega_star - retrained[m]).norm())
                report(
                    method=method,
                    removed=m,
                    distance=distance,
                    relative_to_none=distance / none,
                    seconds=result.seconds["maximise_and_solve"],
                )


def main() -> None:
    """Run the seeds one after the other."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--points", type=int, default=5000)
    parser.add_argument("--newton-steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", help="a CSV file for the tables of the documentation")
    given = parser.parse_args()
    table = None if given.output is None else Table(given.output)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for seed in given.seeds:
        one_seed(seed, given.data, given.eps, given.points, given.newton_steps, table)


if __name__ == "__main__":
    main()
