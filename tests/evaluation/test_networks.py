"""The network experiment end to end, on images made up here."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_muter.evaluation import Table
from lightning_muter.lightning.cli import main

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "examples" / "experiments"


def write_images(path: Path, per_class: int) -> None:
    """A file as cifar10_jpeg.npz: each class a colour gradient of its own, with noise."""
    generator = np.random.default_rng(0)
    arrays = {}
    for kind in ("train", "test"):
        files, labels = [], np.arange(10 * per_class) % 10
        for label in labels:
            ramp = np.linspace(0, 60, 32)
            image = np.full((32, 32, 3), 90.0) + generator.normal(0, 25, (32, 32, 3))
            image[..., label % 3] += (ramp[:, None] if label % 2 else ramp[None, :]) * (label % 5)
            stream = io.BytesIO()
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=95)
            files.append(np.frombuffer(stream.getvalue(), dtype=np.uint8))
        arrays[f"{kind}_jpeg"] = np.concatenate(files)
        arrays[f"{kind}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{kind}_labels"] = labels
    np.savez(path, **arrays)


@pytest.mark.slow
def test_pretrain_finetune_forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUTER_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.chdir(ROOT)
    write_images(tmp_path / "cifar10_jpeg.npz", per_class=16)
    command = [sys.executable, "pretrain.py", "wrn-10-1-silu", "--epochs", "4"]
    script = subprocess.run(
        [*command, "--data", str(tmp_path)],
        cwd=EXPERIMENTS,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert script.returncode == 0, script.stderr
    options = ["--seeds", "1", "--removals", "[8]", "--datamodule.points", "60"]
    options += ["--robust_points", "4", "--robust_steps", "2", "--max_epochs", "1"]
    main(
        [
            *("evaluate", "-c", str(EXPERIMENTS / "cifar10_wrn.yaml"), "--data", str(tmp_path)),
            *("--output", str(tmp_path / "run"), *options),
        ]
    )
    table = Table(tmp_path / "run" / "results.csv")
    (muter,) = table.values("muter", 8, "distance_relative").values()
    (residual,) = table.values("retrain", 8, "gradient_norm").values()
    assert residual < 1e-3
    others = set(table.methods()) - {"muter", "retrain"}
    nearest = min(table.values(k, 8, "distance_relative")[0] for k in others)
    assert muter < 0.7 * nearest, (muter, nearest)
