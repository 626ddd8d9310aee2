"""Stage I after Newton's steps on a small random ResNet, full of kinks (needs timm).

    OMP_NUM_THREADS=2 python benchmarks/small_resnet.py --points 120 --newton 10

Prints the seconds that were said before training and those that it took.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from common import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import L2Ball, MUterCallback, Trainer


class SmallResNet(pl.LightningModule):
    """timm's `test_resnet` with random weights, its last layer trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("test_resnet", num_classes=10)
        self.net.requires_grad_(False)
        self.net.fc.requires_grad_(True)

    def train(self, mode: bool = True) -> SmallResNet:
        """Batch norm stays as it is."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.fc.parameters(), lr=0.05, weight_decay=1e-2)


class Clock(pl.Callback):
    """When the last epoch ended."""

    end = 0.0

    def on_train_epoch_end(self, *_: Any) -> None:
        self.end = time.perf_counter()


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=120)
    parser.add_argument("--newton", type=int, default=10)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    pl.seed_everything(0, verbose=False)
    x, y = torch.rand(asked.points, 3, 32, 32), torch.randint(0, 10, (asked.points,))
    muter = MUterCallback(
        L2Ball(0.25), head="net.fc", sketch=1, newton_steps=asked.newton, attack_steps=3
    )
    clock = Clock()
    trainer = Trainer(max_epochs=2, callbacks=[clock, muter], **QUIET)
    trainer.fit(SmallResNet(), DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True))
    memory = muter.memory
    assert memory is not None
    figures = {
        "points": asked.points,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - clock.end,
        "newton": muter.newton_history,
        "stationary": memory.summary["stationary"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
