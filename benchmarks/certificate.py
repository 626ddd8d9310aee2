"""Certified requests on MNIST 1 vs 7 and on Covtype: the true distance, the passes, the time.

Every request is compared with the optimum of its remaining points, found by Newton's method on
the closed form written out here, from the optimum of all points, to a gradient at rounding; ridge
with its kinks rounded off less and less. Neither shares code with the package. Beside the seconds
of a request stand those of one training with the package (an epoch of SGD and Newton steps), and of
L-BFGS (scipy) from scratch on the closed form, the fastest retraining that there is.
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
import torch.nn.functional as F
from closed_form import LAMBDA, barrier_optimum, newton_optimum, value_and_slope
from common import QUIET, arguments, one_or_seven
from scipy import optimize
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import Certificate, L2Ball, MUterCallback, RemovalDataModule, Trainer

RADIUS = {"logistic": 1e-6, "squared": 1e-5}


class Model(pl.LightningModule):
    """A linear model without a bias."""

    def __init__(self, features: int, loss: str) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(features, 1, bias=False), loss
        nn.init.normal_(self.head.weight, std=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        z, y = self(batch[0]).squeeze(1), batch[1].to(batch[0])
        if self.loss == "squared":
            return 0.5 * (z - y).square().mean()
        return F.binary_cross_entropy_with_logits(z, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=LAMBDA)


def covtype(data: str) -> tuple[Tensor, Tensor]:
    """The 10,000-row sample: type 2 against the rest, columns in [0, 1]."""
    with np.load(Path(data) / "covtype10k.npz") as arrays:
        x = torch.tensor(arrays["features"]).double()
        y = (torch.tensor(arrays["cover_type"]) == 2).long()
    low, high = x.amin(dim=0), x.amax(dim=0)
    return (x - low) / (high - low).clamp(min=1), y


def retrain_seconds(x: np.ndarray, y: np.ndarray, eps: float, loss: str, radius: float) -> float:
    """Seconds of L-BFGS from scratch until ‖∇F‖/κ is at most the radius, or it stops."""
    kappa, start = LAMBDA * len(x), time.perf_counter()
    optimize.minimize(
        value_and_slope,
        np.full(x.shape[1], 1e-3),
        args=(x, y, eps, loss),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 20_000, "maxfun": 40_000, "gtol": radius * kappa / 30, "ftol": 0.0},
    )
    return time.perf_counter() - start


def setting(name: str, x: Tensor, y: Tensor, eps: float, loss: str, given: Any) -> dict[str, Any]:
    """All requests of one setting."""
    targets = 2.0 * y.double() - 1 if loss == "squared" else y
    data = TensorDataset(x, targets)
    pl.seed_everything(0, verbose=False)
    model = Model(x.shape[1], loss)
    muter = MUterCallback(
        L2Ball(eps), head="head", loss=loss, newton_steps=12, attack_steps=2, batch_size=4096
    )
    trainer = Trainer(max_epochs=1, callbacks=[muter], precision="64-true", **QUIET)
    start = time.perf_counter()
    trainer.fit(model, DataLoader(data, batch_size=128, shuffle=True))
    fit_seconds = time.perf_counter() - start
    certificate = Certificate(1.0, 1e-5, RADIUS[loss])
    start = time.perf_counter()  # from where Newton's method left training, kinks and all
    trainer.unlearn(RemovalDataModule(data, [0]), certificate=certificate)
    first_seconds = time.perf_counter() - start
    begun, state = muter.memory, {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(given.seed)
    sizes = [1, len(x) // 100, len(x) // 20]
    xs, ys = x.numpy(), targets.double().numpy()
    optimum = newton_optimum if loss == "logistic" else barrier_optimum
    near = optimum(begun.omega_star.numpy(), xs[1:], ys[1:], eps)
    rows = []
    for k in range(given.requests):
        muter.memory = begun
        model.load_state_dict(state)
        order = 1 + torch.randperm(len(x) - 1, generator=generator)
        gone = order[: sizes[k % len(sizes)]]
        start = time.perf_counter()
        result = trainer.unlearn(RemovalDataModule(data, gone.tolist()), certificate=certificate)
        seconds = time.perf_counter() - start
        keep = np.ones(len(x), dtype=bool)
        keep[gone.numpy()], keep[0] = False, False
        best = optimum(near, xs[keep], ys[keep], eps)
        distance = float(np.linalg.norm(muter.memory.private.numpy() - best))
        publication = result.publication
        rows.append(
            {
                "m": len(gone),
                "bound": publication.bound,
                "distance": distance,
                "seconds": seconds,
                "corrections": publication.corrections,
                "rebuilds": publication.rebuilds,
                "noise": float((muter.memory.omega - muter.memory.private).norm()),
            }
        )
    retrain = retrain_seconds(xs[keep], ys[keep], eps, loss, RADIUS[loss])
    worst = max(row["distance"] / RADIUS[loss] for row in rows)
    median = statistics.median(row["seconds"] for row in rows)
    return {
        "setting": name,
        "requests": len(rows),
        "radius": RADIUS[loss],
        "worst distance / radius": worst,
        "above the radius": sum(row["distance"] > RADIUS[loss] for row in rows),
        "bound / distance, median": statistics.median(r["bound"] / r["distance"] for r in rows),
        "seconds of the first request": first_seconds,
        "seconds, median": median,
        "seconds of training with the package": fit_seconds,
        "seconds of L-BFGS on the closed form": retrain,
        "by points": {
            m: {
                key: statistics.median(r[key] for r in rows if r["m"] == m)
                for key in ("distance", "bound", "seconds", "corrections", "rebuilds", "noise")
            }
            for m in sizes
        },
    }


def main() -> None:
    """Print one JSON line a setting."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--requests", type=int, default=75, help="a setting; four settings")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    parser.add_argument("--settings", default="mnist,covtype")
    parser.add_argument("--losses", default="logistic,squared")
    given = parser.parse_args()
    sets = {}
    if "mnist" in given.settings:
        sets["mnist 1 vs 7"] = (*one_or_seven(given.data), 1.0)
    if "covtype" in given.settings:
        sets["covtype"] = (*covtype(given.data), 0.1)
    for name, (x, y, eps) in sets.items():
        for loss in given.losses.split(","):
            print(json.dumps(setting(f"{name}, {loss}", x, y, eps, loss, given)), flush=True)


if __name__ == "__main__":
    main()
