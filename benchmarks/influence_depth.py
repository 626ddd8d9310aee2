"""Influence across depth: heads of one, two and three layers, and a network trained whole.

MNIST 1 vs 7 at 7 × 7 pixels, tanh, L2 ball. All trainings are really run, to an optimum, by code
that shares nothing with the package (small_networks.py, lbfgs.py; all leave-outs of a study at
once): without single points, and without random tenths; begun at ω* (the basin of the model that is
asked about) and at the initial weights (what training again does). What is predicted is the change
of the robust loss of test points. The proximal Bregman response function (PBRF) is the third
yardstick: it asks the kept points for the outputs that they had, and of single points alone, since
that of a tenth goes far and ends at kinks. A leave-out whose gradient stays
large is counted and left out of its line. The last row of a yardstick is Retrain from ω* in the
place of a prediction. One JSON line a depth, seed, function and yardstick;
influence_depth_table.py makes the table and the picture of them.

``--check`` takes the gradient of single_network.py, in numpy, where the trainings ended, and
compares the package's M with differences of gradients.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace

import numpy as np
import single_network
import torch
from common import arguments, mnist
from influence import correlations, interval
from lbfgs import Found, minimised
from small_networks import Bregman, Networks, Objective
from torch import Tensor, nn

from lightning_muter import L2Ball, SolverError, UnlearningMemory, influence_on_losses
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
#: the row that says how well anything that stays in ω*'s basin can do
ITSELF = "Retrain from ω* itself"
YARDSTICKS = ("Retrain from ω*", "Retrain from the start", "PBRF")
#: the largest entry of ∇F / n at which an optimum counts as reached, and what trainings aim at
REACHED, AIM = 1e-6, 1e-8
#: of L-BFGS, at the most; the PBRF's where it does not end at kinks are few
STEPS, FEW_STEPS = 300, 40
#: leave-outs below which a correlation over them says nothing
FEWEST = 12
FUNCTIONS = {
    "ours (constrained response)": ("muter", "constrained", "neumann"),
    "the paper's (unconstrained)": ("muter", "unconstrained", "exact"),
    "the paper's, its series clipped": ("muter", "unconstrained", "neumann"),
    "clean (Koh and Liang)": ("newton", "constrained", "neumann"),
    "adversarial points, no response": ("newton_delta", "constrained", "neumann"),
}


def data(folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, tx, ty = mnist(folder)
    keep, test = (y == 1) | (y == 7), (ty == 1) | (ty == 7)

    def pooled(images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.unsqueeze(1), 4).reshape(len(images), -1)

    return pooled(x[keep]), (y[keep] == 7).double(), pooled(tx[test]), (ty[test] == 7).double()


@dataclass(frozen=True)
class Model:
    """One depth and seed: the points, the network, its ω*, and what the package says of it.

    Attributes:
        net: the network.
        x: points (n, 49).
        y: labels 0 and 1 (n,).
        test: test points and their labels.
        start: the initial parameters (p,).
        omega: ω* (p,).
        residual: the largest entry of ∇F(ω*) / n.
    """

    net: Networks
    x: Tensor
    y: Tensor
    test: tuple[Tensor, Tensor]
    start: Tensor
    omega: Tensor
    residual: float

    def module(self) -> tuple[nn.Sequential, list[str]]:
        """The same network in torch, and its trained parameters' names."""
        parts: list[nn.Module] = []
        for weight, bias in self.net.layers(self.omega.unsqueeze(0)):
            layer = nn.Linear(weight.shape[2], weight.shape[1]).double()
            layer.weight.data, layer.bias.data = weight[0].clone(), bias[0, 0].clone()
            parts += [layer, self.net.activation.module()]
        module = nn.Sequential(*parts[:-1])
        first = 2 * len(self.net.frozen)
        names = [name for name, _ in module.named_parameters() if int(name.split(".")[0]) >= first]
        return module, names

    def memory(self, function: str) -> UnlearningMemory:
        """The package's memory at ω*, of a function's kind."""
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
            weight_decay=self.net.decay,
        )
        digests = torch.zeros(len(self.x), 16, dtype=torch.uint8)
        batches = [unweighted(self.x, self.y.long())]
        with torch.enable_grad():
            return build_memories(module, [settings], batches, digests, b"k" * 16)[0]

    def predicted(self, function: str) -> tuple[Tensor, float]:
        """The change (n, t) of each test loss without each point, and M's damping over nλ.

        An indefinite M, which the package refuses, is damped until its smallest eigenvalue is nλ.
        """
        memory, module = self.memory(function), self.module()[0]
        train, test = (self.x, self.y.long()), (self.test[0], self.test[1].long())
        floor = self.net.decay * len(self.x)
        with torch.enable_grad():
            try:
                return influence_on_losses(memory, module, train, test), 0.0
            except SolverError:
                assert memory.curvature is not None
                damping = floor - memory.curvature.extremes()[0]
                memory = replace(memory, settings=replace(memory.settings, damping=damping))
                return influence_on_losses(memory, module, train, test), damping / floor


