"""The command line: fit, then unlearn as another process would, with stacked presets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_muter import ConfigurationError, RemovalError, UnlearningMemory
from lightning_muter.lightning.cli import main

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "callbacks").glob("*.yaml"))
CONFIG = ["-c", str(ROOT / "examples" / "digits.yaml")]


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-muter"])


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_stack(
    preset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *CONFIG, "-c", str(preset), "--print_config"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert "ModelCheckpoint" in printed and "MUterCallback" in printed


@pytest.mark.parametrize("verb", ["fit", "unlearn", "validate", "test", "predict"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*")
def test_fit_then_unlearn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    main(
        ["fit", *CONFIG, "-c", str(ROOT / "callbacks" / "muter_l2.yaml"), "--trainer.max_epochs=1"]
    )
    removal = ["--memory", "runs/memory"]
    named = ["--ckpt_path", "runs/last.ckpt", "--output", "forgotten.ckpt"]
    main(["unlearn", *CONFIG, *removal, *named, "--indices", "[3,17]"])
    assert "no certificate" in capsys.readouterr().out
    main(["unlearn", *CONFIG, *removal, "--indices", "[5]"])  # from the memory's own model.ckpt
    again = ["--ckpt_path", "runs/memory/unlearned.ckpt"]
    main(["unlearn", *CONFIG, *removal, *again, "--indices", "[6]"])
    lines = Path("runs/memory/ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["indices"] for line in lines] == [[3, 17], [5], [6]]
    weights = [
        torch.load(path, weights_only=True)["state_dict"]["classifier.weight"]
        for path in ("runs/last.ckpt", "forgotten.ckpt", "runs/memory/unlearned.ckpt")
    ]
    assert not torch.equal(weights[0], weights[1])
    last = UnlearningMemory.load("runs/memory").omega[: weights[2].numel()]
    torch.testing.assert_close(weights[2].flatten(), last.to(weights[2]))
    before = {path.name: path.read_bytes() for path in Path("runs/memory").iterdir()}
    with pytest.raises(ConfigurationError, match="cannot be saved"):
        main(
            ["unlearn", *CONFIG, *removal, *again, "--output", "no/where.ckpt", "--indices", "[7]"]
        )
    with pytest.raises(RemovalError, match="forgotten already"):
        main(["unlearn", *CONFIG, *removal, *again, "--indices", "[6]"])
    assert {path.name: path.read_bytes() for path in Path("runs/memory").iterdir()} == before
    with pytest.raises(ConfigurationError, match="no checkpoint"):
        main(["unlearn", *CONFIG, *removal, "--ckpt_path", "nowhere.ckpt", "--indices", "[7]"])
