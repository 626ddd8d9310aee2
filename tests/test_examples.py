"""The quickstart runs as a user runs it, and ranks the methods."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_muter import METHODS

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "quickstart.py")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.split() for line in run.stdout.splitlines()]
    relative = {row[0]: float(row[2]) for row in rows if row and row[0] in METHODS}
    assert relative.keys() == METHODS.keys()
    assert relative["none"] == 1.0 and relative["retrain"] == 0.0
    others = [v for k, v in relative.items() if k not in ("muter", "retrain")]
    assert relative["muter"] < 0.5 * min(others), relative
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_worked_request_says_what_the_page_says(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "certified_request.py")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    publication, bound, accuracy = run.stdout.splitlines()
    page = (ROOT / "docs" / "certificates.md").read_text()
    assert publication in page and accuracy in page
    assert float(bound.split()[1].rstrip(",")) < 1e-5
