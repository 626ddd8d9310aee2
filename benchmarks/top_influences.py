"""Does what `top_influences` names matter? Left out, and trained again without it.

MNIST 1 vs 7 at 14 × 14 pixels, logistic regression, L2 ball of radius 0.5. For each test point four
trainings without 1% of the points: those that made it robust, those that made it fragile, and two
random percents. All optima come from code that shares nothing with the package (closed_form.py).
Prints one JSON line a test point and a summary; ``--picture`` draws the first test point.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from audit_models import Bench
from audits import THREAT, data
from closed_form import newton_optimum
from common import arguments
from torch import Tensor

from lightning_muter import UnlearningMemory, top_influences
from lightning_muter.evaluation.influence_plot import plot_influences


def robust_loss(omega: np.ndarray, x: Tensor, y: Tensor) -> float:
    """Closed form, of one point."""
    side = 1.0 - 2.0 * float(y)
    return float(np.logaddexp(0, side * (x.numpy() @ omega) + THREAT.eps * np.linalg.norm(omega)))


def changes(
    groups: dict[str, tuple[int, ...]],
    points: tuple[np.ndarray, np.ndarray],
    omega: np.ndarray,
    test: tuple[Tensor, Tensor],
) -> dict[str, float]:
    """How each group's removal really changes the robust loss of a test point."""
    x, y = points
    found, before = {}, robust_loss(omega, *test)
    for name, gone in groups.items():
        keep = np.ones(len(x), dtype=bool)
        keep[list(gone)] = False
        after = newton_optimum(omega, x[keep], y[keep], THREAT.eps)
        found[name] = robust_loss(after, *test) - before
    return found


def one_point(
    memory: UnlearningMemory,
    bench: Bench,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    seed: int,
) -> dict[str, float]:
    """What a line says of a test point."""
    x, y = train
    count = len(x) // 100
    found = top_influences(memory, bench.module, train, (test[0][None], test[1][None]), count)
    drawn = np.random.default_rng(seed).permutation(len(x))
    groups = {"made it robust": found.robust, "made it fragile": found.fragile}
    groups["random"] = tuple(drawn[:count].tolist())
    groups["random again"] = tuple(drawn[count : 2 * count].tolist())
    omega = memory.omega_star.numpy()
    line = changes(groups, (x.numpy(), y.double().numpy()), omega, test)
    line |= {"robust, predicted": sum(found.gains), "fragile, predicted": sum(found.losses)}
    return {"loss": robust_loss(omega, *test), **line}


def main() -> None:
    """Print a line a test point, and how often the three groups stand in the order promised."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--tests", type=int, default=20)
    parser.add_argument("--picture", type=Path, help="where to draw the first test point")
    given = parser.parse_args()
    x, y, tx, ty = data(given.data)
    x, y = x[: given.points], y[: given.points]
    bench = Bench(x.shape[1], THREAT.eps)
    begun = bench.optimum(x, y).numpy()  # where Newton's method converges from
    omega = newton_optimum(begun, x.numpy(), y.double().numpy(), THREAT.eps)
    memory = bench.memories(torch.tensor(omega), x, y, ("muter",))["muter"]
    lines = []
    for k in range(given.tests):
        line = one_point(memory, bench, (x, y), (tx[k], ty[k]), k)
        lines.append(line)
        print(json.dumps({"test point": k, **{a: float(f"{b:.3g}") for a, b in line.items()}}))
    table = {name: np.array([line[name] for line in lines]) for name in lines[0]}
    random = np.stack([table["random"], table["random again"]])
    ordered = (table["made it robust"] > random.max(0)) & (table["made it fragile"] < random.min(0))
    kinds = ("made it robust", "made it fragile", "robust, predicted", "fragile, predicted")
    summary: dict[str, object] = {"test points": len(lines), "in order": int(ordered.sum())}
    summary |= {f"{name}, over the loss": median(table[name] / table["loss"]) for name in kinds}
    summary["random, over the loss"] = median(np.abs(random) / table["loss"])
    print(json.dumps(summary))
    if given.picture:
        side = round(x.shape[1] ** 0.5)
        found = top_influences(memory, bench.module, (x, y), (tx[:1], ty[:1]), 6)
        images = [a.reshape(-1, side, side) for a in (x, tx[:1])]
        plot_influences(found, images[0], images[1][0], given.picture)


def median(values: np.ndarray) -> float:
    return float(f"{np.median(values):.3g}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
