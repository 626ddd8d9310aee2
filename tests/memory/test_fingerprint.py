"""The frozen network is hashed once a process, and again after any change of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_muter.memory import fingerprint as module_of
from lightning_muter.memory.fingerprint import fingerprint


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 120), nn.BatchNorm1d(120), nn.Linear(120, 3))


TRAINED = ["2.weight", "2.bias"]


def test_hashed_once(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    full = module_of._digest
    monkeypatch.setattr(module_of, "_digest", lambda *a: hashed.append(1) or full(*a))
    first = fingerprint(network, TRAINED)
    network[2].weight.data.add_(1)  # the trained part is no part of it
    assert [fingerprint(network, TRAINED) for _ in range(5)] == [first] * 5
    assert len(hashed) == 1
    assert fingerprint(copy.deepcopy(network), TRAINED) == first


@pytest.mark.parametrize(
    "change", ["in place", "data", "one bit", "swapped", "assigned", "buffer", "dtype", "set"]
)
def test_every_change_is_seen(network: nn.Module, change: str) -> None:
    first = fingerprint(network, TRAINED)
    weight = network[0].weight
    with torch.no_grad():
        if change == "in place":
            weight.mul_(1.0001)
        elif change == "data":
            weight.data.add_(0.1)
        elif change == "one bit":
            weight.data.view(torch.int32)[3, 5] ^= 1
        elif change == "swapped":
            weight.data[[0, 1]] = weight.data[[1, 0]]
        elif change == "assigned":
            network[0].weight = nn.Parameter(weight + 1)
        elif change == "buffer":
            network[1].running_mean.data.add_(1)
        elif change == "dtype":
            network.double()
        else:
            weight.data = weight.data.flip(0)
    assert fingerprint(network, TRAINED) != first


def test_trained_names_are_part_of_the_question(network: nn.Module) -> None:
    assert fingerprint(network, TRAINED) != fingerprint(network, ["0.weight"])
