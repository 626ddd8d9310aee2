"""One step under TRADES beside a Retrain that is really run, on two of the digits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_muter import TRADES, L2Ball, UnlearningMemory
from lightning_muter.linalg.cholesky import direct
from lightning_muter.spec import Settings
from lightning_muter.unlearning.objective import RobustObjective, newton
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.request import forget
from lightning_muter.unlearning.stage_one import build_memories

SETTINGS = Settings(
    method="muter",
    threat=L2Ball(0.5),
    head="0",
    solver="direct",
    weight_decay=1e-3,
    objective=TRADES(beta=6.0),
)


def one_or_seven() -> tuple[Tensor, Tensor]:
    data = load_digits()
    keep = (data.target == 1) | (data.target == 7)
    x = torch.tensor(data.data[keep] / 16.0, dtype=torch.float64)
    return x[:200], torch.tensor(data.target[keep] == 7)[:200].long()


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """To the optimum, from the same initial weights each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 2)).double()
    view, problem = SETTINGS.view(model), SETTINGS.problem()
    history = newton(RobustObjective(view, problem, lambda: [unweighted(x, y)]), 30)
    assert history[-1] < 1e-6
    return model


def memory_of(model: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> UnlearningMemory:
    digests = torch.zeros(len(x), 16, dtype=torch.uint8)
    (built,) = build_memories(model, [settings], [unweighted(x, y)], digests, bytes(16))
    return built


@pytest.mark.parametrize("count", [2, 6])
def test_one_step_is_near_a_retrain_and_adversarial_trainings_hessian_is_not(count: int) -> None:
    x, y = one_or_seven()
    model = trained(x, y)
    memories = {
        "muter": memory_of(model, x, y, SETTINGS),
        "newton_delta": memory_of(model, x, y, replace(SETTINGS, method="newton_delta")),
        "adversarial": memory_of(model, x, y, replace(SETTINGS, objective=None)),
    }
    torch.manual_seed(1)
    order = torch.randperm(len(x))
    gone, rest = order[:count].tolist(), order[count:].sort().values
    optimum = SETTINGS.view(trained(x[rest], y[rest])).get()
    start = memories["muter"].omega_star
    outcomes = {
        name: forget(memory, memory.settings.view(model), gone, x[gone], y[gone]).memory
        for name, memory in memories.items()
    }
    other = outcomes["adversarial"].curvature
    assert other is not None
    ends = {name: after.omega for name, after in outcomes.items()}
    ends["adversarial"] = start + direct(other.matrix, outcomes["muter"].gradient).value
    none = float((start - optimum).norm())
    relative = {name: float((omega - optimum).norm()) / none for name, omega in ends.items()}
    assert relative["muter"] <= 0.05
    assert relative["adversarial"] > 0.2 and relative["newton_delta"] > 0.2
