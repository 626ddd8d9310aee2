"""Influence on a training that stopped early: exponentials of matrices, and trainings that ran."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import memory_of
from early import ROWS, data, fit
from torch import Tensor

from lightning_muter import (
    ConfigurationError,
    MUterCallback,
    Trainer,
    adversarial_influence,
    influence_on_losses,
    top_influences,
)
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.linalg.lanczos import TimeAverage
from lightning_muter.memory.start import Start, TrainingFlow
from lightning_muter.unlearning.early_influence import Way

P, POINTS = 6, 50.0
END, AVERAGE = TimeAverage.end(0.7), TimeAverage((0.1, 0.4, 0.7), (0.2, 0.3, 0.5))
OMEGA = torch.linspace(-1, 2, P, dtype=torch.float64)
GRADIENT = torch.linspace(0.5, -0.3, P, dtype=torch.float64)
INITIAL = torch.linspace(2, -2, P, dtype=torch.float64)
PULL = torch.linspace(-1, 1, P, dtype=torch.float64)


def symmetric(low: float, high: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64))
    return (q * torch.logspace(low, high, P, dtype=torch.float64)) @ q.T


M, D = symmetric(-1, 2.5, 0), symmetric(-3, -0.5, 1)


def ends(curvature: Tensor, gradient: Tensor, average: TimeAverage) -> Tensor:
    """Σ_j a_j ω(s_j) of ω' = -(gradient + curvature (ω - ω*)), by exponentials of matrices."""
    augmented = torch.zeros(P + 1, P + 1, dtype=torch.float64)
    augmented[:P, :P] = -curvature
    augmented[:P, P] = curvature @ OMEGA - gradient
    state = torch.cat([INITIAL, torch.ones(1, dtype=torch.float64)])
    each = [torch.linalg.matrix_exp(s * augmented) @ state for s in average.times]
    return sum(a * w[:P] for a, w in zip(average.shares, each, strict=True))  # type: ignore[return-value]


def way(average: TimeAverage, pace: Literal["epochs", "steps"] = "epochs") -> Way:
    start = Start(INITIAL, torch.zeros(P), TrainingFlow(average, pace))
    return Way(start, DenseCurvature(M), GRADIENT, OMEGA, average, POINTS)


@pytest.mark.parametrize("average", [END, AVERAGE], ids=["end", "average"])
@pytest.mark.parametrize("pace", ["epochs", "steps"])
def test_the_end_moves_as_that_of_a_flow_with_a_little_less_of_a_point(
    average: TimeAverage, pace: Literal["epochs", "steps"]
) -> None:
    """The point is 0.5 (ω - ω*)ᵀD(ω - ω*) + PULLᵀω, of weight 1 out of POINTS."""
    some = 1e-6
    longer = average if pace == "epochs" else average.scaled(1 / (1 - some / POINTS))
    without = ends(M - some * D, GRADIENT - some * PULL, longer)
    expected = (without - ends(M, GRADIENT, average)) / some
    found = way(average, pace)
    pulls = [PULL, *(D @ b for b in found.directions)]
    moved = found.ended([f.unsqueeze(0) for f in pulls]).squeeze(0) + found.lengthening
    assert float((moved - expected).norm()) < 3e-3 * float(expected.norm())
    for u in torch.eye(P, dtype=torch.float64):
        seen = found.seen_from_the_end(u)
        change = sum(float(a @ b) for a, b in zip(seen, pulls, strict=True))
        change += float(u @ found.lengthening)
        assert change == pytest.approx(float(u @ moved), rel=1e-6, abs=1e-9)


def test_the_way_is_that_of_the_flow() -> None:
    found = way(END)
    assert float(found.nodes[0]) == 0.0 and float(found.nodes[-1]) == pytest.approx(0.7)
    for s, e in zip(found.nodes.tolist(), found.offsets, strict=True):
        torch.testing.assert_close(OMEGA + e, ends(M, GRADIENT, TimeAverage.end(s)))


def test_a_long_training_is_one_to_its_optimum() -> None:
    """Without a gradient at ω*: the implicit function theorem, M⁻¹ f(∞)."""
    found = replace(way(TimeAverage.end(1e4)), gradient=torch.zeros(P, dtype=torch.float64))
    pulls = [PULL.unsqueeze(0), *(torch.zeros(1, P).double() for _ in found.directions)]
    torch.testing.assert_close(found.ended(pulls).squeeze(0), torch.linalg.solve(M, PULL))


def robust(trainer: Trainer) -> Tensor:
    """The robust logistic losses (40) of a training's points at its end, in closed form."""
    weight = trainer.lightning_module.head.weight.detach().squeeze(0)
    x, y = data().tensors
    return F.softplus(-(2 * y - 1) * (x @ weight) + 0.1 * weight.norm())


@pytest.mark.slow
def test_losses_change_as_in_trainings_without_two_points_that_really_ran() -> None:
    trainer, model = fit(horizon="training")
    (callback,) = (c for c in trainer.callbacks if isinstance(c, MUterCallback))
    memory, batch = memory_of(callback), data().tensors
    each = influence_on_losses(memory, model, batch, batch)
    of_an_optimum = influence_on_losses(replace(memory, start=None), model, batch, batch)
    before, first = robust(trainer), list(range(0, ROWS, 8))  # of whole batches of two
    rest = [[i for i in range(ROWS) if i not in (k, k + 1)] for k in first]
    true = torch.stack([robust(fit(keep)[0]) - before for keep in rest]).flatten()
    found = []
    for one in (each, of_an_optimum):
        predicted = torch.stack([one[k] + one[k + 1] for k in first]).flatten()
        scale = float(true @ predicted / predicted.square().sum())
        found.append((float(np.corrcoef(true, predicted)[0, 1]), scale))
    assert found[0][0] > 0.99 and 0.85 < found[0][1] < 1.1
    assert found[1][0] < 0.95 and found[1][1] < 0.5
    # on parameters: what the losses see is the same, but for each point's own λω
    moved = -adversarial_influence(memory, model, batch) / ROWS
    assert moved.shape == (ROWS, 6)
    weight = model.head.weight.detach().squeeze(0)
    x, y = batch
    side = (2 * y - 1).unsqueeze(1)
    pull = -torch.sigmoid(-side.squeeze(1) * (x @ weight) + 0.1 * weight.norm()).unsqueeze(1)
    slopes = pull * (side * x - 0.1 * weight / weight.norm())
    assert float(((moved @ slopes.T) - each).norm()) < 0.05 * float(each.norm())
    top = top_influences(memory, model, batch, tuple(t[:1] for t in batch), count=3)
    assert top.robust[0] == int(each[:, 0].argmax())


def test_parameters_need_a_matrix_and_losses_do_not() -> None:
    trainer, model = fit(horizon="training")
    dense = next(c for c in trainer.callbacks if isinstance(c, MUterCallback))
    other, rows_model = fit(horizon="training", representation="rows")
    rows = next(c for c in other.callbacks if isinstance(c, MUterCallback))
    batch = data().tensors
    torch.testing.assert_close(
        influence_on_losses(memory_of(rows), rows_model, batch, batch),
        influence_on_losses(memory_of(dense), model, batch, batch),
        rtol=1e-6,
        atol=1e-12,
    )
    with pytest.raises(ConfigurationError, match="representation='dense'"):
        adversarial_influence(memory_of(rows), rows_model, batch)
