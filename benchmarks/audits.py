"""Audits on MNIST 1 vs 7 (14 × 14 pixels): every number beside Retrain's own and *none*'s.

A model's data are the points to forget and a random half of the others, so that models of
different seeds differ and an audit has a distribution to look at. All models are at the optimum of
their data (L2 ball, logistic), found in closed form.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from common import arguments, mnist
from torch import Tensor, nn

from lightning_muter import Certificate, L2Ball, UnlearningMemory
from lightning_muter.evaluation.klom import klom
from lightning_muter.evaluation.margins import margins, robust_margins
from lightning_muter.evaluation.reconstruction import (
    from_folder,
    from_heads,
    identified,
    similarity,
)
from lightning_muter.evaluation.residual_knowledge import recognition
from lightning_muter.evaluation.stress import hardest
from lightning_muter.evaluation.unlearning_lira import UnlearningLiRA
from lightning_muter.models import ModelView
from lightning_muter.spec import Settings
from lightning_muter.unlearning.certifiable import linear_objective
from lightning_muter.unlearning.corrector import correct
from lightning_muter.unlearning.descent import descend
from lightning_muter.unlearning.gaussian_mechanism import fresh_noise
from lightning_muter.unlearning.objective import RobustObjective
from lightning_muter.unlearning.points import Batch, unweighted
from lightning_muter.unlearning.request import forget
from lightning_muter.unlearning.stage_one import build_memories

THREAT = L2Ball(0.5)
METHODS = ("muter", "newton", "newton_delta", "fisher", "fisher_delta", "influence_delta")


def settings(method: str) -> Settings:
    return Settings(
        method=method,
        threat=THREAT,
        head="0",
        parameters=None,
        loss="logistic",
        response="constrained",
        inverse="neumann",
        neumann_order=3,
        space="input",
        damping=0.0,
        solver="auto",
        weight_decay=1e-3,
    )


class Bench:
    """A linear model and what is done to it."""

    def __init__(self, features: int) -> None:
        self.module = nn.Sequential(nn.Linear(features, 1, bias=False)).double()
        nn.init.constant_(self.module[0].weight, 1e-2)
        self.view: ModelView = settings("muter").view(self.module)
        self.start = self.view.get()
        self.problem = settings("muter").problem()

    def optimum(self, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
        objective = linear_objective(settings("muter"), self.view, [unweighted(x, y)])
        found = descend(
            objective, [self.start if start is None else start], lambda g: 0 * g, 1e-8, 0
        )
        return found.state.omega

    def memories(self, omega: Tensor, x: Tensor, y: Tensor) -> dict[str, UnlearningMemory]:
        digests = torch.zeros(len(x), 16, dtype=torch.uint8)
        with self.view.at(omega):
            built = build_memories(
                self.module, [settings(m) for m in METHODS], [unweighted(x, y)], digests, b"k" * 16
            )
        return dict(zip(METHODS, built, strict=True))

    def forgotten(self, memory: UnlearningMemory, x: Tensor, y: Tensor, m: int) -> UnlearningMemory:
        """The memory without its first m points."""
        with self.view.at(memory.omega_star):
            return forget(memory, self.view, list(range(m)), x[:m], y[:m]).memory

    def seen(self, omega: Tensor, sets: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Clean and robust margins of every set."""
        found = {}
        with self.view.at(omega):
            for name, (x, y) in sets.items():
                found[f"clean {name}"] = margins(self.view, x, y)
                found[f"robust {name}"] = robust_margins(self.view, self.problem, x, y)
        return found


