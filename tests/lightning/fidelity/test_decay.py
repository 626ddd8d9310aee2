"""λ of the memory against what the optimizers do with their weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Net, memory_of
from training import train

from lightning_muter import ConfigurationError

Make = Callable[..., torch.optim.Optimizer]


class Optimized(Net):
    """A network with an optimizer of one's own."""

    def __init__(self, make: Make, **options: Any) -> None:
        super().__init__()
        self.make, self.options = make, options

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters(), lr=0.05, **self.options)


DECOUPLED = [
    (torch.optim.AdamW, {}),
    (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    (torch.optim.RAdam, {"decoupled_weight_decay": True}),
]


@pytest.mark.parametrize(("make", "options"), DECOUPLED)
def test_a_decoupled_decay_is_no_part_of_the_objective(make: Make, options: Any) -> None:
    model = Optimized(make, weight_decay=0.02, **options)
    with pytest.warns(UserWarning, match="decoupled weight decay, as AdamW's, is no L2 term"):
        train(model)
    assert memory_of(train(model, newton_steps=1)).settings.weight_decay == 0.02


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam])
def test_a_coupled_decay_is_the_memorys(make: Make) -> None:
    assert memory_of(train(Optimized(make, weight_decay=0.02))).settings.weight_decay == 0.02


def test_a_declared_decay_that_nothing_has_is_refused_with_any_optimizer() -> None:
    with pytest.raises(ConfigurationError, match="the declared weight_decay is 0.02 more"):
        train(Optimized(torch.optim.AdamW, weight_decay=0.0), weight_decay=0.02)
