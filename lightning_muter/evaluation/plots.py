"""Plots of a run: the paper's three rows, and seconds against distance.

matplotlib is an extra: it is imported when a plot is drawn.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_muter.errors import ConfigurationError
from lightning_muter.evaluation.results_table import Table

__all__ = ["plot_comparison", "plot_pareto", "pyplot"]

#: dark to light as they should survive a grey print, told apart by marker and dash as well
_STYLES: tuple[tuple[str, str, str], ...] = (
    ("#000000", "o", "-"),
    ("#0b3c5d", "s", "--"),
    ("#328cc1", "^", "-."),
    ("#7b3294", "v", "-"),
    ("#c2a5cf", "D", "--"),
    ("#a6611a", "P", "-."),
    ("#dfc27d", "X", "-"),
    ("#018571", "<", "--"),
    ("#80cdc1", ">", "-."),
    ("#e08214", "p", "-."),
    ("#5e3c99", "h", "-"),
)
_FIXED = {"none": ("#777777", "*", ":"), "retrain": ("#b2182b", "d", "--")}
#: of the first row's decades, added above its curves for the inset
_INSET_ROOM = 0.65
_ROWS = (
    ("distance_relative", "distance to Retrain\nrelative to none", True),
    ("clean_test", "clean {score}\n(test)", False),
    ("robust_test", "robust {score}\n(test)", False),
)


def pyplot() -> Any:
    """matplotlib.pyplot that needs no screen.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigurationError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _style(methods: list[str]) -> dict[str, tuple[str, str, str]]:
    others = [m for m in methods if m not in _FIXED]
    ordered = sorted(others, key=lambda m: (m != "muter", not m.startswith("muter")))
    cycled = {m: _STYLES[i % len(_STYLES)] for i, m in enumerate(ordered)}
    return {**cycled, **{m: _FIXED[m] for m in methods if m in _FIXED}}


def plot_comparison(
    table: Table,
    path: str | os.PathLike[str],
    title: str = "",
    few: int = 10,
    score: str = "accuracy",
) -> Path:
    """Effectiveness, accuracy and robustness against the share removed.

    A line is the mean over the seeds, its band their range: on a logarithmic axis a deviation may
    reach below zero. Removals of at most ``few`` points are drawn by their count in an inset of the
    first row, above its curves.

    Args:
        table: of a run.
        path: the image to write.
        title: above the figure.
        few: what counts as few removals.
        score: what the clean and robust metrics are: "accuracy", or "loss" for regression.
    """
    plt = pyplot()
    heights = {"height_ratios": (1.5, 1, 1)}
    size = (3.6, 7.6)
    figure, axes = plt.subplots(
        3, 1, figsize=size, sharex=True, layout="constrained", gridspec_kw=heights
    )
    removals = table.removals()
    many = [m for m in removals if m > few] or removals
    little = [m for m in removals if m <= few] if many != removals else []
    for (metric, label, logarithmic), axis in zip(_ROWS, axes, strict=True):
        skip = ("retrain",) if logarithmic else ()
        _curves(table, axis, metric, many, skip, share=True)
        axis.set_ylabel(label.format(score=score), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        if logarithmic:
            axis.set_yscale("log")
    if little:
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(low, high * (high / low) ** _INSET_ROOM)
        inset = axes[0].inset_axes((0.5, 0.66, 0.48, 0.29))
        _curves(table, inset, _ROWS[0][0], little, ("retrain",), share=False)
        inset.set_yscale("log")
        inset.tick_params(labelsize=5)
        inset.set_title("points removed", fontsize=5, pad=2)
    axes[-1].set_xlabel("training points removed (%)", fontsize=8)
    figure.suptitle(title, fontsize=9)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=6, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)
    return Path(path)


def _curves(
    table: Table, axis: Any, metric: str, removals: list[int], skip: tuple[str, ...], share: bool
) -> None:
    shares = {c.removed: 100 * c.share for c in table.cells}
    styles = _style(table.methods())
    for method, (colour, marker, dash) in styles.items():
        found = [(m, table.summary(method, m, metric)) for m in removals]
        kept = [(m, s) for m, s in found if s is not None]
        if method in skip or not kept:
            continue
        x = [shares[m] if share else m for m, _ in kept]
        mean = [s.mean for _, s in kept]
        low, high = zip(*(_range(table, method, m, metric) for m, _ in kept), strict=True)
        axis.plot(x, mean, dash, color=colour, marker=marker, ms=3, lw=1, label=method)
        axis.fill_between(x, low, high, color=colour, alpha=0.1, lw=0)


def _range(table: Table, method: str, removed: int, metric: str) -> tuple[float, float]:
    values = table.values(method, removed, metric).values()
    return min(values), max(values)


def plot_pareto(table: Table, path: str | os.PathLike[str], title: str = "") -> Path:
    """Seconds a request against distance to Retrain relative to none, at the most removals.

    A point is the mean over the seeds, its bars their range.

    Args:
        table: of a run.
        path: the image to write.
        title: above the figure.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(3.6, 3.6), layout="constrained")
    removed = table.removals()[-1]
    for method, (colour, marker, _) in _style(table.methods()).items():
        seconds = table.summary(method, removed, "seconds")
        distance = table.summary(method, removed, "distance_relative")
        if seconds is None or distance is None or method == "retrain":
            continue
        x, y = seconds.mean, distance.mean
        left, right = _range(table, method, removed, "seconds")
        low, high = _range(table, method, removed, "distance_relative")
        axis.plot((left, right), (y, y), color=colour, lw=0.8)
        axis.plot((x, x), (low, high), color=colour, lw=0.8)
        axis.plot(x, y, marker, color=colour, ms=4, label=method)
    axis.axhline(1.0, color="black", lw=0.8, ls=":")
    axis.text(0.99, 1.0, "none", fontsize=6, ha="right", va="bottom", transform=_blend(axis))
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("seconds a request", fontsize=8)
    axis.set_ylabel("distance to Retrain, relative to none", fontsize=8)
    axis.set_title(f"{title} {removed:,} removed".strip(), fontsize=9)
    axis.tick_params(labelsize=7, which="both")
    axis.xaxis.set_minor_formatter("")
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=6, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)
    return Path(path)


def _blend(axis: Any) -> Any:
    from matplotlib.transforms import blended_transform_factory

    return blended_transform_factory(axis.transAxes, axis.transData)
