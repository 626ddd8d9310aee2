"""What the comparison draws: means, ranges over the seeds, an inset that hides no curve."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from lightning_muter.evaluation import Table, plots
from lightning_muter.evaluation.plots import plot_comparison, plot_pareto
from lightning_muter.evaluation.results_table import Cell

VALUES = {"none": (1.0, 1.0), "muter": (0.001, 0.004), "retrain": (0.0, 0.0)}


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = Table(tmp_path / "results.csv")
    for metric in ("distance_relative", "clean_test", "robust_test", "seconds"):
        table.add(
            Cell(seed, removed, removed / 1000, method, metric, value * removed)
            for method, values in VALUES.items()
            for seed, value in enumerate(values)
            for removed in (1, 5, 20, 50)
        )
    return table


@pytest.fixture
def kept_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plt, "close", lambda _: None)


def test_bands_are_the_range_over_the_seeds(table: Table, tmp_path: Path, kept_open: None) -> None:
    plot_comparison(table, tmp_path / "c.png")
    first = plt.gcf().axes[0]
    bands = {
        tuple(
            sorted(
                {(round(float(x), 9), round(float(y), 9)) for x, y in band.get_paths()[0].vertices}
            )
        )
        for band in first.collections
    }
    assert ((2.0, 0.02), (2.0, 0.08), (5.0, 0.05), (5.0, 0.2)) in bands
    assert [0.05, 0.125] in [[round(float(y), 9) for y in line.get_ydata()] for line in first.lines]


def test_the_inset_hides_no_curve(table: Table, tmp_path: Path, kept_open: None) -> None:
    plot_comparison(table, tmp_path / "c.png")
    figure = plt.gcf()
    first = figure.axes[0]
    inset = first.child_axes[0]
    figure.canvas.draw()
    bottom = inset.get_window_extent().y0
    highest = max(
        first.transData.transform((x, y))[1]
        for line in first.lines
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    )
    assert highest < bottom
    assert sorted({float(x) for line in inset.lines for x in line.get_xdata()}) == [1.0, 5.0]


def test_pareto_draws_the_range_of_both_axes(table: Table, tmp_path: Path, kept_open: None) -> None:
    plot_pareto(table, tmp_path / "p.png")
    drawn = [
        (
            [round(float(x), 9) for x in line.get_xdata()],
            [round(float(y), 9) for y in line.get_ydata()],
        )
        for line in plt.gcf().axes[0].lines
    ]
    assert ([0.05, 0.2], [0.125, 0.125]) in drawn
    assert ([0.125, 0.125], [0.05, 0.2]) in drawn


def test_thirteen_methods_are_told_apart() -> None:
    styles = plots._style(["none", "retrain", "muter", *(f"method_{k}" for k in range(10))])
    assert len(set(styles.values())) == 13
    assert styles["muter"] == plots._STYLES[0]
