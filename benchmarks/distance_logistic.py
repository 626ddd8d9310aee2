"""MNIST 1 vs 7: the distance to Retrain of every method, relative to none.

L2: all 13,007 points, eps = 1.0. L-infinity: 2,000 points, eps = 0.05, smoothed objective with
one fixed bandwidth. λ = 1e-3, no data range, trained and retrained to stationarity.
"""

from __future__ import annotations

import copy
import json
import warnings

import pytorch_lightning as pl
import torch
from common import QUIET, Logistic, Points, arguments, one_or_seven
from torch import Tensor

from lightning_muter import L2Ball, LinfBall, MUterCallback, RemovalDataModule, Threat, Trainer

ROWS = [
    ("muter", {}),
    ("muter", {"response": "unconstrained"}),
    *((name, {}) for name in ("newton", "newton_delta", "fisher", "fisher_delta")),
    *((name, {}) for name in ("influence", "influence_delta")),
]


def fit(
    model: Logistic, x: Tensor, y: Tensor, threat: Threat, method: str, steps: int, **options: str
) -> tuple[Trainer, MUterCallback]:
    """Finetune for an epoch, then Newton steps to the robust optimum, then Stage I."""
    callback = MUterCallback(
        threat,
        head="head",
        loss="logistic",
        method=method,
        newton_steps=steps,
        batch_size=4096,
        **options,  # type: ignore[arg-type]
    )
    model.lr = 0.1 if steps else 0.0
    trainer = Trainer(max_epochs=1, callbacks=[callback], precision="64-true", **QUIET)
    trainer.fit(model, Points(x, y))
    return trainer, callback


def main() -> None:
    """Print one JSON line a method and removal count."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--threat", choices=["l2", "linf"], default="l2")
    parser.add_argument("--bandwidth", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    pl.seed_everything(given.seed, verbose=False)
    x, y = one_or_seven(given.data)
    order = torch.randperm(len(x))
    threat: Threat = L2Ball(1.0)
    counts = [1, 40, 400]
    if given.threat == "linf":
        x, y, counts = x[order[:2000]], y[order[:2000]], [1, 20, 80, 160]
        order, threat = torch.randperm(2000), LinfBall(0.05, bandwidth=given.bandwidth)
    model = Logistic()
    steps = 12 if given.threat == "l2" else 40
    _, callback = fit(model, x, y, threat, "muter", steps)
    print(json.dumps({"memory": callback.memory.summary}), flush=True)
    retrained = {}
    for m in counts:
        keep = torch.ones(len(x), dtype=torch.bool)
        keep[order[:m]] = False
        again = copy.deepcopy(model)
        _, other = fit(again, x[keep], y[keep], threat, "none", steps)
        retrained[m] = other.memory.omega_star
        residual = other.memory.summary["residual_gradient"]
        none = float((callback.memory.omega_star - retrained[m]).norm())
        print(json.dumps({"removed": m, "none": none, "retrain_residual": residual}), flush=True)
    for method, options in ROWS:
        for m in counts:
            mine = copy.deepcopy(model)
            trainer, memory = fit(mine, x, y, threat, method, 0, **options)
            none = float((memory.memory.omega_star - retrained[m]).norm())
            result = trainer.unlearn(RemovalDataModule(Points(x, y), order[:m].tolist()))
            distance = float((memory.memory.omega - retrained[m]).norm())
            row = {"method": method, **options, "removed": m, "distance": distance}
            row.update(relative_to_none=distance / none, status=result.status)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
