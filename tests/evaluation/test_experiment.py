"""A declared experiment through the command line: ranking, resuming, plots and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import Data, Net

from lightning_muter import ConfigurationError, L2Ball
from lightning_muter.evaluation import Cell, Experiment, Row, Table, run, runner
from lightning_muter.evaluation.markdown import update_tables
from lightning_muter.lightning.cli import main

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "examples" / "experiments" / "digits.yaml")


@pytest.mark.slow
def test_digits_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    output = tmp_path / "digits"
    main(["evaluate", "-c", CONFIG, "--output", str(output), "--shadows", "2"])
    table = Table(output / "results.csv")
    assert table.removals() == [1, 10, 72] and len(table.methods()) == 11
    for removed in table.removals():
        muter = table.values("muter", removed, "distance_relative")
        assert set(muter) == {0, 1}
        for method in set(table.methods()) - {"muter", "retrain"}:
            other = table.values(method, removed, "distance_relative")
            assert max(muter.values()) < 0.2 * min(other.values()), (method, removed)
        for seed, bound in table.values("muter", removed, "bound").items():
            assert table.values("muter", removed, "distance")[seed] <= bound
        for value in table.values("retrain", removed, "gradient_norm").values():
            assert value < 1e-6
    main(["plot", str(output), "--title", "digits"])
    assert {"comparison.png", "pareto.png"} <= {path.name for path in output.iterdir()}


def small(seeds: int = 1, **options: object) -> Experiment:
    return Experiment(
        **{  # type: ignore[arg-type]
            "name": "small",
            "module": Net,
            "datamodule": Data,
            "threat": L2Ball(0.3),
            "head": "classifier",
            "rows": [Row(label="muter"), Row(label="newton", method="newton")],
            "removals": [1, "10%"],
            "seeds": seeds,
            "newton_steps": 20,
            "robust_points": 10,
            **options,
        }
    )


def test_a_stopped_run_goes_on_and_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(small(), tmp_path / "whole")

    class Stopped(Exception):
        pass

    groups: list[list[Cell]] = []

    def stop(cells: list[Cell]) -> None:
        groups.append(cells)
        if len(groups) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        run(small(), tmp_path / "parts", stop)
    monkeypatch.setattr(runner._Seed, "_fit", _no_fit(runner._Seed._fit))
    resumed = run(small(), tmp_path / "parts")
    assert len(resumed.cells) == len(whole.cells)
    for one, other in zip(_timeless(whole), _timeless(resumed), strict=True):
        assert (one.removed, one.method, one.metric) == (other.removed, other.method, other.metric)
        assert one.value == pytest.approx(other.value, rel=1e-6, abs=1e-9)
    before = (tmp_path / "parts" / "results.csv").read_bytes()
    run(small(), tmp_path / "parts")
    assert (tmp_path / "parts" / "results.csv").read_bytes() == before


def _no_fit(fit: object) -> object:
    def once(self: object, module: object, keep: torch.Tensor) -> torch.Tensor:
        assert len(keep) == 37  # only the Retrain that the stop left undone
        result: torch.Tensor = fit(self, module, keep)  # type: ignore[operator]
        return result

    return once


def _timeless(table: Table) -> list[Cell]:
    kept = [c for c in table.cells if not c.metric.startswith(("seconds", "disk", "peak"))]
    return sorted(kept, key=lambda c: (c.removed, c.method, c.metric))


def test_another_experiment_is_refused(tmp_path: Path) -> None:
    run(small(removals=[1]), tmp_path)
    with pytest.raises(ConfigurationError, match="threat"):
        run(small(threat=L2Ball(0.2)), tmp_path)


@pytest.mark.parametrize("selection", ["highest_loss", "class:1", "mislabelled:0.2"])
def test_selections(selection: str, tmp_path: Path) -> None:
    seed = runner._Seed.start(small(selection=selection), 0, tmp_path)
    omega = torch.zeros(21, dtype=torch.float64)
    omega[:18] = torch.linspace(-1, 1, 18)
    order = seed.order(omega)
    assert sorted(order.tolist()) == list(range(41))
    labels = seed.train[1]
    if selection == "class:1":
        first = int((labels == 1).sum())
        assert bool((labels[order[:first]] == 1).all())
    elif selection == "highest_loss":
        losses = seed._losses(omega)
        assert bool((losses[order].diff() <= 0).all())
    else:
        truth = Data().dataset.tensors[1]
        wrong = labels != truth
        assert torch.equal(wrong, seed.wrong) and 0 < int(wrong.sum()) < 20
        assert bool(wrong[order[: int(wrong.sum())]].all())


def test_wrong_labels_of_regression_change_sign() -> None:
    y, wrong = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([True, True, False])
    assert runner._mislabel(y, wrong).tolist() == [-1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"selection": "worst"},
        {"selection": "class"},
        {"removals": []},
        {"seeds": 0},
        {"rows": [Row(label="none")]},
        {"rows": [Row(label="a"), Row(label="a")]},
        {"loss": "hinge"},
    ],
)
def test_bad_experiments_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        small(**bad)


@pytest.mark.parametrize("removal", ["many", 0, 41, "200%"])
def test_bad_removals_are_refused(removal: object) -> None:
    with pytest.raises(ConfigurationError, match="removal"):
        small(removals=[removal]).counts(41)


def test_tables_regenerate_and_go_stale(tmp_path: Path) -> None:
    table = Table(tmp_path / "results.csv")
    table.add([Cell(s, 4, 0.1, "muter", "distance_relative", 0.1 + s) for s in (0, 1)])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table results.csv removed=4 -->\nold\n<!-- /table -->\nafter\n")
    assert update_tables([page], check=True) == [str(page)] and "old" in page.read_text()
    assert update_tables([page]) == [str(page)]
    text = page.read_text()
    assert "| muter | 0.6 ± 0.7 |" in text and text.startswith("before") and "after" in text
    assert update_tables([page], check=True) == []
    page.write_text("<!-- table nothing.csv -->\n<!-- /table -->\n")
    with pytest.raises(ConfigurationError, match="existing CSV"):
        update_tables([page])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigurationError, match="columns"):
        Table(tmp_path / "other.csv")


def test_rows_with_a_corrector_and_with_another_threat(tmp_path: Path) -> None:
    rows = [
        Row(label="muter"),
        Row(label="corrected", corrector_steps=3),
        Row(label="wider", threat=L2Ball(0.6)),
    ]
    table = run(small(rows=rows), tmp_path)
    removed = table.removals()[-1]

    def relative(label: str) -> float:
        (value,) = table.values(label, removed, "distance_relative").values()
        return value

    assert relative("corrected") < 1e-2 * relative("muter")
    assert relative("muter") < relative("wider")  # a memory of another threat is a worse one


def test_what_is_recognised_is_measured_beside_retrain(tmp_path: Path) -> None:
    table = run(small(rows=[Row(label="muter")], removals=[4]), tmp_path / "known")
    assert table.values("retrain", 4, "residual_knowledge") == {0: 1.0}
    for method in ("none", "muter"):
        assert 0.5 < table.values(method, 4, "residual_knowledge")[0] < 2.0
        assert 0.0 <= table.values(method, 4, "recognised_again")[0] <= 1.0


def test_requests_one_after_the_other_end_where_one_request_of_all_ends(tmp_path: Path) -> None:
    rows = [Row(label="at_once"), Row(label="successive", request_size=1)]
    table = run(small(rows=rows, removals=[4]), tmp_path)
    at_once, successive = (
        table.values(label, 4, "distance_relative")[0] for label in ("at_once", "successive")
    )
    assert 0 < at_once < 1
    assert successive == pytest.approx(at_once, rel=1e-8)


def test_the_training_attack_starts_where_the_experiment_says(tmp_path: Path) -> None:
    """With one step and no random start training is deterministic FGSM: other heads."""
    options = {"newton_steps": 0, "attack_steps": 1, "attack_step_size": 0.3, "removals": [1]}
    everyone = torch.arange(41)
    heads = [
        runner._Seed.start(small(random_start=start, **options), 0, tmp_path / str(start)).head(
            "trained", everyone
        )[0]
        for start in (True, False)
    ]
    assert not torch.equal(*heads)


def test_a_row_takes_the_horizon_of_training(tmp_path: Path) -> None:
    rows = [Row(label="muter"), Row(label="early", horizon="training")]
    table = run(small(rows=rows, removals=[4], newton_steps=0), tmp_path)
    values = {row.label: table.values(row.label, 4, "distance")[0] for row in rows}
    none = table.values("none", 4, "distance")[0]
    assert values["early"] != pytest.approx(values["muter"], rel=0.1)
    assert values["early"] < none
    kept = json.loads((tmp_path / "heads" / "seed-0-training.json").read_text())
    assert kept["horizon"] > 0
    with pytest.raises(ConfigurationError, match="newton_steps"):
        run(small(rows=rows, removals=[4], newton_steps=3), tmp_path / "other")
