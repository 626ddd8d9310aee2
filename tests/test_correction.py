"""The bound holds where its theorem does, and says why not elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
from test_unlearning import fit

from lightning_muter import RemovalDataModule


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head": None, "parameters": ["classifier.weight", "classifier.bias"]}, "linear head"),
        ({"weight_decay": 0.0, "damping": 1e-3}, "strongly convex"),
        ({"method": "newton"}, "robust objective"),
        ({"space": "features", "response": "unconstrained"}, "robust objective"),
    ],
)
@pytest.mark.filterwarnings("ignore:the system of the remaining points is indefinite")
def test_no_bound_without_its_conditions(options: dict[str, Any], reason: str) -> None:
    trainer, _, _, data = fit(newton_steps=2, **options)
    result = trainer.unlearn(RemovalDataModule(data, [1]), bound=True)
    assert result.bound is None
    assert result.certificate.startswith("no certificate") and reason in result.certificate


def test_without_asking_there_is_no_certificate() -> None:
    trainer, _, _, data = fit(newton_steps=2)
    assert trainer.unlearn(RemovalDataModule(data, [1])).certificate == "no certificate"
