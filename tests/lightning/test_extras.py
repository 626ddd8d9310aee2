"""The arguments of a call beside its removals: what each may be, and what they go with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Data, fit, memory_of

from lightning_muter import Certificate, ConfigurationError, RemovalDataModule
from lightning_muter.lightning.extras import Extras

ONE = Certificate(1.0, 1e-5, 1e-3)


def extras(certificate: Any = None, inner_gap: Any = None, **options: Any) -> Extras:
    plain = {"noise_std": 0.0, "corrector_steps": 0, "bound": False, "already": "error", "note": ""}
    return Extras.of(**{**plain, **options}).proving(certificate, inner_gap)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"noise_std": v}, "noise_std") for v in (float("inf"), -1.0, True, "1", None, 1j)),
        ({"noise_std": float("nan")}, "noise_std"),
        *(({"corrector_steps": v}, "corrector_steps") for v in (-1, 1.5, 1.0, True, "1", None)),
        *(({"bound": v}, "bound") for v in (1, "yes", None)),
        ({"already": "pass"}, "'error' or 'skip'"),
        ({"note": 3}, "a text for the ledger"),
        ({"certificate": (1.0, 1e-5, 1e-3)}, "Certificate"),
        ({"certificate": ONE, "noise_std": 0.1}, "noise_std"),
        ({"certificate": ONE, "corrector_steps": 1}, "corrector_steps"),
        ({"inner_gap": 0.1}, "bound=True"),
        ({"inner_gap": -1.0, "bound": True}, "inner_gap"),
        ({"inner_gap": float("nan"), "bound": True}, "inner_gap"),
    ],
    ids=str,
)
def test_arguments_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        extras(**options)


def test_the_remaining_points_are_read_where_something_is_said_of_them() -> None:
    assert not extras(noise_std=0.1, note="by letter").reads_the_rest
    assert extras(corrector_steps=1).reads_the_rest
    assert extras(bound=True, inner_gap=0.01).reads_the_rest
    assert extras(certificate=ONE).reads_the_rest


def test_what_the_memory_or_the_request_cannot_give() -> None:
    data = Data()
    memory = memory_of(fit(data, newton_steps=1)[1])
    removals = RemovalDataModule(data, [3])
    for options in ({"corrector_steps": 1}, {"bound": True}, {"certificate": ONE}):
        extras(**options).check(memory, removals)
        with pytest.raises(ConfigurationError, match="need a RemovalDataModule"):
            extras(**options).check(memory, [3])
    early = memory_of(fit(data, newton_steps=0, horizon="training")[1])
    extras(bound=True).check(early, removals)
    with pytest.raises(ConfigurationError, match="stops early"):
        extras(corrector_steps=1).check(early, removals)
    none = memory_of(fit(data, newton_steps=0, method="none")[1])
    for options in (
        {"corrector_steps": 1},
        {"noise_std": 0.1},
        {"certificate": ONE},
        {"bound": True},
    ):
        with pytest.raises(ConfigurationError, match="method='none'"):
            extras(**options).check(none, removals)


def test_only_a_call_that_skips_passes_over_what_is_forgotten() -> None:
    memory = memory_of(fit(newton_steps=1)[1]).without([3])
    assert extras().passed_over(memory) is None
    over = extras(already="skip").passed_over(memory)
    assert over is not None and torch.nonzero(over).flatten().tolist() == [3]
