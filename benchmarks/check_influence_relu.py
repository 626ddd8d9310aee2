"""The trainings of influence_relu.py, and the package's M, against differences at ω*.

Gradients of descent.py against differences of F in numpy, and M against differences of gradients,
of the points that are on no kink and whose ascents, ours and numpy's, find no other maximiser
within the difference. Then how far L-BFGS comes from ω*. One JSON line a depth.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import single_network
import torch
from activations import ACTIVATIONS
from common import arguments
from descent import gradients, perturbed, received
from influence_depth import AIM, DECAY, data
from influence_relu import CAREFUL, DEPTHS, OURS, Trained, trained
from lbfgs import minimised
from small_networks import Networks, Objective
from torch import Tensor, nn

#: of a difference
H = 1e-5
#: a second difference above it is of another maximiser; a curvature of 100 makes 1e-8
JUMP = 1e-6
#: parameters along which differences are taken
ALONG = 100
#: networks at once
SOME = 32


def single(net: Networks) -> single_network.Network:
    """The same ReLU network in numpy."""
    frozen = tuple((w.numpy(), b.numpy()) for w, b in net.frozen)
    one = single_network.Network(net.sizes, frozen, net.eps, net.decay)
    return replace(one, value=lambda received: np.maximum(received, 0), slope=np.sign)


def losses(one: Trained, omega: Tensor) -> Tensor:
    """Robust losses (k, n) of the training points at parameters (k, p)."""
    parts = [
        perturbed(one.net, one.net.layers(some), one.x, 1 - 2 * one.y, CAREFUL).level
        for some in omega.split(SOME)
    ]
    return nn.functional.softplus(torch.cat(parts))


def slopes(one: Trained, omega: Tensor) -> Tensor:
    """∇F (k, p) at parameters (k, p)."""
    every = torch.ones(SOME, len(one.x), dtype=torch.float64)
    parts = [
        gradients(one.net, some, one.x, one.y, every[: len(some)], CAREFUL)
        for some in omega.split(SOME)
    ]
    return len(one.x) * torch.cat(parts)


def on_no_kink(one: Trained) -> Tensor:
    """Points (n,) whose ascent ends where no unit receives next to 0."""
    layers = one.net.layers(one.omega.unsqueeze(0))
    at = perturbed(one.net, layers, one.x, 1 - 2 * one.y, CAREFUL)
    least = received(one.net, layers, one.x, at.u)
    return ((at.moved <= 1e-9) & (least > 1e-3)).squeeze(0)


def compared(one: Trained) -> dict[str, object]:
    """The largest differences, along some parameters."""
    p = len(one.omega)
    along = torch.randperm(p, generator=torch.Generator().manual_seed(0))[:ALONG]
    sides, network = H * torch.eye(p, dtype=torch.float64)[along], single(one.net)
    around = torch.cat([one.omega.unsqueeze(0), one.omega + sides, one.omega - sides])
    x, y = one.x.numpy(), one.y.numpy()
    theirs = torch.tensor(np.stack([network.losses(o.numpy(), x, y) for o in around]))
    near = on_no_kink(one)
    away = near & ~jumps(theirs) & ~jumps(losses(one, around))
    some = replace(one, x=one.x[away], y=one.y[away])
    middle, *pairs = slopes(some, around).split([1, len(along), len(along)])
    n = len(some.x)
    expected = (theirs[1 : 1 + len(along)] - theirs[1 + len(along) :])[:, away].sum(dim=1)
    expected = expected / (2 * H) + n * DECAY * one.omega[along]
    m = (pairs[0] - pairs[1]) / (2 * H)
    curvature = some.memory(OURS).curvature
    assert curvature is not None
    own = torch.stack([curvature.matvec(side / H) for side in sides])
    apart = middle[0, along] - expected
    return {
        "on no kink": int(near.sum()),
        "compared": n,
        "parameters": len(along),
        "gradient": float(f"{float(expected.abs().max()):.3g}"),
        "gradient, largest difference": float(f"{float(apart.abs().max()):.1e}"),
        "M": float(f"{float(m.abs().max()):.3g}"),
        "M, largest difference": float(f"{float((own - m).abs().max()):.1e}"),
    }


def jumps(values: Tensor) -> Tensor:
    """Points (n,) whose losses at ω and both sides of it (1 + 2a, n) are on no parabola."""
    middle, high, low = values.split([1, len(values) // 2, len(values) // 2])
    return ((high + low - 2 * middle).abs() > JUMP).any(dim=0)


def main() -> None:
    """Print one JSON line a depth and seed."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--depths", nargs="+", default=list(DEPTHS))
    given = parser.parse_args()
    arrays = data(given.data)
    for seed in given.seeds:
        for name in given.depths:
            one = trained(name, ACTIVATIONS["relu"], seed, arrays, given.points, 2)
            line = {"depth": name, "seed": seed} | compared(one)
            every = torch.ones(1, len(one.x), dtype=torch.float64)
            objective = Objective(one.net, one.x, one.y, every)
            end = minimised(objective, one.omega.unsqueeze(0), AIM * len(one.x), steps=60)
            line["L-BFGS ends at gradient / n"] = float(f"{float(end.gradient) / len(one.x):.1e}")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        main()
