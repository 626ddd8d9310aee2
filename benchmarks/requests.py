"""One request of `trainer.unlearn`: its kernel, Lightning's part, the disk, and a Cholesky.

Logistic regression on all of MNIST's 1 and 7 (p = 784), or a head of 640 x 10 (p = 6,410) on real
images through a seeded random network; float64, memories of Stage I. Every request starts from the
same memory; the Cholesky factorisations of the same matrix are timed between the requests.

    OMP_NUM_THREADS=1 python benchmarks/requests.py small --data DIR --kinds dense rows
    OMP_NUM_THREADS=1 python benchmarks/requests.py large --data DIR --points 1000
"""

from __future__ import annotations

import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import QUIET, Logistic, Points, arguments, mnist, one_or_seven
from rows import network
from torch import Tensor

from lightning_muter import L2Ball, MUterCallback, RemovalDataModule, Trainer


class Head(pl.LightningModule):
    """640 features of a frozen random network, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(640, 10)
        self.net[:-1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net[-1].parameters(), lr=0.05, weight_decay=1e-3)


def milliseconds(found: list[float]) -> dict[str, float]:
    """Median, least, and the tenth of all that were faster."""
    ordered = sorted(1e3 * one for one in found)
    tenth = ordered[len(ordered) // 10]
    return {"median": statistics.median(ordered), "min": ordered[0], "q10": tenth}


def timed(
    requests: int, before: Callable[[], Any], one: Callable[[int], Any], after: Callable[[], Any]
) -> dict[str, Any]:
    """What ``one(i)``, a call of unlearn, took by its parts, and what ``after`` it took.

    "request" are maximisers, solve and their checks, "around" is the rest without the disk. The
    processor's own time says what a machine that others use does not.
    """
    names = ("request", "write", "around", "cholesky", "call_cpu", "cholesky_cpu")
    parts: dict[str, list[float]] = {name: [] for name in names}
    for i in range(requests + 3):
        before()
        start, cpu = time.perf_counter(), time.thread_time()
        result = one(i)
        total, called = time.perf_counter() - start, time.thread_time() - cpu
        kernel, write = (result.seconds[name] for name in ("maximise_and_solve", "write"))
        start, cpu = time.perf_counter(), time.thread_time()
        after()
        factor, factored = time.perf_counter() - start, time.thread_time() - cpu
        spent = (kernel, write, total - kernel - write, factor, called, factored)
        if i >= 3:  # the first ones factorise and load
            for found, seconds in zip(parts.values(), spent, strict=True):
                found.append(seconds)
    return {
        "residual": result.residual,
        "iterations": result.iterations,
        "ms": {name: milliseconds(found) for name, found in parts.items()},
    }


def main() -> None:
    """Print one JSON line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("size", choices=["small", "large"])
    parser.add_argument("--points", type=int, default=13_007)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=["dense"], choices=["dense", "rows"])
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    given = parser.parse_args()
    QUIET["accelerator"] = given.accelerator
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(0)
    if given.size == "small":
        x, y = one_or_seven(given.data)
        model: pl.LightningModule = Logistic().double()
        options: dict[str, Any] = {"loss": "logistic", "head": "head"}
    else:
        images, y, _, _ = mnist(given.data)
        x, model = images.unsqueeze(1), Head().double()
        options = {"loss": "cross_entropy", "head": "net.7", "sketch": 1}
    data = Points(x[: given.points], y[: given.points], 512)
    row: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    row["machine"] = platform.processor() or platform.machine()
    if given.accelerator == "gpu":
        row["accelerator"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        for kind in given.kinds:
            options |= {"representation": kind, "memory_dir": f"{folder}/{kind}"}
            requests = given.requests if kind == "dense" else min(given.requests, 15)
            row |= measured(model, data, MUterCallback(L2Ball(1.0), **options), requests)
    print(json.dumps(row))


def measured(
    model: pl.LightningModule, data: Points, muter: MUterCallback, requests: int
) -> dict[str, Any]:
    """Requests of a memory in RAM, each from the same start, and of its folder, in a sequence."""
    trainer = Trainer(max_epochs=1, callbacks=[muter], **QUIET)
    trainer.fit(model, data)
    memory = muter.memory
    assert memory is not None and memory.curvature is not None
    kind, matrix = memory.settings.representation, memory.curvature.kept().get("matrix")

    if matrix is not None:
        matrix = matrix.to(trainer.strategy.root_device)

    def factorise() -> None:
        if matrix is not None:
            factor, _ = torch.linalg.cholesky_ex(matrix.mT, upper=True)
            float(factor[0, 0])  # waits for an accelerator

    def asked(i: int) -> Any:
        return [i] if kind == "rows" else RemovalDataModule(data, [i])

    def restore() -> None:
        memory.restore(model)

    def in_hand(i: int) -> Any:
        return trainer.unlearn(asked(i), model=model, memory=memory)

    in_ram = timed(requests, restore, in_hand, factorise)
    in_a_row = timed(requests, restore, in_hand, lambda: None)  # with nothing in the caches' way
    restore()
    on_disk = timed(min(requests, 20), lambda: None, lambda i: trainer.unlearn(asked(i)), factorise)
    return {
        "p": memory.p,
        "points": memory.n,
        f"{kind}_in_ram": in_ram,
        f"{kind}_in_a_row": in_a_row,
        f"{kind}_on_disk": on_disk,
    }


if __name__ == "__main__":
    main()
