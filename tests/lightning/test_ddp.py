"""One process equals two, on an odd number of points (a padded pass would count one twice)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    found = []
    for devices in (1, 2):
        path = tmp_path / f"{devices}.safetensors"
        worker = str(Path(__file__).parents[1] / "helpers" / "ddp_worker.py")
        command = [sys.executable, worker, str(devices), str(path)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert run.returncode == 0, run.stderr
        found.append(load_file(path))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
