"""The callback's arguments: the memory that is asked for, and what training itself is given."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest

from lightning_muter import (
    TRADES,
    AdversarialTraining,
    Ascent,
    ConfigurationError,
    L2Ball,
    MUterCallback,
)
from lightning_muter.lightning.callback_arguments import Arguments
from lightning_muter.options import FLAT_DEFAULTS
from lightning_muter.spec import Settings

DEFAULTS = {name: one.default for name, one in inspect.signature(MUterCallback).parameters.items()}


def asked(**options: Any) -> Arguments:
    return Arguments.of({**DEFAULTS, "threat": L2Ball(0.5), "head": "head", **options})


def test_the_defaults_are_the_signature_s() -> None:
    assert all(DEFAULTS[name] == value for name, value in FLAT_DEFAULTS.items())


def test_settings_that_are_left_out_are_the_callback_s() -> None:
    plain = Settings(method="muter", threat=L2Ball(0.5), head="head")
    assert plain == replace(asked().settings, representation="dense")


def test_every_setting_is_an_argument_s() -> None:
    values = {
        "threat": L2Ball(0.25), "method": "newton", "parameters": ["a", "b"], "head": None,
        "objective": TRADES(beta=2.0), "loss": "cross_entropy", "damping": 0.5, "solver": "direct",
        "weight_decay": 0.25, "horizon": 2.0, "batch": ("image", "label"), "output": "logits",
        "forward": "encode", "representation": "dense", "solver_tol": 1e-4, "row_dtype": "float32",
    }  # fmt: skip
    settings = asked(**values).settings
    for name in values.keys() - {"parameters", "batch", "output", "forward"}:
        assert getattr(settings, name) == values[name]
    assert settings.parameters == ("a", "b") and settings.batch.where == ("image", "label")
    assert (settings.logits.forward, settings.logits.output) == ("encode", "logits")


def test_training_gets_all_its_arguments_and_no_other() -> None:
    own = list(inspect.signature(AdversarialTraining).parameters)
    given = asked(attack=Ascent(steps=3, random_start=False), objective=TRADES(beta=2.0)).training
    assert sorted(given) == sorted(own)
    assert given["attack"] is None  # an ascent is the threat's own
    assert (given["attack_steps"], given["random_start"]) == (3, False)
    library = object()  # which `AdversarialTraining` checks itself
    assert asked(attack=library).training["attack"] is library


def test_what_training_decides_is_left_open() -> None:
    plain = asked()
    assert plain.weight_decay is None and plain.settings.weight_decay == 0.0
    assert plain.horizon is None and plain.settings.horizon is None
    own = asked(horizon="training")
    assert own.horizon == "training" and own.settings.horizon is None
    named = asked(horizon=2, weight_decay=1)
    assert (named.horizon, named.weight_decay) == (2.0, 1.0)
    assert (named.settings.horizon, named.settings.weight_decay) == (2.0, 1.0)


@pytest.mark.parametrize("horizon", ["training", 0.5])
def test_an_early_end_has_no_newton_steps(horizon: Any) -> None:
    with pytest.raises(ConfigurationError, match="with newton_steps=3.*one of the two"):
        asked(horizon=horizon, newton_steps=3)
    assert isinstance(asked(horizon=horizon).settings, Settings)
