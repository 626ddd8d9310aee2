"""Projected gradient ascent: the training attack, and a second look where a gradient vanished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_muter.linalg.rows import own_scale
from lightning_muter.objectives.losses import LOG_ODDS, PointLoss
from lightning_muter.threats import Threat
from lightning_muter.threats.pixels import Values

__all__ = ["own_random_numbers", "projected_gradient_ascent", "without_blind_spots"]

_STARTS = 5  # random starts where a gradient is exactly zero


def projected_gradient_ascent(
    module: nn.Module,
    loss: PointLoss,
    threat: Threat,
    x: Tensor,
    targets: Tensor,
    steps: int,
    step_size: Values,
    start: Tensor | None = None,
) -> Tensor:
    """x + δ (n, ...) after ``steps`` ascent steps in the threat's geometry, any loss and shape.

    The direction alone of a gradient counts: a loss that is all but zero is ascended like any
    other. A point whose gradient is exactly zero stays where it is.

    Args:
        module: maps inputs to outputs.
        loss: what is ascended, a loss of the outputs and ``targets``.
        threat: the constraint set.
        x: inputs (n, ...).
        targets: what the loss compares the outputs with.
        steps: ascent steps.
        step_size: their length, in the units of ``eps``.
        start: perturbations (n, d) to start from; zero by default.
    """
    flat, inside = threat.flat_pixels(x), threat.scaling.slope(x).to(x)
    delta = torch.zeros_like(flat) if start is None else start
    for _ in range(steps):
        slope = loss.slope(module, threat.moved(x, delta), targets)
        unit, _ = own_scale(slope.scaled * inside)  # in pixels: ∂l/∂x' / std
        delta = threat.step(flat, delta, unit.to(flat) * (slope.scale > 0), step_size).detach()
    return threat.moved(x.detach(), delta)


def without_blind_spots(
    module: nn.Module,
    loss: PointLoss,
    threat: Threat,
    x: Tensor,
    targets: Tensor,
    adversarial: Tensor,
    steps: int,
    step_size: Values,
) -> tuple[Tensor, Tensor]:
    """An attack's result, tried again where it may have failed for want of a gradient.

    A point that is classified right because the attack had nowhere to go is not robust. Points
    still right are attacked again by their log-odds where the loss is not known to keep its
    gradient, and from random starts where the gradient is exactly zero. A regression's points
    are tried again from random starts.

    Args:
        module: maps inputs to outputs.
        loss: what the attack ascended.
        threat: the constraint set.
        x: inputs (n, ...).
        targets: their targets.
        adversarial: what the attack made of them (n, ...).
        steps: ascent steps of each further try.
        step_size: their length.

    Returns:
        Adversarial inputs (n, ...), no worse than the given ones, and which points (n,) are left
        without a gradient in spite of all.
    """
    judge = LOG_ODDS if loss.classifies else loss
    best, best_slope = adversarial.clone(), judge.slope(module, adversarial, targets)
    level, blind = best_slope.level.clone(), best_slope.missing.clone()
    right = _right(module, loss, best, targets)
    doubtful = right & (blind if loss.level is not None or not loss.classifies else True)
    for start in range(_STARTS + 1):
        some = torch.nonzero(doubtful).flatten()
        if len(some) == 0:
            break
        points, labels = x[some], targets[some]
        begin = threat.random_start(threat.flat_pixels(points)) if start > 0 else None
        moved = projected_gradient_ascent(
            module, judge, threat, points, labels, steps, step_size, begin
        )
        slope = judge.slope(module, moved, labels)
        higher = slope.level > level[some]
        best[some[higher]], level[some[higher]] = moved[higher], slope.level[higher]
        blind[some] &= slope.missing
        doubtful = blind & _right(module, loss, best, targets)
    return best, doubtful


@torch.no_grad()
def _right(module: nn.Module, loss: PointLoss, x: Tensor, targets: Tensor) -> Tensor:
    """Points (n,) that an attack has not broken: of a regression all."""
    right = loss.is_correct(module(x), targets)
    return torch.ones(len(x), dtype=torch.bool, device=x.device) if right is None else right


@contextmanager
def own_random_numbers(x: Tensor) -> Iterator[None]:
    """An attack's random start is its own: the training's random numbers go on as without it."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
