"""What a person is told after fit: what was kept, whether to trust it, what a request takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cases import fit, memory_of

from lightning_muter import RemovalDataModule


def lines(caplog: pytest.LogCaptureFixture, **options: Any) -> tuple[list[str], Any]:
    caplog.clear()
    trainer, callback, _, data = fit(**options)
    said = [one for one in caplog.messages if one.startswith(("Kept", "Trust", "A request"))]
    return said, (trainer, callback, data)


def test_three_lines_after_fit_and_one_after_unlearn(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder = str(tmp_path / "memory")
    (kept, trust, price), (trainer, callback, data) = lines(caplog, memory_dir=folder)
    memory = memory_of(callback)
    assert (
        "the curvature of 41 training points in 21 trained parameters (muter, dense, 0.0 MB)"
        in kept
    )
    assert f"in {folder}, with the current model" in kept
    assert "nothing speaks against it; 100% of the perturbations are stationary" in trust
    assert f"the optimum is {memory.summary['distance_to_optimum']:.2g} away" in trust
    assert re.match(r"A request: about [\d.]+ s and 0.0 MB more for one point, with no", price)
    result = trainer.unlearn(RemovalDataModule(data, [3]))
    assert caplog.messages[-1] == str(result)
    card = memory_of(callback)._repr_html_()
    assert "Memory of muter" in card and "smallest_eigenvalue" in card and "forgotten" in card


@pytest.mark.filterwarnings("ignore:training stopped")
def test_a_doubt_is_in_the_second_line(caplog: pytest.LogCaptureFixture) -> None:
    (kept, trust, _), _ = lines(caplog, newton_steps=0)
    assert "in this process alone" in kept and "Trust: in doubt, see 1 warning" in trust
    said, _ = lines(caplog, newton_steps=0, method="retrain")
    assert said[0].startswith("Kept: which 41 training points there were")
    assert said[2] == "A request: a training again."
