"""Trainings without a memory, refused by name with what to write instead."""

from __future__ import annotations

import pytest

from lightning_muter import ConfigurationError, L2Ball, MUterCallback
from lightning_muter.objectives.resolve import resolve_loss, resolve_objective


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("trades", r"objective=TRADES\(beta=6.0\)"),
        ("MART", "one objective"),
        ("awp", "train without it"),
        ("free", "attack=None"),
        ("mixup", "label_smoothing"),
        ("cutmix", "belongs to two"),
    ],
)
def test_is_answered_by_what_would_do(name: str, instead: str) -> None:
    with pytest.raises(ConfigurationError, match=instead):
        resolve_loss(name)
    with pytest.raises(ConfigurationError, match=instead):
        resolve_objective(name, "cross_entropy")  # type: ignore[arg-type]


def test_the_callback_says_it_at_construction() -> None:
    with pytest.raises(ConfigurationError, match="belongs to two"):
        MUterCallback(L2Ball(0.5), "head", loss="mixup")
