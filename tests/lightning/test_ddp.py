"""One process equals two, on an odd number of points (a padded pass would count one twice)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_muter import UnlearningMemory
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.curvature.sharded import ShardedDense


def written_by(worker: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    """What a worker's run on one device wrote, and its run on two."""
    found = []
    for devices in (1, 2):
        path = folder / f"{devices}.safetensors"
        program = str(Path(__file__).parents[1] / "helpers" / worker)
        command = [sys.executable, program, str(devices), str(path)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
        assert run.returncode == 0, run.stderr
        found.append(load_file(path))
    return found


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    found = written_by("ddp_worker.py", tmp_path)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_rows_on_two_processes_equal_those_of_one_and_each_keeps_its_own(tmp_path: Path) -> None:
    found = written_by("rows_worker.py", tmp_path)
    one, two = ({k: v for k, v in each.items() if "share" not in k} for each in found)
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-10)
    assert (float(found[0]["fit.share"]), float(found[1]["fit.share"])) == (41, 21)
    # all rows of both processes went to the folder
    kept = [UnlearningMemory.load(tmp_path / f"{n}.safetensors.memory") for n in (1, 2)]
    rows = [memory.curvature for memory in kept]
    assert all(isinstance(one, RowsCurvature) and one.points == 37 for one in rows)
    v = torch.linspace(-1, 1, kept[0].p, dtype=torch.float64)
    torch.testing.assert_close(
        *(one.matvec(v) for one in rows if one is not None), rtol=1e-10, atol=1e-10
    )


@pytest.mark.slow
def test_a_matrix_over_two_processes_equals_that_of_one_and_each_keeps_half(tmp_path: Path) -> None:
    found = written_by("sharded_worker.py", tmp_path)
    one, two = ({k: v for k, v in each.items() if "share" not in k} for each in found)
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-10)
    shares = [{k: float(v) for k, v in each.items() if "share" in k} for each in found]
    p = len(one["fit.omega"])
    assert all(bytes_ == 8 * p * p for bytes_ in shares[0].values())
    assert all(bytes_ == 8 * p * (p // 2) for bytes_ in shares[1].values())
    # the whole matrix went to the folder, whoever reads it
    kept = [UnlearningMemory.load(tmp_path / f"{n}.safetensors.memory") for n in (1, 2)]
    v = torch.linspace(-1, 1, p, dtype=torch.float64)
    products = []
    for memory in kept:
        assert isinstance(memory.curvature, ShardedDense) and len(memory.curvature.rows) == p
        products.append(memory.curvature.matvec(v))
    torch.testing.assert_close(*products, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(products[0], one["after.matrix"] @ v, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_two_processes_publish_one_model_with_one_noise(tmp_path: Path) -> None:
    found = []
    for devices in (1, 2):
        path = tmp_path / f"{devices}"
        worker = str(Path(__file__).parents[1] / "helpers" / "certificate_worker.py")
        command = [sys.executable, worker, str(devices), str(path)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert run.returncode == 0, run.stderr
        found += [load_file(f"{path}.{rank}") for rank in range(devices)]
    alone, first, second = found
    torch.testing.assert_close(second, first, rtol=0, atol=0)  # the noise of the first process
    torch.testing.assert_close(first["model"], first["omega"], rtol=0, atol=0)
    torch.testing.assert_close(first["private"], alone["private"], rtol=0, atol=2e-8)
    assert not torch.equal(first["omega"] - first["private"], alone["omega"] - alone["private"])
