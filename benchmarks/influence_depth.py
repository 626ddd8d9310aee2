"""Influence across depth: heads of one, two and three layers, and a network trained whole.

MNIST 1 vs 7 at 7 × 7 pixels, tanh, L2 ball. All trainings are really run, to an optimum, by numpy
code that shares nothing with the package (tanh_network.py): without single points, and without
random tenths; begun at ω* (the basin of the model that is asked about) and at the initial weights
(what training again does). What is predicted is the change of the robust loss of test points. The
proximal Bregman response function (PBRF) is the third yardstick: it asks the kept points for the
outputs that they had. One JSON line a depth, seed, function and yardstick.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import arguments, mnist
from influence import correlations, interval
from tanh_network import Network, proximal_bregman, trained
from torch import Tensor, nn

from lightning_muter import L2Ball, SolverError, influence_on_losses
from lightning_muter.evaluation.results_table import Cell, Table
from lightning_muter.spec import Settings
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.stage_one import build_memories

EPS, DECAY = 0.3, 3e-3
#: units between the input (49) and the output, and how many of the layers are frozen
DEPTHS = {
    "head of 1 layer": ((16,), 1),
    "head of 2 layers": ((16, 8), 1),
    "head of 3 layers": ((16, 8, 8), 1),
    "network, whole": ((8,), 0),
}
#: what a table calls depths and yardsticks
SHORT = {
    "head of 1 layer": "head1",
    "head of 2 layers": "head2",
    "head of 3 layers": "head3",
    "network, whole": "network",
    "Retrain from ω*": "retrain_near",
    "Retrain from the start": "retrain_start",
    "PBRF": "pbrf",
}
FUNCTIONS = {
    "ours (constrained response)": ("muter", "constrained", "neumann"),
    "the paper's (unconstrained)": ("muter", "unconstrained", "exact"),
    "the paper's, its series clipped": ("muter", "unconstrained", "neumann"),
    "clean (Koh and Liang)": ("newton", "constrained", "neumann"),
    "adversarial points, no response": ("newton_delta", "constrained", "neumann"),
}


def data(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y, tx, ty = mnist(folder)
    keep, test = (y == 1) | (y == 7), (ty == 1) | (ty == 7)

    def pooled(images: Tensor) -> np.ndarray:
        return nn.functional.avg_pool2d(images.unsqueeze(1), 4).reshape(len(images), -1).numpy()

    labels = [(one == 7).double().numpy() for one in (y[keep], ty[test])]
    return pooled(x[keep]), labels[0], pooled(tx[test]), labels[1]


@dataclass(frozen=True)
class Study:
    """One depth and seed: the points, the network, its optimum."""

    net: Network
    x: np.ndarray
    y: np.ndarray
    test: tuple[np.ndarray, np.ndarray]
    start: np.ndarray
    omega: np.ndarray

    def changes(self, kind: str, removed: list[np.ndarray]) -> tuple[np.ndarray, float]:
        """The change (k, t) of the test losses by one yardstick, and the median move of ω."""
        base = self.omega
        found, moves = [], []
        for gone in removed:
            keep = np.ones(len(self.x), dtype=bool)
            keep[gone] = False
            left = (self.x[keep], self.y[keep])
            if kind == "PBRF":
                after = proximal_bregman(self.net, base, left, (self.x[gone], self.y[gone]))
            else:
                start = base if kind == "Retrain from ω*" else self.start
                after = trained(self.net, *left, start)
            moves.append(np.linalg.norm(after - base) / np.linalg.norm(base))
            found.append(self.net.losses(after, *self.test))
        return np.array(found) - self.net.losses(base, *self.test), float(np.median(moves))

    def module(self) -> tuple[nn.Sequential, list[str]]:
        """The same network in torch, and its trained parameters' names."""
        parts: list[nn.Module] = []
        for weight, bias in self.net.layers(self.omega):
            layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
            layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
            parts += [layer, nn.Tanh()]
        module = nn.Sequential(*parts[:-1])
        first = 2 * len(self.net.frozen)
        names = [name for name, _ in module.named_parameters() if int(name.split(".")[0]) >= first]
        return module, names

    def predicted(self, function: str) -> np.ndarray:
        """The package's change (n, t) of each test loss without each training point."""
        module, names = self.module()
        method, response, inverse = FUNCTIONS[function]
        settings = Settings(
            method=method,
            threat=L2Ball(self.net.eps),
            head=names[0].removesuffix(".weight") if len(names) == 2 else None,
            parameters=None if len(names) == 2 else tuple(names),
            loss="logistic",
            response=response,
            inverse=inverse,
            neumann_order=3,
            space="input",
            damping=0.0,
            solver="auto",
            weight_decay=self.net.decay,
        )
        train = (torch.tensor(self.x), torch.tensor(self.y).long())
        test = (torch.tensor(self.test[0]), torch.tensor(self.test[1]).long())
        digests = torch.zeros(len(self.x), 16, dtype=torch.uint8)
        batches = [unweighted(*train)]
        (memory,) = build_memories(module, [settings], batches, digests, b"k" * 16)
        return influence_on_losses(memory, module, train, test).numpy()


