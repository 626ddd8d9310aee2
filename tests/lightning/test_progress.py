"""A pass that takes longer than a second shows how far it is, as the trainer's own bar looks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import pytorch_lightning as pl
from cases import QUIET, Data, Net

from lightning_muter import L2Ball, MUterCallback, RemovalDataModule, Trainer
from lightning_muter.lightning import progress

RUN = {**QUIET, "enable_progress_bar": True}


def everything(callbacks: list[pl.Callback], **options: Any) -> None:
    pl.seed_everything(0, verbose=False)
    muter = MUterCallback(L2Ball(0.5), head="classifier", newton_steps=3)
    trainer = Trainer(max_epochs=1, callbacks=[muter, *callbacks], **{**RUN, **options})
    data = Data()
    trainer.fit(Net(), data)
    trainer.unlearn(RemovalDataModule(data, [3, 4]), corrector_steps=1, bound=True)


def test_every_pass_has_a_bar_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    often = functools.partial(progress.tqdm, mininterval=0, miniters=1)
    monkeypatch.setattr(progress, "tqdm", often)
    everything([pl.callbacks.TQDMProgressBar()])
    shown = capsys.readouterr().err
    for what in (
        "reading the points",
        "newton_steps, pass 2",
        "Stage I",
        "finding the points",
        "points to forget",
        "the remaining points",
    ):
        assert f"{what}: 100%" in shown, what
    assert "41/41 [00:00<00:00" in shown and "2/2 [00:00<00:00" in shown


def test_a_pass_of_less_than_a_second_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    everything([pl.callbacks.TQDMProgressBar()])
    assert "Stage I:" not in capsys.readouterr().err


def test_richs_bar_beside_lightnings_rich_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("FORCE_COLOR", "1")
    everything([pl.callbacks.RichProgressBar()])
    output = capsys.readouterr()
    assert "Stage I" in output.out and "41/41" in output.out
    assert "Stage I:" not in output.err


def test_no_bar_where_the_trainer_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    everything([], enable_progress_bar=False)
    assert "100%" not in capsys.readouterr().err


def test_a_bar_is_closed_where_its_pass_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    bar = progress.bar_of(Trainer(callbacks=[pl.callbacks.TQDMProgressBar()], **RUN))

    def fails() -> Any:
        yield 1
        raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        list(bar(fails(), "counting", 3))
    assert not progress.tqdm._instances
