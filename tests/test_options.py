"""Option values stand for the flat keywords, in Python and in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_muter import (
    Ascent,
    BlockSolver,
    ConfigurationError,
    ConstrainedResponse,
    DirectSolver,
    L2Ball,
    MUterCallback,
    UnconstrainedResponse,
)
from lightning_muter.lightning.cli import main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("values", "keywords"),
    [
        ({"response": ConstrainedResponse(sketch=2)}, {"sketch": 2}),
        (
            {"response": UnconstrainedResponse(order=7, space="features")},
            {"response": "unconstrained", "neumann_order": 7, "space": "features"},
        ),
        ({"solver": DirectSolver(damping=0.1)}, {"solver": "direct", "damping": 0.1}),
        ({"solver": BlockSolver()}, {"solver": "schur"}),
    ],
)
def test_values_give_the_settings_of_the_keywords(
    values: dict[str, Any], keywords: dict[str, Any]
) -> None:
    by_value = MUterCallback(L2Ball(0.5), head="head", **values).settings
    assert by_value == MUterCallback(L2Ball(0.5), head="head", **keywords).settings


def test_an_ascent_is_the_training_attack() -> None:
    muter = MUterCallback(L2Ball(0.5), head="head", attack=Ascent(steps=3, random_start=False))
    assert muter.attack is None
    assert (muter.attack_steps, muter.random_start) == (3, False)
    assert muter.attack_step_size == pytest.approx(2.5 * 0.5 / 3)


def test_a_keyword_beside_its_value_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="twice"):
        MUterCallback(L2Ball(0.5), head="head", response=ConstrainedResponse(), sketch=1)
    with pytest.raises(ConfigurationError, match="attack_steps=3"):
        MUterCallback(L2Ball(0.5), head="head", attack=Ascent(), attack_steps=3)


def test_yaml_builds_values_by_class_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "muter.yaml"
    preset.write_text(
        """
trainer:
  callbacks+:
    - class_path: lightning_muter.MUterCallback
      init_args:
        threat: {class_path: lightning_muter.L2Ball, init_args: {eps: 0.5}}
        head: classifier
        attack: {class_path: lightning_muter.Ascent, init_args: {steps: 4}}
        response: {class_path: lightning_muter.UnconstrainedResponse, init_args: {order: 5}}
        solver: {class_path: lightning_muter.BlockSolver}
"""
    )
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-muter"])
    config = ["-c", str(ROOT / "examples" / "digits.yaml"), "-c", str(preset)]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *config, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "UnconstrainedResponse" in printed and "order: 5" in printed
