"""Stage I of torchvision's ResNet-18 on CIFAR-10 images, against the first version and training.

    git worktree add /tmp/first bfc27fe
    OMP_NUM_THREADS=2 python benchmarks/resnet18.py --data PATH --first /tmp/first

The network has random weights and is frozen; its head is trained adversarially, ten steps of attack
a batch. Prints JSON lines: Stage I of both versions at the same trained head, one after the other
for each size, then of this version on all images: in epochs of that training, and as a share of the
first version's time, which is on a line through its two largest sizes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import arguments, cifar10
from resnet18_stage_one import QUIET, THREAT, Clock, ResNet18
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining

HERE = Path(__file__).resolve().parent


def trained(x: Tensor, y: Tensor, epochs: int) -> tuple[ResNet18, float]:
    """A network with a trained head, and the seconds of its fastest epoch."""
    model, clock = ResNet18(lr=0.1), Clock()
    attack = AdversarialTraining(THREAT, attack_steps=10)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[attack, clock], **QUIET)
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    return model, min(clock.epochs)


def stage_one(version: Path, file: str, points: int) -> dict[str, Any]:
    """What a version of the package takes for some images, in a process of its own."""
    command = [sys.executable, str(HERE / "resnet18_stage_one.py"), file, "--points", str(points)]
    command += ["--accelerator", str(QUIET["accelerator"])]
    paths = os.environ | {"PYTHONPATH": str(version)}
    done = subprocess.run(command, env=paths, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def on_a_line(one: dict[str, Any], other: dict[str, Any], points: int) -> float:
    """Seconds for some images, by those for two numbers of images."""
    slope = (other["seconds"] - one["seconds"]) / (other["points"] - one["points"])
    return float(one["seconds"] + slope * (points - one["points"]))


def main() -> None:
    """Print JSON lines."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--first", help="a checkout of the version to compare with")
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    asked = parser.parse_args()
    QUIET["accelerator"] = asked.accelerator
    warnings.simplefilter("ignore")
    pl.seed_everything(0, verbose=False)
    x, y = cifar10(asked.data, asked.points)
    model, epoch = trained(x, y, asked.epochs)
    print(json.dumps({"points": asked.points, "epoch_seconds": epoch}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/trained.pt"
        torch.save({"state": model.state_dict(), "x": x, "y": y}, file)
        compared = []
        for points in asked.sizes if asked.first else []:
            old, new = (stage_one(v, file, points) for v in (Path(asked.first), HERE.parent))
            ratio = new["seconds"] / old["seconds"]
            print(json.dumps({"first": old, "new": new, "ratio": ratio}), flush=True)
            compared.append(old)
        found = stage_one(HERE.parent, file, asked.points)
    found["epochs"] = found["seconds"] / epoch
    if len(compared) > 1:
        found["first_seconds"] = on_a_line(*compared[-2:], asked.points)
        found["ratio"] = found["seconds"] / found["first_seconds"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
