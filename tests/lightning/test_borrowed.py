"""What a call borrows, given back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lightning_muter.lightning.borrowed import RandomState


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_one_snapshot_of_the_random_states_serves_several_blocks() -> None:
    state = RandomState.now(torch.device("cpu"))
    with state.kept():
        first = drawn()
    with pytest.raises(ZeroDivisionError), state.kept():
        assert drawn() == first
        raise ZeroDivisionError
    assert drawn() == first
    assert drawn() != first
