"""Trained and retrained L-infinity heads against a brute-force gradient of the smoothed objective.

The gradient shares no code with the package (tests/reference.py: bisection in numpy); F is
λn-strongly convex, so ‖∇F‖ / (λn) bounds the distance of a head to the optimum of its points.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import reference  # noqa: E402

from examples.experiments.data import MNISTb  # noqa: E402
from examples.experiments.models import LinearModel  # noqa: E402


def main() -> None:
    """Print a JSON line for every head of the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="output of examples/experiments/reference_linf.yaml")
    parser.add_argument("--data", required=True)
    given = parser.parse_args()
    config = yaml.safe_load((ROOT / "examples/experiments/reference_linf.yaml").read_text())
    threat = config["threat"]["init_args"]
    decay = config["module"]["init_args"]["weight_decay"]
    for path in sorted(Path(given.run, "heads").glob("seed-*.safetensors")):
        seed, name = int(path.stem.split("-")[1]), path.stem.split("-", 2)[2]
        pl.seed_everything(seed, verbose=False)
        data = MNISTb(path=given.data, **config["datamodule"]["init_args"])
        LinearModel(**config["module"]["init_args"])  # takes its random numbers, as the run does
        data.setup("fit")
        x, y = data.train_dataloader().dataset.tensors
        gone = int(name.split("-")[1]) if "-" in name else 0
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        x, y = (t[order[gone:].sort().values].numpy() for t in (x, y))
        omega = load_file(path)["omega"].numpy()
        _, gradient = reference.smoothed_linf_logistic(
            omega, x, y, threat["eps"], threat["bandwidth"], decay
        )
        norm = float((gradient**2).sum() ** 0.5)
        bound = norm / (decay * len(x))
        print(json.dumps({"head": path.stem, "gradient": norm, "distance_at_most": bound}))


if __name__ == "__main__":
    main()
