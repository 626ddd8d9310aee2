"""What docs/results.md claims of the runs that are kept beside it, checked on their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_muter.evaluation import Table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("*/run.json"))
RANDOM_L2 = ("mnist_b_logistic_l2", "covtype_logistic_l2", "mnist_b_ridge_l2", "covtype_ridge_l2")
RANDOM_LINF = tuple(name.replace("_l2", "_linf") for name in RANDOM_L2)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_is_complete_and_can_be_run_again(run: Path) -> None:
    declared = (ROOT / "examples" / "experiments" / f"{run.name}.yaml").read_text()
    assert f"name: {run.name}\n" in declared
    kept = json.loads((run / "run.json").read_text())
    assert kept["experiment"]["name"] == repr(run.name) and kept["machine"]["threads"]
    assert {"results.csv", "comparison.png", "pareto.png"} <= {p.name for p in run.iterdir()}
    table = Table(run / "results.csv")
    seeds = {cell.seed for cell in table.cells}
    assert {"none", "retrain"} < set(table.methods())
    for removed in table.removals():
        for method in table.methods():
            values = table.values(method, removed, "distance_relative")
            assert set(values) == seeds, (method, removed)
        assert set(table.values("none", removed, "distance_relative").values()) == {1.0}
    pages = (ROOT / "docs" / "results.md", ROOT / "README.md")
    assert any(f"examples/experiments/{run.name}.yaml" in page.read_text() for page in pages)


@pytest.mark.parametrize("name", RANDOM_L2 + RANDOM_LINF)
def test_the_constrained_memory_is_nearest_and_the_bands_are_apart(name: str) -> None:
    table = Table(RESULTS / name / "results.csv")
    for removed in table.removals():
        muter = table.values("muter", removed, "distance_relative")
        assert len(muter) == 5
        for method in set(table.methods()) - {"muter", "retrain"}:
            other = table.values(method, removed, "distance_relative")
            assert max(muter.values()) < min(other.values()), (method, removed)


@pytest.mark.parametrize("name", RANDOM_L2)
def test_models_were_trained_to_stationarity(name: str) -> None:
    table = Table(RESULTS / name / "results.csv")
    assert len(table.removals()) == 10
    for removed in table.removals():
        assert max(table.values("retrain", removed, "gradient_norm").values()) < 1e-6
        assert set(table.values("retrain", removed, "stationary").values()) == {1.0}


@pytest.mark.parametrize(
    "name",
    [
        "paper_mnist_b_logistic_fgsm",
        *(f"paper_covtype_{kind}_{by}" for kind in ("logistic", "ridge") for by in ("fgsm", "pgd")),
    ],
)
def test_in_the_paper_s_settings_the_horizon_is_what_helps(name: str) -> None:
    table = Table(RESULTS / name / "results.csv")
    assert len(table.removals()) == 10
    for removed in table.removals()[5:]:  # from 1% on; below, the order of the batches decides
        nearest = table.values("muter_horizon", removed, "distance_relative")
        assert len(nearest) == 5 and max(nearest.values()) < 1
        for method in set(table.methods()) - {"muter_horizon", "retrain"}:
            other = table.values(method, removed, "distance_relative")
            assert all(nearest[seed] < other[seed] for seed in nearest), (method, removed)


def test_on_the_wide_resnet_under_l_infinity_too() -> None:
    table = Table(RESULTS / "cifar10_wrn_linf" / "results.csv")
    for removed in table.removals():
        nearest = table.values("muter_horizon", removed, "distance_relative")
        assert len(nearest) == 3
        for method in set(table.methods()) - {"muter_horizon", "retrain"}:
            other = table.values(method, removed, "distance_relative")
            assert all(nearest[seed] < other[seed] for seed in nearest), (method, removed)
