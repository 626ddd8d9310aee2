"""Stage I of a trained ResNet-18 with whichever lightning_muter is on the path (see resnet18.py).

    python benchmarks/resnet18_stage_one.py trained.pt --points 16

Prints one JSON line: seconds, and images that went through the network.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import L2Ball, MUterCallback, Trainer

THREAT = L2Ball(0.25, data_range=(0, 1))
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class ResNet18(pl.LightningModule):
    """torchvision's ResNet-18 with random weights, whose last layer alone is trained."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = torchvision.models.resnet18(weights=None, num_classes=10)
        self.net.requires_grad_(False)
        self.net.fc.requires_grad_(True)

    def train(self, mode: bool = True) -> ResNet18:
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
        return torch.optim.SGD(self.net.fc.parameters(), lr=self.lr, weight_decay=1e-3)


class Clock(pl.Callback):
    """Seconds of every epoch, and when the last one ended: by the wall and by the processor."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.end, self.processor = 0.0, 0.0
        self.images = 0
        self._start = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end, self.processor = time.perf_counter(), time.process_time()
        self.epochs.append(self.end - self._start)
        self.images = 0

    def count(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook of the network's first layer."""
        self.images += len(output)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", help="state of the network, images and labels")
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    asked = parser.parse_args()
    QUIET["accelerator"] = asked.accelerator
    warnings.simplefilter("ignore")
    trained: dict[str, Any] = torch.load(asked.trained, weights_only=True)
    model, clock = ResNet18(lr=0.0), Clock()  # the head stays the trained one
    model.load_state_dict(trained["state"])
    model.net.conv1.register_forward_hook(clock.count)
    x, y = trained["x"][: asked.points], trained["y"][: asked.points]
    muter = MUterCallback(THREAT, head="net.fc", sketch=1, attack_steps=1)
    trainer = Trainer(max_epochs=1, callbacks=[clock, muter], **QUIET)
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    assert muter.memory is not None
    figures = {
        "points": asked.points,
        "seconds": time.perf_counter() - clock.end,
        "processor_seconds": time.process_time() - clock.processor,
        "passes": clock.images / asked.points,
        "stationary": muter.memory.summary["stationary"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