def pooled(images: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(images.unsqueeze(1), 2).reshape(len(images), -1)


def data(folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, tx, ty = mnist(folder)
    keep, test = (y == 1) | (y == 7), (ty == 1) | (ty == 7)
    return pooled(x[keep]), (y[keep] == 7).long(), pooled(tx[test]), (ty[test] == 7).long()


def distributions(x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], m: int, models: int) -> None:
    """KLoM, U-LiRA and residual knowledge of ``models`` models each."""
    bench, generator = Bench(x.shape[1]), torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    gone, others = order[:m], order[m:]
    fx, fy = x[gone], y[gone]
    shown = others[:200]
    sets = {
        "forgotten": (fx, fy),
        "retained": (x[shown], y[shown]),
        "test": (test[0][:200], test[1][:200]),
    }
    found: dict[str, list[dict[str, Tensor]]] = {}
    knowledge: dict[str, list[tuple[float, float]]] = {}
    for _ in range(models):
        some = others[torch.randperm(len(others), generator=generator)[: len(others) // 2]]
        rest = (x[some], y[some])
        all_x, all_y = torch.cat([fx, rest[0]]), torch.cat([fy, rest[1]])
        trained = bench.optimum(all_x, all_y)
        candidates = {"retrain": bench.optimum(*rest, start=trained), "none": trained}
        for name, memory in bench.memories(trained, all_x, all_y).items():
            candidates[name] = bench.forgotten(memory, all_x, all_y, m).omega
        rates = {}
        for name, omega in candidates.items():
            found.setdefault(name, []).append(bench.seen(omega, sets))
            with bench.view.at(omega):
                rates[name] = recognition(bench.view, L2Ball(1.0), fx, fy, draws=10)
        for name, rate in rates.items():
            knowledge.setdefault(name, []).append((rate.residual(rates["retrain"]), rate.again))
    half = models // 2
    reference = found["retrain"][half:]
    for name, rows in found.items():
        row: dict[str, object] = {"m": m, "models": models, "method": name}
        mine = rows[:half]
        for key in reference[0]:
            value = klom(stacked(mine, key), stacked(reference, key))
            row[f"klom {key}"] = round(float(value.mean()), 4)
        row["u-lira robust"] = round(lira(rows, found["retrain"], "robust forgotten"), 4)
        ratio, again = torch.tensor(knowledge[name]).mean(dim=0).tolist()
        row |= {"residual knowledge": round(ratio, 4), "recognised again": round(again, 4)}
        print(json.dumps(row), flush=True)


def stacked(rows: list[dict[str, Tensor]], key: str) -> Tensor:
    return torch.stack([row[key] for row in rows])


def lira(rows: list[dict[str, Tensor]], retrains: list[dict[str, Tensor]], key: str) -> float:
    """Shadows are thirds of the models, so that Retrain against Retrain shares none of them."""
    third, metric = len(rows) // 3, UnlearningLiRA()
    unlearned, retrained = stacked(rows, key), stacked(retrains, key)
    shadows = (unlearned[:third], retrained[third : 2 * third])
    targets = len(rows) - 2 * third
    for k in range(2 * third, 2 * third + targets // 2):
        metric.update(unlearned[k], *shadows, was_unlearned=True)
        metric.update(retrained[k + targets // 2], *shadows, was_unlearned=False)
    return float(metric.compute())


def reconstruction(x: Tensor, y: Tensor, points: int) -> None:
    """One point at a time: from two heads, with noise, from the folder, after a rebase."""
    bench = Bench(x.shape[1])
    trained = bench.optimum(x, y)
    half = torch.arange(len(x)) % 2 == 0
    with bench.view.at(trained):
        own = _curvature(bench, x, y)
        theirs = _curvature(bench, x[half], y[half])  # what an attacker has of the same kind
    rows: dict[str, list[tuple[float, bool]]] = {}
    for i in range(0, len(x), len(x) // points):
        at = torch.cat([torch.tensor([i]), torch.arange(len(x))[torch.arange(len(x)) != i]])
        after = bench.optimum(x[at[1:]], y[at[1:]], start=trained)
        with bench.view.at(trained):
            memory = bench.forgotten(bench_memory(bench, x[at], y[at]), x[at], y[at], 1)

        def look(name: str, guess: Tensor, i: int = i) -> None:
            rows.setdefault(name, []).append((similarity(guess, x[i]), identified(guess, x, i)))

        decay = memory.settings.weight_decay
        look("two heads, the curvature known", from_heads(trained, after, own, 1, decay))
        look("two heads, the curvature guessed", from_heads(trained, after, theirs, 1, decay))
        for radius in (1e-6, 1e-4, 1e-3, 1e-2):
            sigma = Certificate(1.0, 1e-5, radius).sigma
            noisy = after + fresh_noise(len(after), sigma)
            look(
                f"two heads, a certificate of radius {radius:g}", from_heads(trained, noisy, own, 1)
            )
        look("the folder", from_folder(memory, 1, False))
        look("the folder, after a rebase", after)  # nothing but the new expansion point is there
    for name, values in rows.items():
        cosine = sum(v[0] for v in values) / len(values)
        share = sum(v[1] for v in values) / len(values)
        line = {"attack": name, "cosine": round(cosine, 4), "identified": round(share, 3)}
        print(json.dumps({**line, "points": len(values)}), flush=True)


def bench_memory(bench: Bench, x: Tensor, y: Tensor) -> UnlearningMemory:
    digests = torch.zeros(len(x), 16, dtype=torch.uint8)
    (built,) = build_memories(
        bench.module, [settings("muter")], [unweighted(x, y)], digests, b"k" * 16
    )
    return built


def _curvature(bench: Bench, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    curvature = bench_memory(bench, x, y).curvature
    assert curvature is not None
    return curvature.matvec


def stress(x: Tensor, y: Tensor) -> None:
    """Distances to Retrain relative to *none*, of random points and of hard ones."""
    bench = Bench(x.shape[1])
    trained = bench.optimum(x, y)
    with bench.view.at(trained):
        memory = bench_memory(bench, x, y)
        chosen = hardest(memory, bench.module, (x, y), len(x) // 20)
    for share in (100, 20):
        m = len(x) // share
        for name, gone in (
            ("random", torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:m]),
            ("hard", chosen[:m]),
        ):
            keep = torch.ones(len(x), dtype=torch.bool)
            keep[gone] = False
            at = torch.cat([gone, torch.nonzero(keep).flatten()])
            retrained = bench.optimum(x[keep], y[keep], start=trained)
            with bench.view.at(trained):
                after = bench.forgotten(bench_memory(bench, x[at], y[at]), x[at], y[at], m)
            rest: list[Batch] = [unweighted(x[keep], y[keep])]
            objective = RobustObjective(bench.view, bench.problem, lambda rest=rest: rest)
            none = float((trained - retrained).norm())
            row: dict[str, object] = {"points": name, "m": m, "none": round(none, 5)}
            for steps in (0, 1, 3):
                moved = after
                if steps:
                    with bench.view.at(after.omega):
                        moved = correct(after, objective, steps).memory
                distance = float((moved.omega - retrained).norm()) / none
                row[f"corrector {steps}"] = float(f"{distance:.3g}")
            print(json.dumps(row), flush=True)


def main() -> None:
    """Print one JSON line a row."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--points", type=int, default=3000)
    parser.add_argument("--models", type=int, default=30)
    given = parser.parse_args()
    x, y, tx, ty = data(given.data)
    x, y = x[: given.points], y[: given.points]
    stress(x, y)
    reconstruction(x, y, 30)
    for share in (0.01, 0.05):
        distributions(x, y, (tx, ty), int(share * len(x)), given.models)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
