"""The bound holds where its theorem does, and says why not elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Data, fit, memory_of

from lightning_muter import RemovalDataModule
from lightning_muter.unlearning import corrector as correction


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head": None, "parameters": ["classifier.weight", "classifier.bias"]}, "linear head"),
        ({"weight_decay": 0.0, "damping": 1e-3}, "strongly convex"),
        ({"method": "newton"}, "robust objective"),
        ({"space": "features", "response": "unconstrained"}, "robust objective"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:the system of the remaining points ended indefinite",
    "ignore:the curvature is indefinite",
    "ignore:only .* unconstrained response",
)
def test_no_bound_without_its_conditions(options: dict[str, Any], reason: str) -> None:
    trainer, _, _, data = fit(newton_steps=2, **options)
    result = trainer.unlearn(RemovalDataModule(data, [1]), bound=True)
    assert result.bound is None
    assert result.certificate.startswith("no certificate") and reason in result.certificate


def test_without_asking_there_is_no_certificate() -> None:
    trainer, _, _, data = fit(newton_steps=2)
    assert trainer.unlearn(RemovalDataModule(data, [1])).certificate == "no certificate"


def test_a_slow_correction_renews_the_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = Data().dataset.tensors[1]
    gone = torch.nonzero(labels == 0).flatten().tolist()  # a whole class
    keep = torch.nonzero(labels != 0).flatten().tolist()
    retrained = memory_of(fit(Data(keep=keep), newton_steps=30)[1]).omega_star

    def distance(steps: int) -> float:
        trainer, callback, _, data = fit(newton_steps=30)
        trainer.unlearn(RemovalDataModule(data, gone), corrector_steps=steps)
        return float((memory_of(callback).omega - retrained).norm())

    renewed = distance(8)
    monkeypatch.setattr(correction, "PAYS", float("inf"))
    assert renewed < 0.01 * distance(8) and renewed < 1e-3 * distance(0)
