"""TRADES: distance of one step to a Retrain that was really run, on MNIST and CIFAR-10.

A softmax head is trained by TRADES with an L2 threat, to the optimum of its objective, and again
without the forgotten points: on the pixels of MNIST 1 against 7, or on classes of CIFAR-10 as a
frozen smooth network sees them, whose features the threat perturbs. Beside MUter's step with the
curvature of TRADES stand the same step with adversarial training's Hessian, a memory that takes the
training for adversarial training altogether, and the step without the adversary's response
(newton_delta).
"""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import QUIET, Points, arguments, cifar10, keep, one_or_seven
from torch import Tensor, nn

from lightning_muter import TRADES, L2Ball, MUterCallback, Trainer, UnlearningMemory
from lightning_muter.linalg.cholesky import direct
from lightning_muter.spec import Settings
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.request import forget
from lightning_muter.unlearning.stage_one import build_memories

SHARES = (0.01, 0.02, 0.03)


class Softmax(pl.LightningModule):
    """An output a class, linear in the input, trained by TRADES."""

    def __init__(self, objective: TRADES, weight_decay: float, features: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, classes)
        self.objective, self.weight_decay = objective, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.objective.loss(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=self.weight_decay)


def features_of_cifar10(data: str, points: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features (n, 32) of root mean square 1 and labels, of the first classes among the points.

    The network was trained on 10,000 other images of all classes and is frozen.
    """
    x, y = cifar10(data, 10_000 + points)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(800, 32),
        nn.Tanh(),
    )
    whole = nn.Sequential(network, nn.Linear(32, 10))
    adam = torch.optim.Adam(whole.parameters(), lr=2e-3)
    for _ in range(6):
        for some in (points + torch.randperm(10_000)).split(64):
            adam.zero_grad()
            F.cross_entropy(whole(x[some]), y[some]).backward()
            adam.step()
    with torch.no_grad():
        h = network(x[:points]).double()
    some = y[:points] < classes
    return (h / h.square().mean().sqrt())[some], y[:points][some]


def train(
    seed: int, x: Tensor, y: Tensor, threat: L2Ball, objective: TRADES, weight_decay: float
) -> tuple[Softmax, UnlearningMemory]:
    """From the seed's own initial weights to the optimum."""
    pl.seed_everything(seed, verbose=False)
    model = Softmax(objective, weight_decay, x.shape[1], int(y.max()) + 1)
    muter = MUterCallback(
        threat, head="head", objective=objective, newton_steps=30, attack_steps=5, batch_size=2048
    )
    trainer = Trainer(max_epochs=5, callbacks=[muter], precision="64-true", **QUIET)
    trainer.fit(model, Points(x, y))
    assert muter.memory is not None
    return model, muter.memory


def memory_of(model: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> UnlearningMemory:
    """Another memory at the trained weights."""
    digests = torch.zeros(len(x), 16, dtype=torch.uint8)
    (found,) = build_memories(model, [settings], [unweighted(x, y)], digests, bytes(16))
    return found


def one_seed(
    seed: int, x: Tensor, y: Tensor, threat: L2Ball, objective: TRADES, weight_decay: float
) -> list[dict[str, Any]]:
    """A row for each share of removed points and each step."""
    n, start = len(x), time.perf_counter()
    model, trades = train(seed, x, y, threat, objective, weight_decay)
    settings = trades.settings
    others = {
        "newton_delta": memory_of(model, x, y, replace(settings, method="newton_delta")),
        "adversarial training": memory_of(model, x, y, replace(settings, objective=None)),
    }
    order, rows = torch.randperm(n), []
    for share in SHARES:
        gone, rest = order[: round(share * n)].tolist(), order[round(share * n) :].sort().values
        _, again = train(seed, x[rest], y[rest], threat, objective, weight_decay)
        optimum, before = again.omega_star, trades.omega_star
        outcomes = {
            name: forget(memory, memory.settings.view(model), gone, x[gone], y[gone])
            for name, memory in {"muter": trades, **others}.items()
        }
        ends = {name: outcome.memory.omega for name, outcome in outcomes.items()}
        rhs = outcomes["muter"].memory.gradient
        other = outcomes["adversarial training"].memory.curvature
        assert other is not None
        ends["adversarial Hessian"] = before + direct(other.matrix, rhs).value
        none = float((before - optimum).norm())
        for name, omega in ends.items():
            rows.append(
                {
                    "seed": seed,
                    "n": n,
                    "removed": len(gone),
                    "step": name,
                    "relative_to_none": float((omega - optimum).norm()) / none,
                    "none": none,
                    "gradient": trades.summary["residual_gradient"],
                    "retrain_gradient": again.summary["residual_gradient"],
                    "smallest_eigenvalue": trades.summary["smallest_eigenvalue"],
                    "stationary": trades.summary["stationary"],
                    "tied": trades.summary["tied"],
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows


def main() -> None:
    """Print a JSON line for every seed, share and step."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--problem", choices=["mnist", "cifar10"], default="mnist")
    parser.add_argument("--classes", type=int, default=10, help="of CIFAR-10, the first ones")
    parser.add_argument("--eps", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, help="of the threat; none by default")
    parser.add_argument("--beta", type=float, default=6.0)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--weight-decay", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="a CSV file for the documentation's tables")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if given.problem == "mnist":
        all_x, all_y = one_or_seven(given.data)
    else:
        all_x, all_y = features_of_cifar10(given.data, 10_000, given.classes)
    threat = L2Ball(given.eps, temperature=given.temperature)
    for seed in given.seeds:
        torch.manual_seed(100 + seed)
        some = torch.randperm(len(all_x))[: given.points]
        found = one_seed(
            seed, all_x[some], all_y[some], threat, TRADES(beta=given.beta), given.weight_decay
        )
        for row in found:
            keep({"problem": given.problem, **row}, given.output)


if __name__ == "__main__":
    main()
