"""Numbers and names as users give them: taken as Python's own, or refused where they are given."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Data, Net, fit, memory_of
from torch import nn

from lightning_muter import (
    TRADES,
    AdversarialTraining,
    L2Ball,
    LinfBall,
    MUterCallback,
    RemovalDataModule,
    UnlearningMemory,
)
from lightning_muter.errors import ConfigurationError


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"newton_steps": 2.5}, "newton_steps=2.5 must be a whole number >= 0"),
        ({"newton_steps": True}, "newton_steps=True must be a whole number"),
        ({"newton_steps": "3"}, "newton_steps='3' must be a whole number"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number >= 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
        ({"attack_steps": 0}, "attack_steps=0 must be a whole number >= 1"),
        ({"attack_steps": 1.5}, "attack_steps=1.5 must be a whole number"),
        ({"attack_step_size": -1.0}, "attack_step_size=-1.0 must be a finite number > 0"),
        ({"attack_step_size": float("nan")}, "attack_step_size=nan must be a finite number"),
        ({"sketch": 1.5}, "sketch=1.5 must be a whole number"),
        ({"neumann_order": -1}, "neumann_order=-1 must be a whole number >= 0"),
        ({"damping": "0.1"}, "damping='0.1' must be a finite number"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be a finite number >= 0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must be a finite number"),
        ({"horizon": "train"}, "horizon='train' must be a finite number > 0"),
        ({"horizon": 0.0}, "horizon=0.0 must be a finite number > 0"),
        ({"horizon": float("inf")}, "horizon=inf must be a finite number"),
        ({"solver_tol": "x"}, "solver_tol='x' must be a finite number"),
        ({"threat": "l2"}, "threat='l2' must be a Threat"),
        ({"threat": L2Ball}, "must be a Threat"),
        ({"loss": nn.BCEWithLogitsLoss}, "loss=BCEWithLogitsLoss is a class"),
        ({"head": nn.Linear(2, 2)}, "must be the name under which the module holds"),
        ({"head": None, "parameters": [nn.Parameter(torch.ones(1))]}, "others than names"),
        ({"memory_dir": 3}, "memory_dir=3 must be the path of a folder"),
    ],
)
def test_an_argument_that_is_none_is_refused_where_it_is_given(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        MUterCallback(**{"threat": L2Ball(0.5), "head": "classifier", **options})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: L2Ball(True), "eps=True must be a number"),
        (lambda: L2Ball(0.3, 0.5), "data_range=0.5 must be (low, high)"),
        (lambda: L2Ball(0.3, temperature="1"), "temperature='1' must be a finite number > 0"),
        (lambda: LinfBall(0.3, smoothing="1"), "smoothing='1' must be a finite number > 0"),
        (lambda: LinfBall(0.3, bandwidth=0), "bandwidth=0 must be a finite number > 0"),
        (lambda: TRADES("6"), "beta='6' must be a finite number > 0"),
        (lambda: TRADES(0), "beta=0 must be a finite number > 0"),
        (lambda: AdversarialTraining("l2"), "threat='l2' must be a Threat"),
    ],
)
def test_values_refuse_what_is_no_number(make: Any, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        make()


def test_numbers_of_numpy_are_kept_as_pythons_own(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "threat": L2Ball(np.float32(0.5)),
        "newton_steps": np.int64(15),
        "weight_decay": np.float32(0.015625),
        "damping": np.float64(0.001),
        "batch_size": np.int32(16),
        "attack_steps": np.int64(3),
        "attack_step_size": np.float32(0.25),
        "neumann_order": np.int64(2),
        "memory_dir": tmp_path / "memory",
    }
    trainer, callback, model, data = fit(**options)
    text = json.dumps(memory_of(callback).settings.to_dict())
    loaded = UnlearningMemory.load(tmp_path / "memory")
    assert json.dumps(loaded.settings.to_dict()) == text
    trainer.unlearn(RemovalDataModule(data, indices=np.array([3, 17])))
    assert torch.equal(
        UnlearningMemory.load(tmp_path / "memory").omega,
        torch.cat([p.detach().reshape(-1) for p in model.classifier.parameters()]),
    )


@pytest.mark.parametrize("below", ["", "memory"])
def test_a_memory_dir_that_cannot_be_is_refused_before_training(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigurationError, match=r"cannot be written: .*file is no folder"):
        fit(Data(), memory_dir=str(tmp_path / "file" / below))
    assert (tmp_path / "file").read_text() == "not a folder"
    assert Net().classifier.weight.requires_grad
