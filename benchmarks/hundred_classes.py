"""Distance to Retrain at 100 classes, trained to stationarity, by rows.

Softmax regression on features of real images (a seeded random network's, labels digit x cluster)
whose perturbation lives in feature space: rows are exact there. Retrain is Newton's method on the
points that are left, the distance is relative to that of the unchanged model. "muter_corrected_1"
is muter with one corrector step, which sees the points that are left.

    python benchmarks/hundred_classes.py --data DIR --seeds 3 --output FILE.csv
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from common import arguments, mnist
from rows import clusters, network
from torch import Tensor, nn

from lightning_muter import METHODS, L2Ball
from lightning_muter.evaluation import Cell, Table
from lightning_muter.spec import Settings
from lightning_muter.unlearning.corrector import correct
from lightning_muter.unlearning.objective import RobustObjective, newton
from lightning_muter.unlearning.points import Batch
from lightning_muter.unlearning.request import forget_rows
from lightning_muter.unlearning.stage_one import build_memories

CLASSES, FEATURES = 100, 24
BASE = Settings(
    method="muter",
    threat=L2Ball(0.2),
    head="0",
    solver="direct",
    weight_decay=1e-3,
    representation="rows",
    solver_tol=1e-10,
)


def robust_objective(net: nn.Module, x: Tensor, y: Tensor, which: Tensor) -> RobustObjective:
    """F of some points."""
    ones = torch.ones(len(which), dtype=torch.float64)
    batch = Batch(x[which], y[which], ones, which)
    return RobustObjective(BASE.view(net), BASE.problem(), lambda: [batch], empty=BASE.empty_sum)


def one_seed(x: Tensor, y: Tensor, seed: int, shares: list[float], output: Path | None) -> None:
    net, n = nn.Sequential(nn.Linear(FEATURES, CLASSES)).double(), len(x)
    start = time.perf_counter()
    with torch.no_grad():
        net[0].weight.zero_(), net[0].bias.zero_()
    residual = newton(robust_objective(net, x, y, torch.arange(n)), 12)[-1]
    view = BASE.view(net)
    omega = view.get()
    kept = [replace(BASE, method=name) for name in METHODS if METHODS[name].has_memory]
    everyone = Batch(x, y, torch.ones(n, dtype=torch.float64), torch.arange(n))
    digests = torch.zeros(n, 16, dtype=torch.uint8)
    memories = build_memories(net, kept, [everyone], digests, bytes(16))
    stationary = memories[0].summary["stationary"]
    print(f"seed {seed}: ‖∇F‖ {residual:.2g}, stationary {stationary:.3f}, "
          f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for share in shares:
        gone = order[: round(share * n)].tolist()
        left = torch.tensor(sorted(set(range(n)) - set(gone)))
        view.set(omega)
        remaining = robust_objective(net, x, y, left)
        at_retrain = newton(remaining, 8)[-1]
        retrain = view.get()
        none = float((omega - retrain).norm())
        after = {memory.settings.method: forget_rows(memory, gone).memory for memory in memories}
        view.set(after["muter"].omega)
        after["muter_corrected_1"] = correct(after["muter"], remaining, 1).memory
        found = {name: float((one.omega - retrain).norm()) for name, one in after.items()}
        line = (
            f"seed {seed} removed {share:.0%}: none {none:.3g}, ‖∇F‖ at Retrain {at_retrain:.2g}; "
        )
        print(line + ", ".join(f"{k} {v / none:.4f}" for k, v in found.items()), flush=True)
        if output is not None:
            relative = {"none": 1.0, **{k: v / none for k, v in found.items()}}
            Table(output).add(
                Cell(seed, len(gone), share, k, "distance_relative", v) for k, v in relative.items()
            )


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=3000)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.02, 0.05])
    parser.add_argument("--output", type=Path, help="a table for the documentation, added to")
    asked = parser.parse_args()
    images, digits, _, _ = mnist(asked.data)
    for seed in range(asked.seeds):
        some = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        some = some[: asked.points]
        with torch.no_grad():
            h = network(FEATURES, CLASSES)[:7](images[some].float().unsqueeze(1)).double()
        h = h / h.square().mean().sqrt()
        one_seed(h, clusters(h, digits[some], CLASSES), seed, asked.shares, asked.output)


if __name__ == "__main__":
    main()
