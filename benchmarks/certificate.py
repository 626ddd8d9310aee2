"""Certified requests on MNIST 1 vs 7 and on Covtype: the true distance, the passes, the time.

Every request is compared with the optimum of its remaining points, found by Newton's method on the
closed form in `closed_form.py`, from the optimum of all points, to a gradient at rounding; ridge
with its kinks rounded off less and less. Neither shares code with the package. Beside the seconds
of a request stand those of three retrainings from scratch to the same tolerance: with the package
(an epoch of SGD, Newton steps, the memory); adversarial training without a second-order step of the
package (`usual_training.py`), which has ``--cap`` seconds of the processor; and L-BFGS (scipy) on
the closed form, the fastest retraining that there is. Elapsed and of the processor, which other
work on the machine lengthens less. The published model's accuracy, noise included, is compared with
the optimum's, clean and under attack: MNIST's on its test digits, Covtype's on all rows.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from closed_form import LAMBDA, barrier_optimum, newton_optimum, value_and_slope
from common import QUIET, arguments, one_or_seven_28
from scipy import optimize
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from usual_training import Linear, covtype, trained

from lightning_muter import Certificate, L2Ball, MUterCallback, RemovalDataModule, Trainer
from lightning_muter.evaluation.results_table import Cell, Table

RADIUS = {"logistic": 1e-6, "squared": 1e-5}


class Model(Linear):
    """Trained by SGD, the weight decay the optimizer's."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=LAMBDA)


def closed_form_lbfgs(
    x: np.ndarray, y: np.ndarray, eps: float, loss: str, radius: float
) -> tuple[np.ndarray, float, float]:
    """Where L-BFGS from scratch stops, ‖∇F‖/κ there, and its seconds of the processor."""
    kappa, start = LAMBDA * len(x), time.process_time()
    found = optimize.minimize(
        value_and_slope,
        np.full(x.shape[1], 1e-3),
        args=(x, y, eps, loss),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 20_000, "maxfun": 40_000, "gtol": radius * kappa / 30, "ftol": 0.0},
    )
    return found.x, float(np.linalg.norm(found.jac)) / kappa, time.process_time() - start


class Clock:
    """Seconds since it was made: elapsed, and of the processor."""

    def __init__(self) -> None:
        self.begun = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]


def accuracies(w: np.ndarray, shown: tuple[np.ndarray, np.ndarray], eps: float) -> np.ndarray:
    """Clean and robust accuracy of a linear model; labels are 0 and 1."""
    margin = (2 * shown[1] - 1) * (shown[0] @ w)
    return np.array([(margin > 0).mean(), (margin > eps * np.linalg.norm(w)).mean()])


