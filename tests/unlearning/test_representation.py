"""The number of probes that sizes alone choose, and what a memory with it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import fit, memory_of
from torch import nn

from lightning_muter import ConfigurationError, L2Ball, MUterCallback
from lightning_muter.errors import MemoryFormatError
from lightning_muter.spec import Settings
from lightning_muter.unlearning import representation
from lightning_muter.unlearning.representation import represented, with_probes

INPUTS = 3072


def settings(**options: Any) -> Settings:
    callback = MUterCallback(L2Ball(0.5), head="1", sketch="auto", **options)
    return callback.settings


def chosen(points: int, width: int, classes: int, **options: Any) -> int | str:
    net = nn.Sequential(nn.Identity(), nn.Linear(width, classes))
    asked = settings(**options)
    return with_probes(asked, asked.view(net), INPUTS, points).sketch


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("points", [200, 50_000, 90_000, 150_000, 10**6])
def test_as_many_probes_as_keep_the_rows_within_a_gibibyte(points: int, dtype: str) -> None:
    """By the count of docs/theory.md: n (F(1 + K) + C(2 + K)) numbers, and a few more a point."""
    width, classes = 640, 100
    size = 8 if dtype == "float64" else 4
    fits = [
        k
        for k in range(1, 17)
        if size * points * ((width + 1) * (1 + k) + classes * (2 + k) + k) + 25 * points
        <= 2**30 - 8 * (width + 1) ** 2
    ]
    wanted = max(fits, default=1)
    found = chosen(points, width, classes, row_dtype=dtype)
    assert abs(int(found) - wanted) <= (0 if points < 10**6 else 1) and int(found) >= 1
    assert points != 200 or found == 16


def test_the_number_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = chosen(90_000, 640, 100)
    monkeypatch.setattr(representation, "free_bytes", lambda device: 10**6)
    assert chosen(90_000, 640, 100) == before


@pytest.mark.parametrize(
    ("asked", "way_out"),
    [
        ({"representation": "dense"}, "choose representation='rows', a smaller head"),
        ({"representation": "rows"}, "choose row_dtype='float32', a smaller head"),
        ({"representation": "rows", "row_dtype": "float32"}, "choose a smaller head"),
        ({"representation": "dense", "sketch": 0}, "choose a smaller head.*rows need sketch=1"),
    ],
)
def test_what_does_not_fit_is_told_what_would_be_smaller(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], way_out: str
) -> None:
    monkeypatch.setattr(representation, "free_bytes", lambda device: 10_000)
    net = nn.Sequential(nn.Identity(), nn.Linear(640, 100))
    given = replace(settings(), **{"sketch": 1, **asked})
    with pytest.raises(ConfigurationError, match=way_out):
        represented(given, given.view(net), INPUTS, 1000, torch.device("cpu"))


def test_a_number_that_was_given_is_kept() -> None:
    net = nn.Sequential(nn.Identity(), nn.Linear(640, 100))
    for sketch in (0, 1, 30):
        asked = replace(settings(), sketch=sketch)
        assert with_probes(asked, asked.view(net), INPUTS, 10**6) is asked


@pytest.mark.filterwarnings("ignore:the noise of 16 probes")
def test_what_is_chosen_is_said_and_is_the_memory_of_that_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    name = "lightning_muter.lightning.after_training.rank_zero_info"
    monkeypatch.setattr(name, lambda message: said.append(message))
    _, callback, _, _ = fit(sketch="auto", newton_steps=2, representation="rows")
    assert "sketch='auto' is 16 probes a point" in said[0] and "as rows" in said[0]
    assert "Stage I" in said[0]
    memory = memory_of(callback)
    _, by_number, _, _ = fit(sketch=16, newton_steps=2, representation="rows")
    v = torch.linspace(-1, 1, memory.p, dtype=torch.float64)
    assert memory.settings == memory_of(by_number).settings and memory.settings.sketch == 16
    products = [one.curvature.matvec(v) for one in (memory, memory_of(by_number))]  # type: ignore[union-attr]
    assert torch.equal(*products)
    kept = memory.settings.to_dict()
    assert "sketch" not in callback.settings.differences(kept)
    assert "sketch" in replace(callback.settings, sketch=3).differences(kept)
    assert "sketch" in callback.settings.differences({**kept, "sketch": 0})


def test_without_a_word_the_response_is_exact() -> None:
    _, callback, _, _ = fit(newton_steps=1)
    assert memory_of(callback).settings.sketch == 0


def test_another_word_is_refused_and_so_is_a_memory_that_does_not_say() -> None:
    with pytest.raises(ConfigurationError, match="sketch='many' must be a whole number"):
        MUterCallback(L2Ball(0.5), head="1", sketch="many")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="needs a linear head"):
        MUterCallback(L2Ball(0.5), parameters=["1.weight"], sketch="auto")
    with pytest.raises(MemoryFormatError):
        Settings.from_dict(settings().to_dict())


def test_probes_are_chosen_before_the_memory_s_size_is_told() -> None:
    net = nn.Sequential(nn.Identity(), nn.Linear(64, 10))
    asked = settings(representation="rows")
    full = with_probes(asked, asked.view(net), INPUTS, 1000)
    found = represented(full, asked.view(net), INPUTS, 1000, torch.device("cpu"))
    assert found.footprint is not None and found.footprint.factors == full.sketch == 16
