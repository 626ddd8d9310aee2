"""A week of a memory: rows go, processes crash and meet, and what was forgotten stays forgotten."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import QUIET, Data, Net, fit, memory_of

from lightning_muter import RemovalDataModule, Trainer, UnlearningMemory
from lightning_muter.lightning.cli import main
from lightning_muter.memory.folder import MemoryStore

HELPERS = Path(__file__).parents[1] / "helpers"
N = 120


def begin(folder: Path, rows: list[int], what: str, *row: int) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(HELPERS / "week_worker.py"), str(folder), json.dumps(rows), what]
    return subprocess.Popen(
        [*command, *map(str, row)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1]) if out.strip() else {}
    return found


def forgotten(folder: Path) -> list[int]:
    ledger = UnlearningMemory.load(folder).ledger
    return sorted(index for entry in ledger for index in entry.get("indices", []))


@pytest.mark.slow
def test_a_week(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, rows = tmp_path / "memory", list(range(N))
    trainer, callback, model, data = fit(Data(N), memory_dir=str(folder))
    before, trained = memory_of(callback).omega, memory_of(callback)

    # Monday to Wednesday: three people's rows are deleted, each after its request
    for day, person in enumerate((30, 31, 7)):
        assert end(begin(folder, rows, "unlearn", person)) == {"indices": [person], "already": []}
        if day == 1:  # a retry whose answer was lost changes nothing
            now = UnlearningMemory.load(folder)
            assert end(begin(folder, rows, "skip", person))["already"] == [person]
            assert torch.equal(UnlearningMemory.load(folder).omega, now.omega)
        rows.remove(person)
    assert forgotten(folder) == [7, 30, 31]

    # Thursday: the process is killed between the memory's commit and the model's file
    crashed = begin(folder, rows, "crash", 50)
    crashed.communicate(timeout=300)
    assert crashed.returncode == -signal.SIGKILL
    store = MemoryStore(folder)
    assert store.model_generation() == store.newest()[1] - 1  # the model's file is behind
    assert forgotten(folder) == [7, 30, 31, 50]
    assert end(begin(folder, rows, "skip", 50)) == {"indices": [], "already": [50]}
    rows.remove(50)

    # Friday: two operators at once
    pair = {person: begin(folder, rows, "unlearn", person) for person in (60, 61)}
    answers = {person: end(process) for person, process in pair.items()}
    for person, answer in answers.items():
        if "refused" in answer:  # the holder is named, or the model file was read before the other
            assert re.search(r"process \d+ of|away from the memory's", answer["refused"])
            assert end(begin(folder, rows, "skip", person))["indices"] == [person]
        rows.remove(person)
    gone = [7, 30, 31, 50, 60, 61]
    assert forgotten(folder) == gone

    # the model on disk is that of one request on the original data
    trainer.unlearn(RemovalDataModule(data, gone), model=model, memory=trained)
    at_once = trained.settings.view(model).get()
    torch.testing.assert_close(UnlearningMemory.load(folder).omega, at_once, rtol=0, atol=1e-10)
    main(["export", "--memory", str(folder), "--output", str(tmp_path / "exported.ckpt")])
    main(["verify", str(folder)])
    assert "6 requests, 6 points forgotten: whole" in capsys.readouterr().out
    exported = Net().double()
    state = torch.load(tmp_path / "exported.ckpt", weights_only=True)["state_dict"]
    exported.load_state_dict(state)
    torch.testing.assert_close(trained.settings.view(exported).get(), at_once, rtol=0, atol=1e-10)
    Trainer(**QUIET).test(exported, data, verbose=False)

    # the week after: a rebase, and one more person
    end(begin(folder, rows, "rebase"))
    assert UnlearningMemory.load(folder).n == N - 6
    assert end(begin(folder, rows, "unlearn", 90))["indices"] == [rows.index(90)]
    rows.remove(90)
    rest = Data(N)
    rest.dataset.tensors = tuple(tensor[rows] for tensor in rest.dataset.tensors)
    retrained = memory_of(fit(rest)[1]).omega
    left = torch.linalg.vector_norm(UnlearningMemory.load(folder).omega - retrained)
    assert left < 0.2 * torch.linalg.vector_norm(before - retrained)
