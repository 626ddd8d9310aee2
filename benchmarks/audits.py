"""Audits on MNIST 1 vs 7: every number beside Retrain's own and *none*'s.

``distributions`` looks at the models that `audit_models.py` made (28 × 28 pixels, all points);
reconstruction and hard requests at one model of ``--points`` points of 14 × 14 pixels. All models
are at the optimum of their data (L2 ball, logistic). What differs between the splits of
``distributions`` is which half of the models is compared with which half of the Retrains.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from audit_models import EPS, Bench
from common import arguments, mnist, one_or_seven_28
from torch import Tensor

from lightning_muter import Certificate, L2Ball, UnlearningMemory
from lightning_muter.evaluation.klom import klom
from lightning_muter.evaluation.margins import robust_margins
from lightning_muter.evaluation.reconstruction import (
    from_folder,
    from_heads,
    identified,
    similarity,
)
from lightning_muter.evaluation.residual_knowledge import Recognition, recognition
from lightning_muter.evaluation.results_table import Cell, Table
from lightning_muter.evaluation.stress import hardest
from lightning_muter.evaluation.unlearning_lira import UnlearningLiRA
from lightning_muter.unlearning.corrector import correct
from lightning_muter.unlearning.gaussian_mechanism import fresh_noise
from lightning_muter.unlearning.objective import RobustObjective
from lightning_muter.unlearning.points import Batch, unweighted

THREAT = L2Ball(0.5)
SPLITS = 20
#: random perturbations in which forgotten points are looked for
NEAR = L2Ball(2.0)


def pooled(images: Tensor) -> Tensor:
    return F.avg_pool2d(images.unsqueeze(1), 2).reshape(len(images), -1)


def data(folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, tx, ty = mnist(folder)
    keep, test = (y == 1) | (y == 7), (ty == 1) | (ty == 7)
    return pooled(x[keep]), (y[keep] == 7).long(), pooled(tx[test]), (ty[test] == 7).long()


# --- distributions ------------------------------------------------------------------------------


class Models:
    """What `audit_models.py` wrote into a folder: ω (k, p) of every method, by seeds.

    Attributes:
        forgotten: positions of the points that the methods forgot.
        omegas: ω (k, p) of each method, and of *retrain* by the same seeds.
        reference: ω (j, p) of Retrains of other seeds.
    """

    def __init__(self, folder: Path) -> None:
        self.forgotten = torch.tensor(np.load(folder / "forgotten.npy"))
        files = [dict(np.load(path)) for path in sorted(folder.glob("*.npz"))]
        own, alone = [f for f in files if "none" in f], [f for f in files if "none" not in f]
        self.omegas = {name: torch.tensor(np.stack([f[name] for f in own])) for name in own[0]}
        self.reference = torch.tensor(np.stack([f["retrain"] for f in alone]))


def seen(omegas: Tensor, sets: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Clean and robust margins (k, n) of linear models (k, p): the worst δ is ε w / ‖w‖ away."""
    found = {}
    for name, (x, y) in sets.items():
        clean = (omegas @ x.T) * (2.0 * y - 1)
        found[f"clean_{name}"] = clean
        found[f"robust_{name}"] = clean - EPS * omegas.norm(dim=1, keepdim=True)
    return found


def check_margins(bench: Bench, omega: Tensor, x: Tensor, y: Tensor) -> None:
    """Refuse to go on where the package's maximiser finds other robust margins."""
    with bench.view.at(omega):
        own = robust_margins(bench.view, bench.problem, x, y)
    torch.testing.assert_close(own, seen(omega[None], {"": (x, y)})["robust_"][0])