class Study(Model):
    """A model at its optimum, and where trainings to an optimum end without some of its points."""

    def curvature(self, objective: type[Objective] | type[Bregman]) -> Tensor:
        """A Hessian (p, p) at ω* by central differences of gradients, δ* found again at each."""
        p, h = len(self.omega), 1e-4
        sides = h * torch.eye(p, dtype=torch.float64)
        weight = torch.ones(2 * p, len(self.x), dtype=torch.float64)
        asked = self.objective(objective, weight)
        around = torch.cat([self.omega + sides, self.omega - sides])
        slopes = asked(around, torch.arange(2 * p), torch.zeros(2 * p, dtype=torch.float64))[1]
        return (slopes[:p] - slopes[p:]) / (2 * h)

    def objective(self, kind: type[Objective] | type[Bregman], weight: Tensor) -> Objective:
        if issubclass(kind, Bregman):
            return kind(self.net, self.x, self.y, weight, self.omega)
        return kind(self.net, self.x, self.y, weight)

    def yardstick(self, kind: str, weight: Tensor) -> Found:
        """Where each leave-out ends (weight 0 of its points) by a yardstick."""
        tol = AIM * len(self.x)
        if kind == "Retrain from the start":
            objective = self.objective(Objective, weight)
            return settled(objective, self.start.expand(len(weight), -1), tol, None, STEPS)
        which = Bregman if kind == "PBRF" else Objective
        values, vectors = torch.linalg.eigh(_symmetric(self.curvature(which)))
        floor = self.net.decay * len(self.x)
        metric = (vectors / values.abs().clamp(min=0.5 * floor)) @ vectors.T
        begun = self.omega.expand(len(weight), -1)
        steps = FEW_STEPS if kind == "PBRF" else STEPS
        return settled(self.objective(which, weight), begun, tol, metric, steps)

    def losses(self, omega: Tensor) -> Tensor:
        """Robust losses (k, t) of the test points at parameters (k, p)."""
        x, y = self.test
        none = x.new_zeros(len(omega), len(x), self.net.sizes[1])
        u, _ = self.net.worst(omega, x, 1 - 2 * y, none)
        return nn.functional.softplus((1 - 2 * y) * self.net.outputs(omega, x, u))


def settled(
    objective: Objective, start: Tensor, tol: float, metric: Tensor | None, steps: int
) -> Found:
    """Minima whose perturbations are no lower than those found from δ = 0."""
    found = minimised(objective, start, tol, metric, steps)
    for _ in range(2):
        if not objective.lifted(found.omega):
            break
        asked = found.evaluations
        found = minimised(objective, found.omega, tol, metric, steps)
        found.evaluations += asked
    return found


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.T)


def study(
    name: str, seed: int, arrays: tuple[Tensor, Tensor, Tensor, Tensor], points: int
) -> Study:
    """The frozen layers are trained on other points of the same two digits."""
    x, y, tx, ty = arrays
    order = torch.tensor(np.random.default_rng(seed).permutation(len(x)))
    own, other = order[:points], order[points : 3 * points]
    hidden, frozen = DEPTHS[name]
    net = Networks((49, *hidden, 1), (), EPS, DECAY)
    if frozen:
        whole = Networks((49, hidden[0], 1), (), EPS, DECAY)
        every = torch.ones(1, len(other), dtype=torch.float64)
        objective = Objective(whole, x[other], y[other], every)
        begun = whole.start(100 + seed).unsqueeze(0)
        found = minimised(objective, begun, 1e-4 * len(other)).omega
        layers = tuple((w[0], b[0, 0]) for w, b in whole.layers(found)[:frozen])
        net = replace(net, frozen=layers)
    start = net.start(seed)
    every = torch.ones(1, points, dtype=torch.float64)
    objective = Objective(net, x[own], y[own], every)
    best = settled(objective, start.unsqueeze(0), AIM * points, None, 10 * STEPS)
    residual = float(best.gradient) / points
    return Study(net, x[own], y[own], (tx[:60], ty[:60]), start, best.omega[0], residual)


