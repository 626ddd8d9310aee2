"""How seconds and bytes grow with the points, the classes and the parameters.

A head on a seeded random tanh network, random inputs, labels of a random linear map. Retrain is
Newton's method from the trained head on the points that are left, on the same robust objective; a
request forgets one point, from a matrix (its factorisation included, as a fresh process has it) and
from rows (their preconditioner included). Seconds are of the processor, not of the clock. Bytes are
what has to be kept for it: the curvature, or the data set for a Retrain. The picture is drawn by
pictures.py.

    python benchmarks/growth.py --output docs/results/growth
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_muter import L2Ball
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.spec import Settings
from lightning_muter.unlearning.objective import RobustObjective, newton
from lightning_muter.unlearning.points import Batch
from lightning_muter.unlearning.request import forget, forget_rows
from lightning_muter.unlearning.stage_one import build_memories

INPUTS, DECAY, STEPS = 32, 1e-2, 3
#: what grows -> points, features and classes of each size
SIZES = {
    "points": [(n, 32, 20) for n in (1000, 2000, 4000, 8000)],
    "classes": [(2000, 32, c) for c in (10, 20, 40, 80)],
    "parameters": [(1000, f, 10) for f in (32, 64, 128, 256)],
}
SETTINGS = Settings(
    method="muter",
    threat=L2Ball(0.3),
    head="2",
    solver="direct",
    weight_decay=DECAY,
    sketch=1,
    solver_tol=1e-6,
)
FIELDS = ("grows", "points", "features", "classes", "parameters", "kept", "seconds", "bytes")


def batch(x: Tensor, y: Tensor, which: Tensor) -> Batch:
    return Batch(x[which], y[which], torch.ones(len(which), dtype=torch.float64), which)


def measured(points: int, features: int, classes: int) -> list[dict[str, float | str]]:
    """A row of the table for dense, rows and retrain."""
    torch.manual_seed(0)
    x, map_ = torch.randn(points, INPUTS).double(), torch.randn(INPUTS, classes).double()
    y = (x @ map_).argmax(dim=1)
    layers = nn.Linear(INPUTS, features), nn.Tanh(), nn.Linear(features, classes)
    net = nn.Sequential(*layers).double().eval()
    everyone, rows = torch.arange(points), replace(SETTINGS, representation="rows")
    view = rows.view(net)

    def trained(which: Tensor) -> None:
        data = [batch(x, y, which)]
        newton(RobustObjective(view, rows.problem(), lambda: data, empty=rows.empty_sum), STEPS)

    trained(everyone)
    found: list[dict[str, float | str]] = []
    size = {"points": points, "features": features, "classes": classes, "parameters": view.p}

    def record(kept: str, seconds: float, nbytes: float) -> None:
        found.append(size | {"kept": kept, "seconds": seconds, "bytes": nbytes})

    digests = torch.zeros(points, 16, dtype=torch.uint8)
    for kept in ("dense", "rows"):
        settings = replace(SETTINGS, representation=kept)
        (memory,) = build_memories(net, [settings], [batch(x, y, everyone)], digests, bytes(16))
        assert isinstance(memory.curvature, (DenseCurvature, RowsCurvature))
        fresh = replace(memory, curvature=as_loaded(memory.curvature))
        start = time.process_time()
        if kept == "rows":
            forget_rows(fresh, [0])
        else:
            forget(fresh, view, [0], x[:1], y[:1])
        record(kept, time.process_time() - start, memory.curvature.nbytes)
    omega, start = view.get(), time.process_time()
    trained(everyone[1:])
    record("retrain", time.process_time() - start, x.nbytes + y.nbytes)
    view.set(omega)
    return found


def as_loaded(curvature: DenseCurvature | RowsCurvature) -> DenseCurvature | RowsCurvature:
    """It without the factor or the preconditioner that Stage I left in it."""
    if isinstance(curvature, DenseCurvature):
        return replace(curvature, _solvers={})
    return replace(curvature, _inverses={})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="a folder for growth.csv")
    folder = Path(parser.parse_args().output)
    folder.mkdir(parents=True, exist_ok=True)
    table: list[dict[str, float | str]] = []
    measured(200, 8, 3)  # what is loaded and compiled once is no part of the first size
    with (folder / "growth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for grows, sizes in SIZES.items():
            for size in sizes:
                rows = [{"grows": grows} | one for one in measured(*size)]
                table += rows
                writer.writerows(rows)
                file.flush()
                print(rows, flush=True)


if __name__ == "__main__":
    main()
