"""The command line: fit, then unlearn as another process would, with stacked presets."""

from __future__ import annotations

import importlib
import json
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save_file

from lightning_muter import ConfigurationError, MUterCallback, RemovalError, UnlearningMemory
from lightning_muter.lightning.cli import main, run
from lightning_muter.lightning.presets import described, folder, with_presets

ROOT = Path(__file__).parents[2]
PRESETS = sorted(path.stem for path in (ROOT / "callbacks").glob("*.yaml"))
#: of training; the others are of a request
CALLBACKS = [preset for preset in PRESETS if preset != "certificate"]
HEAD = "--trainer.callbacks.head=classifier"
CONFIG = ["-c", str(ROOT / "examples" / "digits.yaml")]


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-muter"])


@pytest.mark.parametrize("preset", CALLBACKS)
def test_presets_stack_by_their_names_from_anywhere(
    preset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(["fit", *CONFIG, "-c", preset, HEAD, "--print_config"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert "ModelCheckpoint" in printed and "MUterCallback" in printed
    assert "head: classifier" in printed and "data_range: null" in printed


def test_presets_are_listed_with_what_they_are_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == PRESETS == sorted(described())
    assert all(len(line.split()) > 3 for line in lines[:-1])
    assert lines[-1] == f"folder: {folder()}"
    named = str(folder() / "newton.yaml")
    assert with_presets(["-c", "newton", "--config=newton", "--x", "newton"]) == [
        "-c",
        named,
        f"--config={named}",
        "--x",
        "newton",
    ]
    Path("newton").write_text("trainer: {}")  # a file of one's own comes first
    assert with_presets(["-c", "newton"]) == ["-c", "newton"]


ERRORS = {
    "a preset that is none": (["fit", "-c", "muter_l3"], "did you mean 'muter_l2'"),
    "no config": (["fit"], "the following arguments are required"),
    "no head": (["fit", *CONFIG, "-c", "muter_l2"], "--trainer.callbacks.head=classifier"),
    "an argument that is none": (
        ["fit", *CONFIG, "-c", "muter_l2", "--trainer.dvices=1"],
        "dvices",
    ),
    "a callback without its threat": (
        ["fit", *CONFIG, "--trainer.callbacks+=lightning_muter.MUterCallback"],
        "trainer.callbacks: the following arguments are required: threat",
    ),
    "indices that are none": (
        ["unlearn", *CONFIG, "--memory", "m", "--indices", "x"],
        "indices: 'x' is given",
    ),
    "no memory": (
        ["unlearn", *CONFIG, "--memory", "m", "--indices", "1"],
        "holds no memory.sqlite",
    ),
    "no device": (
        ["fit", *CONFIG, "-c", "muter_l2", HEAD, "--trainer.devices=0"],
        "not a valid input",
    ),
    "no verb": (
        ["forget"],
        "'forget' is no verb: give one of fit, validate, test, predict, "
        "unlearn, rebase, build_memory, evaluate, plot, tables, export, presets, report, verify (",
    ),
    "nobody to forget": (["unlearn", *CONFIG, "--memory", "m"], "--points"),
    "two presets": (["fit", *CONFIG, "-c", "muter_l2", HEAD, "-c", "newton", HEAD], "one preset"),
    "openings in no folder": (
        ["rebase", *CONFIG, "--memory", "m", "--openings", "nowhere/openings.json"],
        "--openings with a file in a folder that exists",
    ),
    "openings of an earlier rebase": (
        ["rebase", *CONFIG, "--memory", "m", "--openings", str(ROOT / "mkdocs.yml")],
        "mkdocs.yml exists",
    ),
    "openings in the folder that they are to be kept out of": (
        ["rebase", *CONFIG, "--memory", ".", "--openings", "openings.json"],
        "outside the memory's folder",
    ),
    "no run": (["plot", "nowhere"], "there is no table"),
    "no folder": (["verify"], "required: memory"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_one_paragraph(
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, expected = ERRORS[what]
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code in (1, 2)
    said = [line for line in capsys.readouterr().err.splitlines() if "lightning-muter" in line]
    assert len(said) == 1 and expected in said[0] and len(said[0]) < 900
    assert "usage" not in said[0]


def test_a_checkpoint_of_objects_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "made_by": Path("x")}, "odd.ckpt")
    asked = ["--memory", "m", "--indices", "1", "--ckpt_path", "odd.ckpt"]
    with pytest.raises(ConfigurationError, match="weights_only"):
        run(["unlearn", *CONFIG, *asked])


@pytest.mark.parametrize("verb", ["fit", "unlearn", "validate", "test", "predict"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run([verb, "--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*")
def test_fit_then_unlearn(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    run(["fit", *CONFIG, "-c", "muter_l2", HEAD, "--trainer.max_epochs=1"])
    removal = ["--memory", "runs/memory"]
    named = ["--ckpt_path", "runs/last.ckpt", "--output", "forgotten.ckpt"]
    run(["unlearn", *CONFIG, *removal, *named, "--indices", "[3,17]"])
    assert "forgot 2 points (muter): converged" in caplog.messages[-1]
    run(["unlearn", *CONFIG, *removal, "--indices", "[5]"])  # from the memory's own model.ckpt
    again = ["--ckpt_path", "runs/memory/model.ckpt"]
    run(["unlearn", *CONFIG, *removal, *again, "--indices", "[6]"])
    ledger = UnlearningMemory.load("runs/memory").ledger
    assert [entry["indices"] for entry in ledger] == [[3, 17], [5], [6]]
    run(["verify", "runs/memory"])
    assert "3 requests, 4 points forgotten: whole" in capsys.readouterr().out
    run(["report", "runs/memory", "--output", "report.html"])
    assert "4 training points in" in " ".join(Path("report.html").read_text().split())
    run(["export", "--memory", "runs/memory", "--output", "exported.ckpt"])
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
        run(["unlearn", *CONFIG, *removal, *again, "--output", "no/where.ckpt", "--indices", "[7]"])
    with pytest.raises(RemovalError, match="forgotten already"):
        run(["unlearn", *CONFIG, *removal, *again, "--indices", "[6]"])
    assert [path.read_bytes() for path in kept] == before
    run(["unlearn", *CONFIG, *removal, *again, "--indices", "6", "--already", "skip"])
    assert "passed over [6], forgotten already" in caplog.messages[-1]
    assert [path.read_bytes() for path in kept] == before
    for named in ("p17", "[p17,p4]", "17"):
        with pytest.raises(RemovalError, match="keeps no ids"):
            run(["unlearn", *CONFIG, *removal, *again, "--ids", named])
    with pytest.raises(ConfigurationError, match="no checkpoint"):
        run(["unlearn", *CONFIG, *removal, "--ckpt_path", "nowhere.ckpt", "--indices", "[7]"])
    with pytest.raises(RemovalError, match="holds no points"):
        run(["unlearn", *CONFIG, *removal, "--points", "config.yaml"])
    data = importlib.import_module("examples.digits").DigitsData()
    data.setup("fit")
    x, target = data.train_dataloader().dataset[:2]
    save_file({"x": x, "target": target}, "points.safetensors")
    with pytest.raises(ConfigurationError, match="give one of"):
        run(["unlearn", *CONFIG, *removal, "--points", "points.safetensors", "--indices", "9"])
    run(["unlearn", *CONFIG, *removal, "--points", "points.safetensors"])
    run(["rebase", *CONFIG, *removal, "--newton_steps", "0", "--openings", "openings.json"])
    assert "rebased to " in caplog.messages[-1]
    rebased = UnlearningMemory.load("runs/memory")
    assert all("indices" not in entry for entry in rebased.ledger)
    openings = json.loads(Path("openings.json").read_text())
    assert stat.S_IMODE(Path("openings.json").stat().st_mode) == 0o600  # salts are secrets
    assert [one["indices"] for one in openings][:3] == [[3, 17], [5], [6]]
    assert len(openings[3]["indices"]) == 2
    run(["unlearn", *CONFIG, *removal, "--indices", "7"])


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*")
def test_robust_accuracy_without_the_preset_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of the preset itself, its callback given once more."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("mine")
    preset = ["-c", "muter_l2", HEAD]
    run(["fit", *CONFIG, *preset, "--trainer.max_epochs=1"])
    kept = "runs/memory/model.ckpt"
    ways = [[*preset, "--ckpt_path", kept], ["--ckpt_path", kept], ["--memory", "runs/memory"]]
    for verb, metric in (("test", "test_robust_acc"), ("validate", "val_robust_acc")):
        capsys.readouterr()
        numbers = []
        for way in ways:
            run([verb, *CONFIG, *way])
            lines = capsys.readouterr().out.splitlines()
            numbers += [line.split()[-2] for line in lines if metric in line]
        assert len(numbers) == 3 and len(set(numbers)) == 1
    assert Path("config.yaml").read_text() == "mine"


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
        run(["test", *CONFIG, "--ckpt_path", "evil.ckpt"])
    assert not Path("ran").exists() and Path("config.yaml").read_text() == "mine"


@pytest.mark.filterwarnings("ignore:the memory is of a model that was trained already")
def test_build_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    run(["fit", *CONFIG, "--trainer.max_epochs=1"])
    preset = ["-c", "muter_l2", HEAD]
    verb = ["build-memory", *CONFIG, *preset]
    with pytest.raises(ConfigurationError, match="random weights: say --ckpt_path"):
        run(verb)
    horizon = ["--trainer.callbacks.init_args.horizon", "null"]
    run([*verb, *horizon, "--ckpt_path", "runs/last.ckpt"])
    run(["unlearn", *CONFIG, "--memory", "runs/memory", "--indices", "[3,17]"])
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
