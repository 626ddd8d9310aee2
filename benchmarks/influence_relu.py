"""Influence across depth with ReLU: heads of one and two layers, and a network trained whole.

The points, ball, decay and functions of influence_depth.py. A maximiser can sit on a kink of a ReLU
network, and a point can have several: F, found by an ascent, jumps where that finds another.
Trainings are therefore gradient descent of a fixed number of steps with a rate that falls
(descent.py), all leave-outs of a study at once, beside the training that leaves none out: begun at
ω*, and at the initial weights as the model was. What is predicted is how the robust loss of test
points differs between the two. How well a yardstick can be told has a row of its own: the same
leave-outs from ω* at a third of the rate. One JSON line a depth, seed, function and yardstick;
``influence_depth_table.py --record influence_relu`` makes the table and the picture of them.
``--activation tanh`` is the control, and check_influence_relu.py compares with differences.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from activations import ACTIVATIONS, Activation
from common import arguments
from descent import Training, gradients, perturbed, received
from influence_depth import (
    DECAY,
    EPS,
    FUNCTIONS,
    ITSELF,
    REACHED,
    Model,
    data,
    scores,
    weights,
)
from small_networks import Networks
from torch import Tensor, nn

from lightning_muter.unlearning.points import unweighted

DEPTHS = {
    "head of 1 layer": ((16,), 1),
    "head of 2 layers": ((16, 8), 1),
    "network, whole": ((8,), 0),
}
#: the row that says how well a yardstick can be told
AGAIN = "Retrain from ω*, a third of the rate"
YARDSTICKS = ("Retrain from ω*", "Retrain from the start")
#: where training again from the start can end elsewhere
SEVERAL = ("head of 2 layers", "network, whole")
OURS = "ours (constrained response)"
RATE, STEPS, ASCENT = 0.3, 800, 10
#: of the adversary where a training's end is looked at
CAREFUL = 400
#: a level that differs by more is another maximiser's
OTHER = 1e-3


@dataclass(frozen=True)
class Trained(Model):
    """A model where gradient descent ended, and where it ends without some of its points.

    Attributes:
        training: a round of it.
        rounds: that made ω*.
    """

    training: Training
    rounds: int

    def continued(self, weight: Tensor, rate: float) -> Tensor:
        """ω (k, p) after a round more from ω*."""
        begun = self.omega.expand(len(weight), -1)
        training = replace(self.training, rate=rate)
        return training.ended(self.net, begun, self.x, self.y, weight)

    def again(self, weight: Tensor) -> Tensor:
        """ω (k, p) after a training as the model's own."""
        omega = self.start.expand(len(weight), -1)
        for _ in range(self.rounds):
            omega = self.training.ended(self.net, omega, self.x, self.y, weight)
        return omega

    def losses(self, omega: Tensor) -> Tensor:
        """Robust losses (k, t) of the test points at parameters (k, p)."""
        x, y = self.test
        parts = [
            perturbed(self.net, self.net.layers(some), x, 1 - 2 * y, CAREFUL).level
            for some in omega.split(16)
        ]
        return nn.functional.softplus(torch.cat(parts))

    def gradient(self, omega: Tensor, weight: Tensor) -> Tensor:
        """The largest entry of ∇F / Σ w (k,), the adversary as in training."""
        ascent = self.training.ascent
        return gradients(self.net, omega, self.x, self.y, weight, ascent).abs().amax(dim=1)

    def maximisers(self) -> dict[str, object]:
        """What the package and an ascent of our own find of the points' perturbations at ω*."""
        memory, module = self.memory(OURS), self.module()[0]
        view, problem = memory.settings.view(module), memory.settings.problem()
        shares: dict[str, object] = {}
        for name, (x, y) in (("", (self.x, self.y)), ("test ", self.test)):
            with torch.enable_grad():
                theirs = problem.perturb(view, unweighted(x, y.long()))
            own = perturbed(self.net, self.net.layers(self.omega[None]), x, 1 - 2 * y, CAREFUL)
            still = own.moved[0] <= 1e-3
            least = received(self.net, self.net.layers(self.omega[None]), x, own.u)[0]
            apart = theirs.losses - nn.functional.softplus(own.level[0])
            shares[f"{name}stationary"] = _share(theirs.stationary)
            shares[f"{name}stationary, own ascent"] = _share(still)
            shares[f"{name}on a kink, own ascent"] = _share(~still & (least < 1e-2))
            shares[f"{name}other maximiser"] = _share(
                (apart.abs() > OTHER) & theirs.stationary & still
            )
        distance = memory.summary.get("distance_to_optimum")
        return shares | {
            "usable": round(memory.summary["usable_response"], 4),
            "distance to optimum": None if distance is None else float(f"{distance:.3g}"),
            "size": round(float(self.omega.norm()), 3),
            "warnings": [sentence.split(":")[0] for sentence in memory.warnings],
        }


def _share(flags: Tensor) -> float:
    return round(float(flags.double().mean()), 4)