def distributions(folder: Path, source: str, output: Path) -> None:
    """KLoM, U-LiRA and residual knowledge of the models in a folder; a table and JSON lines."""
    x, y, tx, ty = one_or_seven_28(source)
    models, bench = Models(folder), Bench(x.shape[1])
    gone = models.forgotten
    fx, fy = x[gone], y[gone]
    others = torch.ones(len(x), dtype=torch.bool)
    others[gone] = False
    sets = {"forgotten": (fx, fy), "retained": (x[others][:2000], y[others][:2000])}
    sets["test"] = (tx, ty)
    check_margins(bench, models.omegas["none"][0], fx, fy)
    reference = seen(models.reference, sets)
    rates = {
        name: [recognised(bench, omega, fx, fy) for omega in rows]
        for name, rows in models.omegas.items()
    }
    table = Table(output / f"{folder.name.split('-')[0]}.csv")
    table.cells = [cell for cell in table.cells if cell.removed != len(gone)]  # run again
    share = len(gone) / (len(x) // 2)
    lines = []
    for name, rows in models.omegas.items():
        found = seen(rows, sets)
        count = min(len(rows), len(models.reference))
        row: dict[str, object] = {"points": folder.name, "m": len(gone), "models": count}
        row["method"] = name
        for key in reference:
            value = klom(found[key][:count], reference[key][:count])
            row[f"klom {key}"] = float(f"{float(value.mean()):.4g}")
        pairs = zip(rates[name], rates["retrain"], strict=True)
        ratios = [one.residual(other) for one, other in pairs]
        row["residual knowledge"] = round(sum(ratios) / len(ratios), 4)
        row["recognised again"] = round(sum(r.again for r in rates[name]) / len(rates[name]), 4)
        cells = []
        for split in range(SPLITS):
            values = halves(found, reference, split) if count > 3 else {}
            again = {"residual_knowledge": ratios[split % len(ratios)]}
            cells += [
                Cell(split, len(gone), share, name, metric, value)
                for metric, value in {**values, **again}.items()
            ]
        table.add(cells)
        aucs = [cell.value for cell in cells if cell.metric == "u_lira"]
        row["u-lira"] = round(sum(aucs) / len(aucs), 4)
        row["u-lira, 2.5% to 97.5%"] = [
            round(float(q), 3) for q in np.percentile(aucs, [2.5, 97.5])
        ]
        lines.append(json.dumps(row))
        print(lines[-1], flush=True)
    (output / f"{folder.name}.jsonl").write_text("\n".join(lines) + "\n")


def recognised(bench: Bench, omega: Tensor, x: Tensor, y: Tensor) -> Recognition:
    with bench.view.at(omega):
        return recognition(bench.view, NEAR, x, y, draws=10)


def halves(found: dict[str, Tensor], reference: dict[str, Tensor], split: int) -> dict[str, float]:
    """KLoM of a random half of the models and of the Retrains; U-LiRA with the halves as shadows.

    The models that are attacked are the other halves.
    """
    generator = torch.Generator().manual_seed(split)
    count = min(len(found["clean_test"]), len(reference["clean_test"]))
    a, b = (torch.randperm(count, generator=generator).chunk(2) for _ in range(2))
    values = {
        f"klom_{key}": float(klom(found[key][a[0]], reference[key][b[0]]).mean())
        for key in reference
    }
    metric, key = UnlearningLiRA(), "robust_forgotten"
    shadows = (found[key][a[0]], reference[key][b[0]])
    for k, j in zip(a[1].tolist(), b[1].tolist(), strict=True):
        metric.update(found[key][k], *shadows, was_unlearned=True)
        metric.update(reference[key][j], *shadows, was_unlearned=False)
    return {**values, "u_lira": float(metric.compute())}


# --- reconstruction -----------------------------------------------------------------------------


def reconstruction(x: Tensor, y: Tensor, points: int) -> None:
    """One point at a time: from two heads, with noise, from the folder, after a rebase."""
    bench = Bench(x.shape[1], THREAT.eps)
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
        look("the memory's gradient", from_folder(memory, 1, False))
    for name, values in rows.items():
        cosine = sum(v[0] for v in values) / len(values)
        share = sum(v[1] for v in values) / len(values)
        line = {"attack": name, "cosine": round(cosine, 4), "identified": round(share, 3)}
        print(json.dumps({**line, "points": len(values)}), flush=True)


def bench_memory(bench: Bench, x: Tensor, y: Tensor) -> UnlearningMemory:
    with_muter = ("muter",)
    return bench.memories(bench.view.get(), x, y, with_muter)["muter"]


def _curvature(bench: Bench, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    curvature = bench_memory(bench, x, y).curvature
    assert curvature is not None
    return curvature.matvec


def stress(x: Tensor, y: Tensor) -> None:
    """Distances to Retrain relative to *none*, of random points and of hard ones."""
    bench = Bench(x.shape[1], THREAT.eps)
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
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--models", type=Path, nargs="*", help="folders of audit_models.py")
    parser.add_argument("--output", type=Path, default=Path("docs/results/audits"))
    given = parser.parse_args()
    for folder in given.models or []:
        distributions(folder, given.data, given.output)
    if given.models is None:
        x, y, _, _ = data(given.data)
        x, y = x[: given.points], y[: given.points]
        stress(x, y)
        reconstruction(x, y, 30)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