def setting(
    name: str, x: Tensor, y: Tensor, eps: float, test: Any, loss: str, given: Any
) -> dict[str, Any]:
    """All requests of one setting, each in the table and all of them summed up."""
    shown = (test[0].numpy(), test[1].numpy())
    targets = 2.0 * y.double() - 1 if loss == "squared" else y
    data = TensorDataset(x, targets)
    pl.seed_everything(0, verbose=False)
    model = Model(x.shape[1], loss)
    muter = MUterCallback(
        L2Ball(eps), head="head", loss=loss, newton_steps=12, attack_steps=2, batch_size=4096
    )
    trainer = Trainer(max_epochs=1, callbacks=[muter], precision="64-true", **QUIET)
    start = Clock()
    trainer.fit(model, DataLoader(data, batch_size=128, shuffle=True))
    fit_seconds, fit_processor = start.read()
    certificate = Certificate(1.0, 1e-5, RADIUS[loss])
    start = Clock()  # from where Newton's method left training, kinks and all
    trainer.unlearn(RemovalDataModule(data, [0]), certificate=certificate)
    first_seconds, _ = start.read()
    usual = trained(x[1:], targets[1:], eps, loss, RADIUS[loss], given.cap)
    begun, state = muter.memory, {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(given.seed)
    sizes = [1, len(x) // 100, len(x) // 20]
    xs, ys = x.numpy(), targets.double().numpy()
    optimum = newton_optimum if loss == "logistic" else barrier_optimum
    near = optimum(begun.omega_star.numpy(), xs[1:], ys[1:], eps)
    rows: list[dict[str, Any]] = []
    table, begin = Table(Path(given.output) / f"{name.replace(' ', '_')}.csv"), time.perf_counter()
    for k in range(given.requests):
        if k >= len(sizes) and time.perf_counter() - begin > 60 * given.minutes:
            break
        muter.memory = begun
        model.load_state_dict(state)
        order = 1 + torch.randperm(len(x) - 1, generator=generator)
        gone = order[: sizes[k % len(sizes)]]
        start = Clock()
        result = trainer.unlearn(RemovalDataModule(data, gone.tolist()), certificate=certificate)
        seconds, processor = start.read()
        keep = np.ones(len(x), dtype=bool)
        keep[gone.numpy()], keep[0] = False, False
        best = optimum(near, xs[keep], ys[keep], eps)
        distance = float(np.linalg.norm(muter.memory.private.numpy() - best))
        publication = result.publication
        published = accuracies(muter.memory.omega.numpy(), shown, eps)
        clean, robust = np.abs(published - accuracies(best, shown, eps)).tolist()
        rows.append(
            {
                "m": len(gone),
                "bound": publication.bound,
                "distance": distance,
                "distance_over_radius": distance / RADIUS[loss],
                "seconds": seconds,
                "processor_seconds": processor,
                "times_faster": fit_seconds / seconds,
                "times_faster_processor": fit_processor / processor,
                "times_faster_usual": usual.processor / processor,
                "change_clean": clean,
                "change_robust": robust,
                "corrections": publication.corrections,
                "rebuilds": publication.rebuilds,
                "noise": float((muter.memory.omega - muter.memory.private).norm()),
            }
        )
        row, seed = rows[-1], 1000 * given.seed + k
        table.add(
            Cell(seed, row["m"], row["m"] / len(x), loss, metric, float(value))
            for metric, value in row.items()
            if metric != "m"
        )
    other, least, lbfgs = closed_form_lbfgs(xs[1:], ys[1:], eps, loss, RADIUS[loss])
    worst = max(row["distance"] / RADIUS[loss] for row in rows)
    median = statistics.median(row["seconds"] for row in rows)
    return {
        "setting": f"{name}, {loss}",
        "requests": len(rows),
        "radius": RADIUS[loss],
        "worst distance / radius": worst,
        "above the radius": sum(row["distance"] > RADIUS[loss] for row in rows),
        "bound / distance, median": statistics.median(r["bound"] / r["distance"] for r in rows),
        "seconds of the first request": first_seconds,
        "seconds, median": median,
        "seconds of training with the package": fit_seconds,
        "the same, of the processor": fit_processor,
        "times faster, of the processor, median": statistics.median(
            row["times_faster_processor"] for row in rows
        ),
        "largest change of accuracy, clean and robust": [
            max(row[f"change_{kind}"] for row in rows) for kind in ("clean", "robust")
        ],
        "usual training: bound, distance, steps, seconds, of the processor": [
            usual.bound,
            float(np.linalg.norm(usual.weights - near)),
            usual.steps,
            usual.seconds,
            usual.processor,
        ],
        "L-BFGS on the closed form: bound, distance, seconds of the processor": [
            least,
            float(np.linalg.norm(other - near)),
            lbfgs,
        ],
        "by points": {
            m: {
                key: statistics.median(r[key] for r in rows if r["m"] == m)
                for key in (
                    "distance",
                    "bound",
                    "seconds",
                    "processor_seconds",
                    "times_faster_processor",
                    "times_faster_usual",
                    "corrections",
                    "rebuilds",
                    "noise",
                )
            }
            for m in sizes
        },
    }


def main() -> None:
    """Print one JSON line a setting."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--requests", type=int, default=75, help="a setting; four settings")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    parser.add_argument("--minutes", type=float, default=60.0, help="of a setting's requests")
    parser.add_argument("--cap", type=float, default=120.0, help="seconds of the usual training")
    parser.add_argument("--settings", default="mnist,covtype")
    parser.add_argument("--losses", default="logistic,squared")
    parser.add_argument("--output", default="docs/results/certificate", help="folder of tables")
    given = parser.parse_args()
    sets: dict[str, Any] = {}
    if "mnist" in given.settings:
        x, y, tx, ty = one_or_seven_28(given.data)
        sets["mnist 1 vs 7"] = (x, y, 1.0, (tx, ty))
    if "covtype" in given.settings:
        points = covtype(given.data)
        sets["covtype"] = (*points, 0.1, points)
    for name, (x, y, eps, test) in sets.items():
        for loss in given.losses.split(","):
            print(json.dumps(setting(name, x, y, eps, test, loss, given)), flush=True)


if __name__ == "__main__":
    main()