def trained(
    name: str,
    activation: Activation,
    seed: int,
    arrays: Sequence[Tensor],
    points: int,
    rounds: int,
) -> Trained:
    """The frozen layers are trained on other points of the same two digits."""
    x, y, tx, ty = arrays
    order = torch.tensor(np.random.default_rng(seed).permutation(len(x)))
    own, other = order[:points], order[points : 3 * points]
    hidden, frozen = DEPTHS[name]
    training = Training(RATE, STEPS, ASCENT)
    net = Networks((49, *hidden, 1), (), EPS, DECAY, activation)
    if frozen:
        whole = replace(net, sizes=(49, hidden[0], 1))
        every = torch.ones(1, len(other), dtype=torch.float64)
        begun = whole.start(100 + seed).unsqueeze(0)
        found = training.ended(whole, begun, x[other], y[other], every)
        layers = tuple((w[0], b[0, 0]) for w, b in whole.layers(found)[:frozen])
        net = replace(net, frozen=layers)
    start = net.start(seed)
    one = Trained(net, x[own], y[own], (tx[:60], ty[:60]), start, start, 0.0, training, rounds)
    every = torch.ones(1, points, dtype=torch.float64)
    omega = one.again(every)
    return replace(one, omega=omega[0], residual=float(one.gradient(omega, every)))


def rows(
    name: str,
    activation: str,
    seed: int,
    one: Trained,
    removals: tuple[int, int],
    yardsticks: Sequence[str],
) -> None:
    """Print a line a function and yardstick."""
    singles, subsets = removals
    part = weights(len(one.x), singles, subsets, seed)
    weight = torch.cat([torch.ones_like(part[:1]), part])
    predictions = {function: one.predicted(function) for function in FUNCTIONS}
    base = one.losses(one.omega.unsqueeze(0))
    shared: dict[str, object] = {"depth": name, "activation": activation, "rounds": one.rounds}
    shared |= {"seed": seed}
    shared |= {"n": len(one.x), "p": len(one.omega), "singles": singles, "subsets": subsets}
    shared |= {"gradient at ω*": float(f"{one.residual:.1e}")} | one.maximisers()
    begun = time.process_time()
    again = _changes(one.losses(one.continued(weight, RATE / 3)))
    seconds = time.process_time() - begun
    near = np.zeros(0)
    for yardstick in yardsticks if name in SEVERAL else yardsticks[:1]:
        begun = time.process_time()
        first = yardstick == YARDSTICKS[0]
        ends = one.continued(weight, RATE) if first else one.again(weight)
        losses = one.losses(ends)
        true = _changes(losses)
        near = true if first else near
        last = one.gradient(ends, weight)[1:]
        elsewhere = np.abs(true - near).max(axis=1) >= 1e-3
        line = shared | {
            "yardstick": yardstick,
            "gradient, median": float(f"{float(last.median()):.1e}"),
            "gradient, largest": float(f"{float(last.max()):.1e}"),
            "optimum reached": [int((a <= REACHED).sum()) for a in last.split([singles, subsets])],
            "change": [float(f"{np.abs(a).mean():.2e}") for a in (true[:singles], true[singles:])],
            "change with none left out": float(f"{float((losses[:1] - base).abs().mean()):.2e}"),
            "elsewhere": [int(elsewhere[:singles].sum()), int(elsewhere[singles:].sum())],
            "processor seconds": round(time.process_time() - begun, 1),
        }
        all_of_them = np.ones(len(part), dtype=bool)
        for function, (each, damping) in predictions.items():
            own = {"function": function, "damping / nλ": float(f"{damping:.3g}")}
            own |= scores(((1 - part) @ each).numpy(), true, all_of_them, singles)
            print(json.dumps(line | own, ensure_ascii=False), flush=True)
        row, found = (AGAIN, again) if first else (ITSELF, near)
        own = {"function": row} | ({"processor seconds": round(seconds, 1)} if first else {})
        own |= scores(found, true, all_of_them, singles)
        print(json.dumps(line | own, ensure_ascii=False), flush=True)


def _changes(losses: Tensor) -> np.ndarray:
    """Of the trainings without some points, beside the first, which is without none."""
    found: np.ndarray = (losses[1:] - losses[:1]).numpy()
    return found


def main() -> None:
    """Print one JSON line a depth, seed, function and yardstick."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--singles", type=int, default=24)
    parser.add_argument("--subsets", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depths", nargs="+", default=list(DEPTHS))
    parser.add_argument("--activation", choices=list(ACTIVATIONS), default="relu")
    parser.add_argument("--rounds", type=int, default=2, help="of the model's own training")
    parser.add_argument("--near", action="store_true", help="from ω* alone")
    given = parser.parse_args()
    arrays, asked = data(given.data), YARDSTICKS[:1] if given.near else YARDSTICKS
    for seed in given.seeds:
        for name in given.depths:
            activation = ACTIVATIONS[given.activation]
            one = trained(name, activation, seed, arrays, given.points, given.rounds)
            rows(name, given.activation, seed, one, (given.singles, given.subsets), asked)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        main()
