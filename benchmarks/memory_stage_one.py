"""Peak memory of Stage I and of a request at p = 6,410 (640 features, 10 classes), in matrices."""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import QUIET, Points
from torch import Tensor, nn

from lightning_muter import L2Ball, MUterCallback, RemovalDataModule, Trainer


class Wide(pl.LightningModule):
    """A convolution, 640 pooled features, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 640, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(640, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=1e-3)


def peak() -> int:
    """Peak resident bytes of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--write", action="store_true", help="keep the memory on disk")
    given = parser.parse_args()
    torch.manual_seed(0)
    x, y = torch.rand(given.points, 3, 32, 32), torch.arange(given.points) % 10
    data, model = Points(x, y), Wide()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"memory_dir": folder} if given.write else {}
        warm_up = Trainer(max_epochs=1, **QUIET)
        warm_up.fit(model, data)  # libraries are loaded, threads are started
        before = peak()
        muter = MUterCallback(L2Ball(0.5, data_range=(0, 1)), head="head", **options)
        trainer = Trainer(max_epochs=1, callbacks=[muter], **QUIET)
        trainer.fit(model, data)
        stage_one = peak()
        trainer.unlearn(RemovalDataModule(data, [0, 1]))
    assert muter.memory is not None
    matrix = muter.memory.curvature.matrix.numel() * 8
    row = {
        "p": muter.memory.p,
        "matrix_mb": matrix / 1e6,
        "stage_one_matrices": (stage_one - before) / matrix,
        "request_matrices": (peak() - before) / matrix,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
