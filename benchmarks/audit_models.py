"""The models that `audits.py` looks at: trained, trained again, and unlearned by every method.

MNIST 1 vs 7 at 28 × 28 pixels, logistic, L2 ball, λ = 1e-3. A model of seed s is trained on half of
all points: the points to forget, which are the same for all seeds, and others that the seed draws.
Its Retrain is the optimum of the others alone. Both optima are found by code that shares nothing
with the package (closed_form.py); the package builds its memory at the first of them and forgets.
Seeds from ``--models`` to twice that are Retrains alone: what the audits compare with. The points
to forget are random, or hard (evaluation.stress): those that pull the model of everyone farthest in
one direction.

Each seed's parameters are kept in a file, so that a run that was cut short goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from closed_form import newton_optimum
from common import arguments, one_or_seven_28
from torch import Tensor, nn

from lightning_muter import L2Ball, UnlearningMemory
from lightning_muter.evaluation.stress import hardest
from lightning_muter.models import ModelView
from lightning_muter.spec import Settings
from lightning_muter.unlearning.certifiable import linear_objective
from lightning_muter.unlearning.corrector import correct
from lightning_muter.unlearning.descent import descend
from lightning_muter.unlearning.objective import RobustObjective
from lightning_muter.unlearning.points import Batch, unweighted
from lightning_muter.unlearning.request import forget
from lightning_muter.unlearning.stage_one import build_memories

EPS = 1.0
METHODS = ("muter", "newton", "newton_delta", "fisher", "fisher_delta", "influence")
METHODS += ("influence_delta",)


def settings(method: str, eps: float = EPS) -> Settings:
    return Settings(
        method=method,
        threat=L2Ball(eps),
        head="0",
        loss="logistic",
        weight_decay=1e-3,
    )


class Bench:
    """A linear model and what is done to it."""

    def __init__(self, features: int, eps: float = EPS) -> None:
        self.eps = eps
        self.module = nn.Sequential(nn.Linear(features, 1, bias=False)).double()
        nn.init.constant_(self.module[0].weight, 1e-2)
        self.view: ModelView = settings("muter", eps).view(self.module)
        self.start = self.view.get()
        self.problem = settings("muter", eps).problem()

    def optimum(self, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
        """By the package's own descent."""
        own = settings("muter", self.eps)
        objective = linear_objective(own, self.view, unweighted(x, y))
        begun = self.start if start is None else start
        return descend(objective, [begun], lambda g: 0 * g, 1e-8, 0).state.omega

    def memories(
        self, omega: Tensor, x: Tensor, y: Tensor, methods: tuple[str, ...] = METHODS
    ) -> dict[str, UnlearningMemory]:
        digests = torch.zeros(len(x), 16, dtype=torch.uint8)
        kinds = [settings(m, self.eps) for m in methods]
        with self.view.at(omega):
            built = build_memories(self.module, kinds, [unweighted(x, y)], digests, b"k" * 16)
        return dict(zip(methods, built, strict=True))

    def forgotten(self, memory: UnlearningMemory, x: Tensor, y: Tensor, m: int) -> UnlearningMemory:
        """The memory without its first m points."""
        with self.view.at(memory.omega_star):
            return forget(memory, self.view, list(range(m)), x[:m], y[:m]).memory

    def corrected(self, memory: UnlearningMemory, x: Tensor, y: Tensor, steps: int) -> Tensor:
        """ω after corrector steps on the remaining points."""
        rest: list[Batch] = [unweighted(x, y)]
        objective = RobustObjective(self.view, self.problem, lambda: rest)
        with self.view.at(memory.omega):
            return correct(memory, objective, steps).memory.omega


def chosen(kind: str, bench: Bench, x: Tensor, y: Tensor, everyone: Tensor) -> Tensor:
    """The order in which points are forgotten: by chance, or the hardest first."""
    if kind == "random":
        return torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    memory = bench.memories(everyone, x, y, ("muter",))["muter"]
    with bench.view.at(everyone):
        return hardest(memory, bench.module, (x, y), len(x))


@dataclass(frozen=True)
class What:
    """What is made of a seed: its Retrain alone, or the methods and muter's corrector steps."""

    alone: bool
    methods: tuple[str, ...] = METHODS
    correctors: tuple[int, ...] = ()


def make(
    bench: Bench, x: Tensor, y: Tensor, order: Tensor, m: int, seed: int, near: Tensor, what: What
) -> dict[str, np.ndarray]:
    """ω of every method for one seed."""
    generator = torch.Generator().manual_seed(1 + seed)
    gone, others = order[:m], order[m:]
    some = others[torch.randperm(len(others), generator=generator)[: len(x) // 2 - m]]
    rest = (x[some].numpy(), y[some].numpy())
    if what.alone:
        return {"retrain": newton_optimum(near.numpy(), *rest, bench.eps)}
    both = torch.cat([gone, some])
    own_x, own_y = x[both], y[both]
    trained = newton_optimum(near.numpy(), own_x.numpy(), own_y.numpy(), bench.eps)
    found = {"retrain": newton_optimum(trained, *rest, bench.eps), "none": trained}
    for name, memory in bench.memories(torch.tensor(trained), own_x, own_y, what.methods).items():
        after = bench.forgotten(memory, own_x, own_y, m)
        found[name] = after.omega.numpy()
        for steps in what.correctors if name == "muter" else ():
            moved = bench.corrected(after, x[some], y[some], steps)
            found[f"muter_corrected_{steps}"] = moved.numpy()
    return found


def main() -> None:
    """Write a file a seed until the time is up; prints how many there are."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--share", type=float, default=0.01, help="forgotten, of a model's points")
    parser.add_argument("--points", choices=("random", "hard"), default="random")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--correctors", type=int, nargs="*", default=(), help="steps after muter's")
    parser.add_argument("--minutes", type=float, default=14.0)
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    x, y, _, _ = one_or_seven_28(given.data)
    bench = Bench(x.shape[1])
    near = torch.tensor(newton_optimum(np.full(x.shape[1], 1e-2), x.numpy(), y.numpy(), EPS))
    order = chosen(given.points, bench, x, y, near)
    m = round(given.share * (len(x) // 2))
    folder = given.folder / f"{given.points}-{m}"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "forgotten.npy", order[:m].numpy())
    pairs = ((k, k + given.models) for k in range(given.models))  # a part is whole as it is
    for seed in (one for pair in pairs for one in pair):
        path = folder / f"{seed:04d}.npz"
        if path.exists():
            continue
        if time.monotonic() > end:
            break
        what = What(seed >= given.models, tuple(given.methods), tuple(given.correctors))
        found = make(bench, x, y, order, m, seed, near, what)
        partial = path.with_suffix(".part")
        with partial.open("wb") as file:
            np.savez(file, **found)
        partial.rename(path)
    print(folder, len(list(folder.glob("*.npz"))), "of", 2 * given.models, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
