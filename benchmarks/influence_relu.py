"""Influence across depth with ReLU: heads of one and two layers, and a network trained whole.

The points, ball, decay and functions of influence_depth.py. A maximiser can sit on a kink of a ReLU
network, and a point can have several: F, found by an ascent, jumps where that finds another, and
L-BFGS does not come to a gradient of zero. Trainings are therefore gradient descent of a fixed
number of steps with a rate that falls (descent.py), all leave-outs of a study at once, beside the
training that leaves none out: begun at ω*, and at the initial weights as the model was. What is
predicted is how the robust loss of test points differs between the two. How well a yardstick can be
told has a row of its own: the same leave-outs from ω* at a third of the rate. One JSON line a
depth, seed, function and yardstick; ``influence_depth_table.py --record influence_relu`` makes the
table and the picture of them. ``--activation tanh`` is the control.

``--check`` compares gradients of descent.py with differences of F in numpy, and the package's M
with differences of gradients, on points that are on no kink.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import single_network
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
#: how often a training from the start goes from the first rate to the last
ROUNDS = 2
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
    """

    training: Training

    def continued(self, weight: Tensor, rate: float) -> Tensor:
        """ω (k, p) after a round more from ω*."""
        begun = self.omega.expand(len(weight), -1)
        training = replace(self.training, rate=rate)
        return training.ended(self.net, begun, self.x, self.y, weight)

    def again(self, weight: Tensor) -> Tensor:
        """ω (k, p) after a training as the model's own."""
        omega = self.start.expand(len(weight), -1)
        for _ in range(ROUNDS):
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
    one = Trained(net, x[own], y[own], (tx[:60], ty[:60]), start, start, 0.0, training)
    every = torch.ones(1, points, dtype=torch.float64)
    omega = one.again(every)
    return replace(one, omega=omega[0], residual=float(one.gradient(omega, every)))


def rows(name: str, activation: str, seed: int, one: Trained, singles: int, subsets: int) -> None:
    """Print a line a function and yardstick."""
    part = weights(len(one.x), singles, subsets, seed)
    weight = torch.cat([torch.ones_like(part[:1]), part])
    predictions = {function: one.predicted(function) for function in FUNCTIONS}
    base = one.losses(one.omega.unsqueeze(0))
    shared: dict[str, object] = {"depth": name, "activation": activation, "seed": seed}
    shared |= {"n": len(one.x), "p": len(one.omega), "singles": singles, "subsets": subsets}
    shared |= {"gradient at ω*": float(f"{one.residual:.1e}")} | one.maximisers()
    begun = time.process_time()
    again = _changes(one.losses(one.continued(weight, RATE / 3)))
    seconds = time.process_time() - begun
    near = np.zeros(0)
    for yardstick in YARDSTICKS if name in SEVERAL else YARDSTICKS[:1]:
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


def check(name: str, activation: str, seed: int, one: Trained) -> None:
    """Print how far gradients, and the package's M, are from differences.

    Of points that are on no kink, and whose ascents, ours and numpy's, find no other maximiser
    within the difference.
    """
    h, p, omega = 1e-5, len(one.omega), one.omega
    sides = h * torch.eye(p, dtype=torch.float64)
    around = torch.cat([omega + sides, omega - sides])
    single = _single(one.net, activation)
    theirs = np.stack([single.losses(o.numpy(), one.x.numpy(), one.y.numpy()) for o in around])
    at = perturbed(one.net, one.net.layers(omega[None]), one.x, 1 - 2 * one.y, CAREFUL)
    own = torch.cat(
        [
            perturbed(one.net, one.net.layers(some), one.x, 1 - 2 * one.y, CAREFUL).level
            for some in around.split(32)
        ]
    )
    least = received(one.net, one.net.layers(omega[None]), one.x, at.u)[0]
    near = (at.moved[0] <= 1e-9) & (least > 1e-3)
    losses = torch.cat([nn.functional.softplus(own), torch.tensor(theirs)])
    still = losses.amax(dim=0) - losses.amin(dim=0) < 100 * h
    away = near & still
    some = replace(one, x=one.x[away], y=one.y[away])
    n, every = len(some.x), torch.ones(1, len(some.x), dtype=torch.float64)
    slopes = torch.cat(
        [
            gradients(some.net, o, some.x, some.y, every.expand(len(o), -1), CAREFUL)
            for o in torch.cat([omega[None], around]).split(32)
        ]
    )
    expected = (theirs[:p] - theirs[p:])[:, away.numpy()].sum(axis=1) / (2 * h)
    expected += n * DECAY * omega.numpy()
    m = n * (slopes[1 : 1 + p] - slopes[1 + p :]) / (2 * h)
    curvature = some.memory(OURS).curvature
    assert curvature is not None
    found = torch.stack([curvature.matvec(e) for e in torch.eye(p).double()])
    line = {
        "depth": name,
        "activation": activation,
        "seed": seed,
        "on no kink": int(near.sum()),
        "compared": n,
        "gradient": float(f"{np.abs(expected).max():.2e}"),
        "gradient, largest difference": float(
            f"{np.abs(n * slopes[0].numpy() - expected).max():.1e}"
        ),
        "M": float(f"{float(m.abs().max()):.3g}"),
        "M, largest difference": float(f"{float((found - m).abs().max()):.1e}"),
    }
    print(json.dumps(line), flush=True)


def _single(net: Networks, activation: str) -> single_network.Network:
    frozen = tuple((w.numpy(), b.numpy()) for w, b in net.frozen)
    single = single_network.Network(net.sizes, frozen, net.eps, net.decay)
    return replace(single, value=_positive_part, slope=np.sign) if activation == "relu" else single


def _positive_part(received: np.ndarray) -> np.ndarray:
    return np.maximum(received, 0)


def main() -> None:
    """Print one JSON line a depth, seed, function and yardstick."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--singles", type=int, default=24)
    parser.add_argument("--subsets", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depths", nargs="+", default=list(DEPTHS))
    parser.add_argument("--activation", choices=list(ACTIVATIONS), default="relu")
    parser.add_argument("--check", action="store_true", help="against differences")
    given = parser.parse_args()
    arrays = data(given.data)
    for seed in given.seeds:
        for name in given.depths:
            one = trained(name, ACTIVATIONS[given.activation], seed, arrays, given.points)
            if given.check:
                check(name, given.activation, seed, one)
            else:
                rows(name, given.activation, seed, one, given.singles, given.subsets)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        main()
