"""``import lightning as L`` and ``import pytorch_lightning as pl`` alike; a mixture is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HELPERS = Path(__file__).parents[1] / "helpers"
PACKAGES = ["pytorch_lightning", "lightning"]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, env=variables
    )


def scenario(package: str, folder: Path, what: str, output: Path) -> dict[str, Any]:
    worker = str(HELPERS / "flavour_worker.py")
    done = run(worker, package, str(folder), what, str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(output.read_text())
    assert found["package"] == package
    return found


@pytest.mark.slow
def test_both_packages_alike_and_memories_exchanged(tmp_path: Path) -> None:
    new = [scenario(one, tmp_path / one, "new", tmp_path / "new.json") for one in PACKAGES]
    torch.testing.assert_close(new[0]["omega"], new[1]["omega"], rtol=1e-12, atol=1e-12)
    assert new[0]["loss"] == pytest.approx(new[1]["loss"], rel=1e-6)
    on = [  # each goes on with the other one's memory
        scenario(one, tmp_path / other, "go on", tmp_path / "on.json")
        for one, other in (PACKAGES, PACKAGES[::-1])
    ]
    torch.testing.assert_close(on[0]["omega"], on[1]["omega"], rtol=1e-12, atol=1e-12)


MIXTURES = {
    "a module in our trainer": "Trainer(**Q).fit(other.LightningModule())",
    "a callback in our trainer": "Trainer(callbacks=[other.Callback()], **Q).fit(BoringModel())",
    "our callback in their trainer": (
        "other.Trainer(callbacks=[MUterCallback(L2Ball(1.0), head='layer')], **Q).fit(theirs())"
    ),
    "a model to unlearn in": "Trainer(**Q).unlearn(None, model=other.LightningModule())",
    "a datamodule to forget from": "RemovalDataModule(other.LightningDataModule(), [1])",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", MIXTURES)
def test_a_mixture_is_refused_in_one_sentence(what: str) -> None:
    code = f"""
import warnings; warnings.simplefilter("ignore")
import pytorch_lightning as pl, lightning as other
from pytorch_lightning.demos.boring_classes import BoringModel
from lightning.pytorch.demos.boring_classes import BoringModel as theirs
from lightning_muter import *
Q = dict(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
{MIXTURES[what]}
"""
    done = run("-c", code)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "ConfigurationError: the " in last, done.stderr[-2000:]
    assert "is of the package 'lightning', lightning_muter was loaded with" in last


@pytest.mark.parametrize(("package", "found"), [("lightning", "lightning.pytorch"), ("pl", "")])
def test_the_environment_names_the_package(package: str, found: str) -> None:
    code = "from lightning_muter.lightning.flavour import pl; print(pl.__name__)"
    done = run("-c", code, LIGHTNING_MUTER_PACKAGE=package)
    if found:
        assert done.stdout.strip() == found, done.stderr[-2000:]
    else:
        assert "'pl' must be one of ['lightning', 'pytorch_lightning']" in done.stderr


@pytest.mark.slow
def test_the_command_line_names_the_variable_where_a_class_is_of_the_other_package() -> None:
    root = Path(__file__).parents[2]
    words = ["fit", "-c", "examples/digits.yaml", "-c", "muter_l2"]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "lightning_muter", *words],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": path, "LIGHTNING_MUTER_PACKAGE": "lightning"},
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "loaded with 'lightning': set LIGHTNING_MUTER_PACKAGE" in last