def weights(n: int, singles: int, subsets: int, seed: int) -> Tensor:
    """Points' weights (k, n): without each of some single points, and without random tenths."""
    rng = np.random.default_rng(seed)
    removed = [np.array([i]) for i in rng.permutation(n)[:singles]]
    removed += [rng.permutation(n)[: n // 10] for _ in range(subsets)]
    weight = torch.ones(len(removed), n, dtype=torch.float64)
    for row, gone in zip(weight, removed, strict=True):
        row[torch.tensor(gone)] = 0
    return weight


def scores(
    found: np.ndarray, true: np.ndarray, reached: np.ndarray, singles: int
) -> dict[str, object]:
    """What a line says of predictions (k, t), over the leave-outs that reached an optimum."""
    alone, some = np.flatnonzero(reached[:singles]), singles + np.flatnonzero(reached[singles:])
    line: dict[str, object] = {"reached": [len(alone), len(some)]}
    if len(alone) >= FEWEST:
        left_out = correlations(found[alone], true[alone], False)
        line["leave one out, Pearson"] = round(float(np.nanmean(left_out)), 4)
        ranks = correlations(found[alone], true[alone], True)
        line["leave one out, Spearman"] = round(float(np.nanmean(ranks)), 4)
    if len(some) >= FEWEST:
        a, b = found[some], true[some]
        line["LDS"] = round(float(np.nanmean(correlations(a, b, True))), 4)
        line["LDS, 95%"] = interval(a, b)
        line["true / predicted"] = round(float((a * b).sum() / (a**2).sum()), 4)
    return line


def rows(name: str, seed: int, one: Study, singles: int, subsets: int) -> None:
    """Print a line a function and yardstick; the PBRF is asked of single points alone."""
    weight = weights(len(one.x), singles, subsets, seed)
    predictions = {function: one.predicted(function) for function in FUNCTIONS}
    base = one.losses(one.omega.unsqueeze(0))
    near, near_reached = np.zeros(0), np.zeros(0, dtype=bool)
    for yardstick in YARDSTICKS:
        begun = time.process_time()
        part = weight[:singles] if yardstick == "PBRF" else weight
        found = one.yardstick(yardstick, part)
        true = (one.losses(found.omega) - base).numpy()
        reached = (found.gradient <= REACHED * len(one.x)).numpy()
        if yardstick == "Retrain from ω*":
            near, near_reached = true, reached
        there = near[: len(part)]
        elsewhere = np.abs(true - there).max(axis=1) >= 1e-3
        moved = (found.omega - one.omega).norm(dim=1) / one.omega.norm()
        shared: dict[str, object] = {
            "depth": name,
            "seed": seed,
            "n": len(one.x),
            "p": len(one.omega),
            "yardstick": yardstick,
            "singles": singles,
            "subsets": len(part) - singles,
            "gradient at ω*": float(f"{one.residual:.1e}"),
            "largest gradient": float(f"{float(found.gradient.max()) / len(one.x):.1e}"),
            "elsewhere": [int(elsewhere[:singles].sum()), int(elsewhere[singles:].sum())],
            "moved": [
                round(float(a.median()), 4) for a in (moved[:singles], moved[singles:]) if len(a)
            ],
            "evaluations": found.evaluations,
            "processor seconds": round(time.process_time() - begun, 1),
        }
        for function, (each, damping) in predictions.items():
            line = {**shared, "function": function, "damping / nλ": float(f"{damping:.3g}")}
            line |= scores(((1 - part) @ each).numpy(), true, reached, singles)
            print(json.dumps(line, ensure_ascii=False), flush=True)
        if true is not near:
            line = {**shared, "function": ITSELF}
            line |= scores(there, true, reached & near_reached[: len(part)], singles)
            print(json.dumps(line, ensure_ascii=False), flush=True)


def check(name: str, seed: int, one: Study, count: int = 3) -> None:
    """Print how far the trainings, and the package's M, are from independent ones."""
    memory, expected = one.memory("ours (constrained response)"), one.curvature(Objective)
    assert memory.curvature is not None
    found = torch.stack([memory.curvature.matvec(e) for e in torch.eye(len(expected)).double()])
    line: dict[str, object] = {"depth": name, "seed": seed, "M": float(expected.abs().max())}
    line |= {"largest difference": float(f"{(found - expected).abs().max():.1e}")}
    print(json.dumps(line, ensure_ascii=False), flush=True)
    weight = weights(len(one.x), count, count, seed)
    frozen = tuple((w.numpy(), b.numpy()) for w, b in one.net.frozen)
    single = single_network.Network(one.net.sizes, frozen, one.net.eps, one.net.decay)
    ends = one.yardstick("Retrain from ω*", weight)
    x, y, turned = one.x.numpy(), one.y.numpy(), torch.linalg.inv(_symmetric(expected))
    for row, omega in zip(weight.numpy() > 0, ends.omega, strict=True):
        gradient = torch.tensor(single.gradient(omega.numpy(), x[row], y[row]))
        line = {"depth": name, "seed": seed, "left out": int((~row).sum())}
        line["gradient / n"] = float(f"{float(gradient.abs().max()) / len(x):.1e}")
        line["Newton step"] = float(f"{float((turned @ gradient).abs().max()):.1e}")
        print(json.dumps(line, ensure_ascii=False), flush=True)


def main() -> None:
    """Print one JSON line a depth, seed, function and yardstick."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--singles", type=int, default=30)
    parser.add_argument("--subsets", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depths", nargs="+", default=list(DEPTHS))
    parser.add_argument("--check", action="store_true", help="against numpy's gradients")
    given = parser.parse_args()
    arrays = data(given.data)
    for seed in given.seeds:
        for name in given.depths:
            one = study(name, seed, arrays, given.points)
            if given.check:
                check(name, seed, one)
            else:
                rows(name, seed, one, given.singles, given.subsets)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        main()
