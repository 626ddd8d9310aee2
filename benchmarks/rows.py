"""A head that no matrix serves: rows of 640 x 100 (or any other size), and requests by index.

Real images through a seeded random network, labels digit x cluster of its features. The head is
trained on the clean points, Stage I keeps the rows of the robust problem with perturbations of a
few passes (sizes and solves are what is measured here), and requests follow.

    python benchmarks/rows.py --data DIR --points 50000
    python benchmarks/rows.py --data DIR --features 2048 --classes 1000 --dtype float32
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, mnist
from torch import Tensor, nn

from lightning_muter import L2Ball, UnlearningMemory
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.parallel import Group
from lightning_muter.spec import Settings
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import Batch
from lightning_muter.unlearning.request import forget_rows
from lightning_muter.unlearning.stage_one import build_memories

DECAY = 5e-4
LENGTH = 20.0


def network(features: int, classes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, features), nn.ReLU(), nn.Linear(features, classes),
    ).eval()  # fmt: skip


def clusters(features: Tensor, digits: Tensor, classes: int) -> Tensor:
    """Each digit in classes / 10 parts, by the nearest of as many of its own points."""
    parts, found = classes // 10, torch.zeros_like(digits)
    for digit in range(10):
        own = torch.nonzero(digits == digit).flatten()
        found[own] = digit * parts + torch.cdist(features[own], features[own[:parts]]).argmin(dim=1)
    return found


def train(head: nn.Linear, h: Tensor, y: Tensor, steps: int) -> None:
    """Clean softmax regression by L-BFGS."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=steps, history_size=20)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(h), y)
        loss = loss + 0.5 * DECAY * sum(p.square().sum() for p in head.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


class QuickSettings(Settings):
    """Maximisers of a few passes."""

    def problem(self) -> PointProblem:
        return replace(super().problem(), max_iter=3)


def build(net: nn.Sequential, x: Tensor, y: Tensor, dtype: str, tol: float) -> UnlearningMemory:
    settings = QuickSettings(
        method="muter", threat=L2Ball(0.5), head="7", parameters=None, loss="cross_entropy",
        response="constrained", inverse="neumann", neumann_order=3, space="input", damping=0.0,
        solver="direct", weight_decay=DECAY, sketch=1, representation="rows", row_dtype=dtype,
        solver_tol=tol,
    )  # fmt: skip
    digests, n = torch.zeros(len(x), 16, dtype=torch.uint8), len(x)
    ones = torch.ones(n, dtype=torch.float64, device=x.device)
    parts = [torch.arange(k, min(k + 512, n)) for k in range(0, n, 512)]
    group = Group(device=x.device)
    batches = (Batch(x[some], y[some], ones[some], some) for some in parts)
    (memory,) = build_memories(net, [settings], batches, digests, bytes(16), group=group)
    return memory


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--points", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=640)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--tol", type=float, default=1e-6)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 500])
    parser.add_argument("--record", help="a file of JSON lines to add the figures to")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    images, digits, _, _ = mnist(asked.data)
    x = images[: asked.points].float().unsqueeze(1).to(device)
    net = network(asked.features, asked.classes).to(device)
    with torch.no_grad():
        longer = LENGTH / net[:7](x[:512]).norm(dim=1).mean()  # as a trained network's are
        for parameter in net[5].parameters():
            parameter.mul_(longer)
        h = torch.cat([net[:7](part) for part in x.split(2048)])
    y = clusters(h, digits[: asked.points].to(device), asked.classes)

    def say(**numbers: Any) -> None:
        if device.type == "cuda":
            numbers["peak_GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        else:
            numbers["peak_GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        line = json.dumps(numbers)
        print(line, flush=True)
        if asked.record is not None:
            with Path(asked.record).open("a") as file:
                file.write(line + "\n")

    say(**{k: v for k, v in vars(asked).items() if k not in ("data", "record")})
    start = time.perf_counter()
    train(net[7], h, y, asked.steps)  # type: ignore[arg-type]
    say(trained=time.perf_counter() - start)
    start = time.perf_counter()
    memory = build(net, x, y, asked.dtype, asked.tol).to(device)
    rows = memory.curvature
    assert isinstance(rows, RowsCurvature)
    say(stage_one=time.perf_counter() - start,  rows_GB=rows.nbytes / 1e9,
        dense_GB=8e-9 * rows.p**2, **memory.summary)  # fmt: skip
    start = time.perf_counter()
    inverse = rows.preconditioner(device)
    say(preconditioner=type(inverse).__name__,
        preconditioner_seconds=time.perf_counter() - start,
        preconditioner_GB=inverse.nbytes / 1e9)  # fmt: skip
    v = torch.randn(rows.p, dtype=torch.float64).to(device)
    float(rows.matvec(v)[0])
    start = time.perf_counter()
    for _ in range(5):
        found = rows.matvec(v)
    float(found[0])  # waits for an accelerator
    say(product_seconds=(time.perf_counter() - start) / 5)
    first = 0
    for m in asked.requests:
        outcome = forget_rows(memory, list(range(first, first + m)))
        first, memory, solution = first + m, outcome.memory, outcome.solution
        say(removed=m, seconds=outcome.seconds, products=solution.iterations,
            residual=solution.residual, asked=asked.tol, status=str(solution.status),
            sketch_noise=outcome.sketch_noise)  # fmt: skip


if __name__ == "__main__":
    main()
