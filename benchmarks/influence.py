"""Influence against really run retraining: leave one out, and leave a tenth out (LDS).

MNIST 1 vs 7 at 14 × 14 pixels, a linear model at its optimum, L2 ball. What is predicted is the
change of the robust loss of test points. The linear datamodeling score is the mean over test points
of Spearman's correlation, over random subsets, of the predicted with the true change; its interval
is a bootstrap over test points and subsets.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import torch
from audit_models import Bench, settings
from audits import THREAT, data
from common import arguments
from scipy import stats
from torch import Tensor

from lightning_muter import SolverError, UnlearningMemory, influence_on_losses
from lightning_muter.spec import Settings
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.stage_one import build_memories

FUNCTIONS: dict[str, Settings] = {
    "ours (constrained response)": settings("muter", THREAT.eps),
    "the paper's (unconstrained)": replace(
        settings("muter", THREAT.eps), response="unconstrained", inverse="exact"
    ),
    "clean (Koh and Liang)": settings("newton", THREAT.eps),
    "adversarial points, no response": settings("newton_delta", THREAT.eps),
}


def robust_losses(omega: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Closed form, one a point."""
    side = 1.0 - 2.0 * y
    return torch.nn.functional.softplus(side * (x @ omega) + THREAT.eps * omega.norm())


def memories(bench: Bench, x: Tensor, y: Tensor) -> dict[str, UnlearningMemory]:
    digests = torch.zeros(len(x), 16, dtype=torch.uint8)
    batches = [unweighted(x, y)]
    built = build_memories(bench.module, list(FUNCTIONS.values()), batches, digests, b"k" * 16)
    return dict(zip(FUNCTIONS, built, strict=True))


def correlations(predicted: np.ndarray, true: np.ndarray, ranks: bool) -> np.ndarray:
    """A correlation a test point (t,) over rows (k, t), Spearman's or Pearson's."""
    both = [stats.rankdata(a, axis=0) if ranks else a for a in (predicted, true)]
    a, b = (one - one.mean(axis=0) for one in both)
    length = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    found: np.ndarray = (a * b).sum(axis=0) / np.where(length > 0, length, np.nan)
    return found


def interval(predicted: np.ndarray, true: np.ndarray, times: int = 200) -> tuple[float, float]:
    """95% of bootstraps over subsets and test points."""
    rng = np.random.default_rng(0)
    means = []
    for _ in range(times):
        rows = rng.integers(0, len(true), len(true))
        columns = rng.integers(0, true.shape[1], true.shape[1])
        found = correlations(predicted[rows][:, columns], true[rows][:, columns], True)
        means.append(np.nanmean(found))
    low, high = np.percentile(means, [2.5, 97.5])
    return round(float(low), 3), round(float(high), 3)


def main() -> None:
    """Print one JSON line a function."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--points", type=int, default=600)
    parser.add_argument("--subsets", type=int, default=60)
    given = parser.parse_args()
    x, y, tx, ty = data(given.data)
    x, y, test = x[: given.points], y[: given.points], (tx[:60], ty[:60])
    bench = Bench(x.shape[1], THREAT.eps)
    trained = bench.optimum(x, y)
    before = robust_losses(trained, *test)
    n, everyone = len(x), torch.arange(len(x))
    generator = torch.Generator().manual_seed(0)
    removed = [everyone[k : k + 1] for k in range(0, n, n // 60)]
    removed += [torch.randperm(n, generator=generator)[: n // 10] for _ in range(given.subsets)]
    changes = []
    for gone in removed:
        keep = torch.ones(n, dtype=torch.bool)
        keep[gone] = False
        omega = bench.optimum(x[keep], y[keep], start=trained)
        changes.append(robust_losses(omega, *test) - before)
    true = torch.stack(changes).numpy()
    singles = len(removed) - given.subsets
    with bench.view.at(trained):
        built = memories(bench, x, y)
    for name, memory in built.items():
        start = time.perf_counter()
        try:
            each = influence_on_losses(memory, bench.module, (x, y), test)
        except SolverError as error:
            print(json.dumps({"function": name, "refused": str(error)[:120]}), flush=True)
            continue
        seconds = time.perf_counter() - start
        predicted = torch.stack([each[gone].sum(dim=0) for gone in removed]).numpy()
        left_out = correlations(predicted[:singles], true[:singles], False)
        some, truth = predicted[singles:], true[singles:]
        print(
            json.dumps(
                {
                    "function": name,
                    "leave one out, Pearson": round(float(np.nanmean(left_out)), 4),
                    "LDS": round(float(np.nanmean(correlations(some, truth, True))), 4),
                    "LDS, 95%": interval(some, truth),
                    "true / predicted": round(float((some * truth).sum() / (some**2).sum()), 4),
                    "subsets": given.subsets,
                    "seconds": round(seconds, 2),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
