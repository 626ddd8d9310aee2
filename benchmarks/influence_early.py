"""Influence on a training that stopped early, against trainings as long that were really run.

    python benchmarks/influence_early.py --data PATH

MNIST 1 vs 7 at 14 × 14 pixels, a linear model, L2 ball, as in influence.py: without each of 60
points, and without 60 random tenths, the change of 60 test points' robust loss. Trainings are of
gradient descent on the closed form of the robust loss, for some times Σ lr: on all points, and in
batches of 20 in the same order, where a batch without some of its points is the mean of the others.
Compared are the influence along the way, and the one of an optimum, from the same memory. One JSON
line each.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import chain, islice, product

import numpy as np
import torch
from audit_models import Bench, settings
from audits import THREAT, data
from common import arguments
from influence import correlations, interval, robust_losses
from torch import Tensor

from lightning_muter import UnlearningMemory, influence_on_losses
from lightning_muter.linalg.lanczos import TimeAverage
from lightning_muter.memory.start import TrainingFlow
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.stage_one import build_memories

RATE, DECAY = 0.1, 1e-3


def trained(x: Tensor, y: Tensor, weights: Tensor, start: Tensor, steps: int, batch: int) -> Tensor:
    """ω (k, p) of k trainings at once, each with weights (k, n) of 0 and 1."""
    omega = start.expand(len(weights), -1).clone()
    side = 1.0 - 2.0 * y
    generator = torch.Generator().manual_seed(1)
    orders = (torch.randperm(len(x), generator=generator).split(batch) for _ in range(steps))
    for some in islice(chain.from_iterable(orders), steps):
        own = weights[:, some]
        length = omega.norm(dim=1, keepdim=True)
        pull = own * torch.sigmoid(omega @ x[some].T * side[some] + THREAT.eps * length)
        pull = pull / own.sum(dim=1, keepdim=True)
        gradient = (pull * side[some]) @ x[some]
        gradient += pull.sum(dim=1, keepdim=True) * THREAT.eps * omega / length
        omega = omega - RATE * (gradient + DECAY * omega)
    return omega


def memory_of(
    bench: Bench, omega: Tensor, start: Tensor, x: Tensor, y: Tensor, time: float
) -> UnlearningMemory:
    horizon = time / len(x)
    own = replace(settings("muter", THREAT.eps), horizon=horizon)
    digests = torch.zeros(len(x), 16, dtype=torch.uint8)
    flow = TrainingFlow(TimeAverage.end(horizon), "steps")
    batches = [unweighted(x, y)]
    with bench.view.at(omega):
        (memory,) = build_memories(
            bench.module, [own], batches, digests, b"k" * 16, initial=start, flow=flow
        )
    return memory


def main() -> None:
    """Print one JSON line a length of training and a function."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--points", type=int, default=600)
    parser.add_argument("--subsets", type=int, default=60)
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 150, 750, 3750])
    parser.add_argument("--batches", type=int, nargs="+", default=[600, 20])
    given = parser.parse_args()
    x, y, tx, ty = data(given.data)
    x, y, test = x[: given.points], y[: given.points], (tx[:60], ty[:60])
    bench, n = Bench(x.shape[1], THREAT.eps), len(x)
    generator = torch.Generator().manual_seed(0)
    removed = [torch.tensor([k]) for k in range(0, n, n // 60)]
    singles = len(removed)
    removed += [torch.randperm(n, generator=generator)[: n // 10] for _ in range(given.subsets)]
    weights = torch.ones(1 + len(removed), n, dtype=torch.float64)
    for row, gone in enumerate(removed, 1):
        weights[row, gone] = 0.0
    start = 0.1 * torch.randn(x.shape[1], generator=generator, dtype=torch.float64)
    for batch, steps in product(given.batches, given.steps):
        omegas = trained(x, y, weights, start, steps, batch)
        losses = torch.stack([robust_losses(omega, *test) for omega in omegas])
        true = (losses[1:] - losses[0]).numpy()
        memory = memory_of(bench, omegas[0], start, x, y, RATE * steps)
        optimum = replace(memory, start=None, settings=replace(memory.settings, horizon=None))
        for name, one in (("along the way", memory), ("of an optimum", optimum)):
            begun = time.perf_counter()
            each = influence_on_losses(one, bench.module, (x, y), test)
            seconds = time.perf_counter() - begun
            predicted = torch.stack([each[gone].sum(dim=0) for gone in removed]).numpy()
            some, truth = predicted[singles:], true[singles:]
            left_out = correlations(predicted[:singles], true[:singles], False)
            line = {
                "batch": batch,
                "steps": steps,
                "distance_to_optimum": round(memory.summary["distance_to_optimum"], 3),
                "retrace_error": round(memory.summary["retrace_error"], 3),
                "function": name,
                "leave one out, Pearson": round(float(np.nanmean(left_out)), 4),
                "LDS": round(float(np.nanmean(correlations(some, truth, True))), 4),
                "LDS, 95%": interval(some, truth),
                "true / predicted": round(float((some * truth).sum() / (some**2).sum()), 4),
                "seconds": round(seconds, 2),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
