"""What a call tells afterwards: shares over all of its points, and every logger on its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Data, fit, memory_of

from lightning_muter import RemovalDataModule
from lightning_muter.lightning.account import Found, ledger_entry, log_result, result_of
from lightning_muter.lightning.extras import Extras
from lightning_muter.linalg.solution import Solution, Status
from lightning_muter.unlearning.points import Sums
from lightning_muter.unlearning.request import Outcome


class Logger:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.said: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if self.error is not None:
            raise self.error
        self.said.append((step, metrics))

    def save(self) -> None:
        self.said.append("saved")


def outcome(memory: Any, points: int, active: int, residual: float, noise: float | None) -> Outcome:
    counts = [0.0, float(points), points, points, active, points, 0]
    sums = Sums.unpack(torch.tensor([0.0] * memory.p + counts, dtype=torch.float64))
    solution = Solution(memory.omega, residual, 5, Status.CONVERGED)
    return Outcome(memory, solution, sums, 0.1, (), noise)


def test_requests_of_one_call_have_one_account() -> None:
    memory = memory_of(fit(newton_steps=1)[1])
    outcomes = [outcome(memory, 3, 3, 1e-9, None), outcome(memory, 1, 0, 1e-7, 0.02)]
    server: Any = SimpleNamespace(outcomes=outcomes, served=[3, 17, 5, 8], already=[2])
    found = Found(memory, None, ("in doubt",))
    entry = ledger_entry(server, found, Extras(0.5, 0, False, True, "both"))
    result = result_of(server, found, 0.25, {"total": 1.0})
    assert entry["active"] == result.active == 0.75  # of four points, not the mean of 1 and 0
    assert entry["stationary"] == result.stationary == 1.0
    assert entry["note"] == "both" and entry["noise_std"] == 0.5 and "publication" not in entry
    assert entry["warnings"] == ["in doubt"] and result.status == Status.DOUBTFUL
    assert result.residual == 1e-7 and result.iterations == 10 and result.sketch_noise == 0.02
    assert result.requests == 2 and result.indices == (3, 17, 5, 8) and result.already == (2,)


def test_a_logger_that_fails_keeps_nothing_from_the_next() -> None:
    data = Data()
    result = fit(data, newton_steps=1)[0].unlearn(RemovalDataModule(data, [3]))
    broken, whole = Logger(OSError("full")), Logger()
    trainer: Any = SimpleNamespace(loggers=[broken, whole])
    with pytest.warns(UserWarning, match="is committed, but Logger could not log it: full"):
        log_result(trainer, result, 7)
    (step, metrics), saved = whole.said
    assert (step, saved) == (7, "saved") and "unlearn/bound" not in metrics
    assert metrics["unlearn/points"] == 1.0
    assert metrics["unlearn/seconds"] == result.seconds["total"]