def study(
    name: str, seed: int, arrays: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], points: int
) -> Study:
    """The frozen layers are trained on other points of the same two digits."""
    x, y, tx, ty = arrays
    order = np.random.default_rng(seed).permutation(len(x))
    own, other = order[:points], order[points : points + 2 * points]
    hidden, frozen = DEPTHS[name]
    net = Network((49, *hidden, 1), (), EPS, DECAY)
    if frozen:
        whole = Network((49, hidden[0], 1), (), EPS, DECAY)
        weights = trained(whole, x[other], y[other], whole.start(100 + seed), 1e-4)
        net = replace(net, frozen=tuple(whole.layers(weights)[:frozen]))
    start = net.start(seed)
    omega = trained(net, x[own], y[own], start)
    return Study(net, x[own], y[own], (tx[:60], ty[:60]), start, omega)


def rows(name: str, seed: int, one: Study, singles: int, subsets: int) -> None:
    """Print a line a function and yardstick."""
    rng, n = np.random.default_rng(seed), len(one.x)
    removed = [rng.permutation(n)[:1] for _ in range(singles)]
    removed += [rng.permutation(n)[: n // 10] for _ in range(subsets)]
    predictions: dict[str, np.ndarray | str] = {}
    for function in FUNCTIONS:
        try:
            each = one.predicted(function)
            predictions[function] = np.stack([each[gone].sum(axis=0) for gone in removed])
        except SolverError as error:
            predictions[function] = str(error)[:90]
    for yardstick in ("Retrain from ω*", "Retrain from the start", "PBRF"):
        begun = time.perf_counter()
        true, moved = one.changes(yardstick, removed)
        if yardstick == "Retrain from ω*":
            near = true
        agree = float(np.mean(np.abs(true - near).max(axis=1) < 1e-3))
        for function, found in predictions.items():
            line: dict[str, object] = {"depth": name, "seed": seed, "n": n, "p": len(one.omega)}
            line |= {"function": function, "yardstick": yardstick}
            if isinstance(found, str):
                print(json.dumps({**line, "refused": found}, ensure_ascii=False), flush=True)
                continue
            some, truth = found[singles:], true[singles:]
            left_out = correlations(found[:singles], true[:singles], False)
            line |= {
                "leave one out, Pearson": round(float(np.nanmean(left_out)), 4),
                "LDS": round(float(np.nanmean(correlations(some, truth, True))), 4),
                "LDS, 95%": interval(some, truth),
                "true / predicted": round(float((some * truth).sum() / (some**2).sum()), 4),
                "moved": round(moved, 4),
                "ends where Retrain from ω* does": round(agree, 3),
                "subsets": subsets,
                "singles": singles,
                "seconds of the yardstick": round(time.perf_counter() - begun, 1),
            }
            print(json.dumps(line, ensure_ascii=False), flush=True)


def collect(files: list[Path], output: Path) -> None:
    """The JSON lines of runs as a table: leave one out at 1 point, LDS at a tenth of them."""
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    table = Table(output / "influence_depth.csv")
    table.cells = []
    cells = []
    for line in lines:
        metric = f"{SHORT[line['depth']]}_{SHORT[line['yardstick']]}"
        n = line["n"]
        for removed, name in ((1, "leave one out, Pearson"), (n // 10, "LDS")):
            if name in line:
                method, value = line["function"], float(line[name])
                cells.append(Cell(line["seed"], removed, removed / n, method, metric, value))
    table.add(cells)
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (output / "influence_depth.jsonl").write_text(text + "\n")


def main() -> None:
    """Print one JSON line a depth, seed, function and yardstick."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--singles", type=int, default=30)
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--depths", nargs="+", default=list(DEPTHS))
    parser.add_argument("--collect", type=Path, nargs="+", help="runs' output; nothing is run")
    parser.add_argument("--output", type=Path, default=Path("docs/results/audits"))
    given = parser.parse_args()
    if given.collect:
        collect(given.collect, given.output)
        return
    arrays = data(given.data)
    for seed in given.seeds:
        for name in given.depths:
            one = study(name, seed, arrays, given.points)
            rows(name, seed, one, given.singles, given.subsets)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
