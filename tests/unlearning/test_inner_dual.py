"""The inner maximum in closed form against a search of all perturbations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_muter.unlearning.inner_dual import LevelLoss, Logistic, Squared
from lightning_muter.unlearning.reach import BallReach, Reach, SmoothedSignReach


def every_perturbation(reach: Reach) -> tuple[Tensor, Tensor]:
    """Perturbations of two coordinates (k, 2) all over the set, and their merit (k,)."""
    line = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    if isinstance(reach, BallReach):
        angle = line * torch.pi
        return reach.eps * torch.stack([angle.cos(), angle.sin()], dim=1), torch.zeros_like(line)
    assert isinstance(reach, SmoothedSignReach)
    one = torch.linspace(-1, 1, 1201, dtype=torch.float64)
    delta = reach.eps * torch.sin(torch.cartesian_prod(one, one) * torch.pi / 2)
    height = (reach.eps**2 - delta.square()).clamp(min=0).sqrt()
    return delta, reach.tau * height.sum(dim=1)


@pytest.mark.parametrize("reach", [BallReach(0.7), SmoothedSignReach(0.7, 0.3)], ids=repr)
@pytest.mark.parametrize("loss", [Logistic(), Squared()], ids=repr)
def test_is_the_largest_of_all_perturbations(loss: LevelLoss, reach: Reach) -> None:
    torch.manual_seed(0)
    w = torch.tensor([1.5, -0.4], dtype=torch.float64)
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 0, 1, 0], dtype=torch.float64)
    level, _ = loss.level(z, y)
    rho = loss.maximum(level, reach, w)
    found = loss.value(level + reach.slope(rho, w)) + reach.merit(rho, w)
    delta, merit = every_perturbation(reach)
    for i in range(len(z)):
        outputs = z[i] + delta @ w
        losses = (
            F.softplus(outputs) - y[i] * outputs
            if isinstance(loss, Logistic)
            else 0.5 * (outputs - y[i]).square()
        )
        highest = float((losses + merit).max())
        assert highest <= float(found[i]) <= highest + 1e-4


def scanned(level: Tensor, reach: SmoothedSignReach, w: Tensor) -> Tensor:
    """max_ρ [ρ a + H(ρ) + E(ρ)] on a fine grid of log-odds."""
    odds = torch.linspace(-50, 30, 160_001, dtype=torch.float64)
    rho = torch.sigmoid(odds)
    entropy = -(rho * F.logsigmoid(odds) + torch.sigmoid(-odds) * F.logsigmoid(-odds))
    height = (rho.square().unsqueeze(1) * w.square() + reach.tau**2).sqrt().sum(dim=1)
    base = entropy + reach.eps * height
    return torch.stack([(rho * one + base).max() for one in level])


def test_of_two_maxima_the_higher_one_is_found() -> None:
    w = torch.ones(40, dtype=torch.float64)
    reach = SmoothedSignReach(0.5, 1e-4)  # moves the output by 20, from slopes of 1e-4 on
    level = torch.linspace(-30, 2, 129, dtype=torch.float64)
    loss = Logistic()

    def reached(rho: Tensor) -> Tensor:
        return loss.value(level + reach.slope(rho, w)) + reach.merit(rho, w)

    rho = loss.maximum(level, reach, w)
    best = scanned(level, reach, w)
    assert bool((reached(rho) >= best - 1e-9).all())
    assert bool((loss.gap(level, rho, reach, w) <= 1e-10).all())
    jump = int(torch.logit(rho).diff().argmax())
    assert float(torch.logit(rho).diff()[jump]) > 3.0  # from one maximum to another
    # where the other one is only local: the gap covers what is missing
    other = torch.where(torch.arange(129) == jump + 1, rho[jump], rho)
    claimed, short = loss.gap(level, other, reach, w), best - reached(other)
    assert float(claimed[jump + 1]) >= float(short[jump + 1]) > 0


def test_a_concave_inner_problem_has_no_gap() -> None:
    w = torch.tensor([0.3, 0.2], dtype=torch.float64)
    reach, level = SmoothedSignReach(0.1, 0.05), torch.linspace(-5, 5, 11, dtype=torch.float64)
    rho = Logistic().maximum(level, reach, w)
    assert float(Logistic().gap(level, rho, reach, w).max()) < 1e-25
    rough = rho * (1 + 1e-3)  # what a root that is not one loses is in the gap, about twice
    value = rough * level + reach.value(rough, w) - torch.special.xlogy(rough, rough)
    value -= torch.special.xlogy(1 - rough, 1 - rough)
    best = Logistic().value(level + reach.slope(rho, w)) + reach.merit(rho, w)
    short, claimed = best - value, Logistic().gap(level, rough, reach, w)
    assert bool((short <= claimed + 1e-13).all()) and bool((claimed <= 3 * short + 1e-13).all())
