"""The command line: fit, then unlearn as another process would, with stacked presets."""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save_file

from lightning_muter import ConfigurationError, MUterCallback, RemovalError, UnlearningMemory
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
    again = ["--ckpt_path", "runs/memory/model.ckpt"]
    main(["unlearn", *CONFIG, *removal, *again, "--indices", "[6]"])
    ledger = UnlearningMemory.load("runs/memory").ledger
    assert [entry["indices"] for entry in ledger] == [[3, 17], [5], [6]]
    main(["verify", "runs/memory"])
    assert "3 requests, 4 points forgotten: whole" in capsys.readouterr().out
    main(["report", "runs/memory", "--output", "report.html"])
    assert "4 training points in" in " ".join(Path("report.html").read_text().split())
    main(["export", "--memory", "runs/memory", "--output", "exported.ckpt"])
    weights = [
        torch.load(path, weights_only=True)["state_dict"]["classifier.weight"]
        for path in ("runs/last.ckpt", "forgotten.ckpt", "exported.ckpt")
    ]
    assert not torch.equal(weights[0], weights[1])
    last = UnlearningMemory.load("runs/memory").omega[: weights[2].numel()]
    torch.testing.assert_close(weights[2].flatten(), last.to(weights[2]))
    passing = (".lock", "-wal", "-shm")
    folder = Path("runs/memory")
    kept = sorted(path for path in folder.iterdir() if not path.name.endswith(passing))
    before = [path.read_bytes() for path in kept]
    with pytest.raises(ConfigurationError, match="nothing can be saved"):
        main(
            ["unlearn", *CONFIG, *removal, *again, "--output", "no/where.ckpt", "--indices", "[7]"]
        )
    with pytest.raises(RemovalError, match="forgotten already"):
        main(["unlearn", *CONFIG, *removal, *again, "--indices", "[6]"])
    assert [path.read_bytes() for path in kept] == before
    main(["unlearn", *CONFIG, *removal, *again, "--indices", "6", "--already", "skip"])
    assert "already: [6]" in capsys.readouterr().out
    assert [path.read_bytes() for path in kept] == before
    for named in ("p17", "[p17,p4]", "17"):
        with pytest.raises(RemovalError, match="keeps no ids"):
            main(["unlearn", *CONFIG, *removal, *again, "--ids", named])
    with pytest.raises(ConfigurationError, match="no checkpoint"):
        main(["unlearn", *CONFIG, *removal, "--ckpt_path", "nowhere.ckpt", "--indices", "[7]"])
    with pytest.raises(RemovalError, match="holds no points"):
        main(["unlearn", *CONFIG, *removal, "--points", "config.yaml"])
    data = importlib.import_module("examples.digits").DigitsData()
    data.setup("fit")
    x, target = data.train_dataloader().dataset[:2]
    save_file({"x": x, "target": target}, "points.safetensors")
    with pytest.raises(ConfigurationError, match="give one of"):
        main(["unlearn", *CONFIG, *removal, "--points", "points.safetensors", "--indices", "9"])
    main(["unlearn", *CONFIG, *removal, "--points", "points.safetensors"])
    main(["rebase", *CONFIG, *removal, "--newton_steps", "0", "--openings", "openings.json"])
    assert "points: " in capsys.readouterr().out
    rebased = UnlearningMemory.load("runs/memory")
    assert all("indices" not in entry for entry in rebased.ledger)
    openings = json.loads(Path("openings.json").read_text())
    assert [one["indices"] for one in openings][:3] == [[3, 17], [5], [6]]
    assert len(openings[3]["indices"]) == 2
    main(["unlearn", *CONFIG, *removal, "--indices", "7"])


def test_a_checkpoint_and_a_config_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No code of the working directory runs because a checkpoint names it."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('ran', 'w').close()\nclass Model: pass\n")
    torch.save({"hyper_parameters": {"_class_path": "evil.Model"}, "state_dict": {}}, "evil.ckpt")
    Path("config.yaml").write_text("mine")
    with pytest.raises((RuntimeError, KeyError, pickle.UnpicklingError)):
        main(["test", *CONFIG, "--ckpt_path", "evil.ckpt"])
    assert not Path("ran").exists() and Path("config.yaml").read_text() == "mine"


@pytest.mark.filterwarnings("ignore:the memory is of a model that was trained already")
def test_build_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    main(["fit", *CONFIG, "--trainer.max_epochs=1"])
    preset = ["-c", str(ROOT / "callbacks" / "muter_l2.yaml")]
    verb = ["build-memory", *CONFIG, *preset]
    with pytest.raises(ConfigurationError, match="random weights: say --ckpt_path"):
        main(verb)
    horizon = ["--trainer.callbacks.init_args.horizon", "null"]
    main([*verb, *horizon, "--ckpt_path", "runs/last.ckpt"])
    main(["unlearn", *CONFIG, "--memory", "runs/memory", "--indices", "[3,17]"])
    assert UnlearningMemory.load("runs/memory").ledger[0]["indices"] == [3, 17]


def test_yaml_names_functions_by_their_import_path() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(MUterCallback, "callback")
    threat = {"class_path": "lightning_muter.L2Ball", "init_args": {"eps": 0.5}}
    given = {"threat": threat, "head": "head", "loss": "criterion"}

    def built(**more: Any) -> dict[str, Any]:
        value = {"class_path": "lightning_muter.MUterCallback", "init_args": {**given, **more}}
        callback = parser.instantiate_classes(parser.parse_object({"callback": value})).callback
        settings: dict[str, Any] = callback.settings.to_dict()
        return settings

    found = built(batch=["image", "label"], output="logits", forward="score")
    assert (found["batch"], found["output"], found["forward"]) == (
        ["image", "label"],
        "logits",
        "score",
    )
    found = built(batch="people.namespace", output=1, forward="people.ssl_logits")
    assert found["forward"]["path"] == "people:ssl_logits" and found["output"] == 1
    assert found["batch"]["path"] == "people:namespace" and found["loss"] == {
        "attribute": "criterion"
    }
