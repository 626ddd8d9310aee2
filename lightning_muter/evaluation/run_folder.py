"""What a run's folder is a run of, written down beside its results."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from lightning_muter.errors import ConfigurationError
from lightning_muter.evaluation.experiment import Experiment

__all__ = ["claim"]


def claim(folder: Path, experiment: Experiment) -> None:
    """Write down what the folder is of and the machine, or refuse another experiment's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {
        name: repr(getattr(experiment, name))
        for name in experiment.__dataclass_fields__
        if name not in ("module", "datamodule", "seeds", "rows", "removals")
    }
    path = folder / "run.json"
    if path.exists():
        before = json.loads(path.read_text())["experiment"]
        different = [k for k in shown if before.get(k, shown[k]) != shown[k]]
        if different:
            raise ConfigurationError(
                f"{folder} holds a run that differs in {different}: choose another output folder"
            )
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("pytorch-lightning"),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    path.write_text(json.dumps({"experiment": shown, "machine": machine}, indent=2) + "\n")
