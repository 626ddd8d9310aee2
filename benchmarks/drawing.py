"""What the pictures of pictures.py are drawn with: colours, axes, curves of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from lightning_muter.evaluation import Table

matplotlib.use("Agg")

from matplotlib import pyplot, ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "docs" / "results"
BASELINES = ("newton", "newton_delta", "fisher", "fisher_delta", "influence", "influence_delta")
RELATIVE = "distance_relative"
LENGTH = "distance to Retrain\n(1 = none, unchanged)"
#: Okabe and Ito's colours, told apart by marker and dash as well: colour, marker, dash, label
LOOKS = {
    "muter": ("#000000", "o", "-", "muter"),
    "muter_horizon": ("#0072B2", "D", "-", "muter, horizon"),
    "muter_unconstrained": ("#D55E00", "s", "--", "muter, unconstrained"),
    "muter_features": ("#56B4E9", "X", "--", "muter, features"),
    "muter_corrected_1": ("#0072B2", "D", "--", "muter, 1 corrector step"),
    "muter_corrected_3": ("#56B4E9", "P", "-.", "muter, 3 corrector steps"),
    "muter_successive": ("#0072B2", "D", "--", "muter, one after the other"),
    "newton_delta": ("#E69F00", "^", "-.", "newton_delta"),
    "newton_delta_horizon": ("#E69F00", "v", "-.", "newton_delta, horizon"),
    "fisher_delta_successive": ("#CC79A7", "v", "-.", "fisher_delta, one after the other"),
    "adversarial_Hessian": ("#D55E00", "s", "--", "Hessian of adversarial training"),
    "adversarial_training": ("#56B4E9", "X", "--", "taken for adversarial training"),
    "retrain": ("#009E73", "d", "-", "Retrain"),
    "none": ("#777777", "*", ":", "none"),
    "dense": ("#000000", "o", "-", "matrix"),
    "rows": ("#0072B2", "D", "--", "rows"),
}


def table(name: str) -> Table:
    return Table(RESULTS / name / "results.csv")


def panels(count: int, height: float = 2.5, width: float = 2.5) -> tuple[Figure, list[Axes]]:
    """Axes beside each other, four of them in two rows."""
    lines = 2 if count == 4 else 1
    size = (max(3.6, width * count / lines), (height + 0.2) * lines + 0.3)
    figure, axes = pyplot.subplots(
        lines, count // lines, figsize=size, layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def style(method: str) -> dict[str, Any]:
    colour, marker, dash, label = LOOKS[method]
    return {"color": colour, "marker": marker, "ls": dash, "label": label, "ms": 4, "lw": 1.2}


def legend(figure: Figure, columns: int = 3) -> None:
    """One of all axes below them, each label once."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= {k: v for k, v in zip(labels, handles, strict=True) if k not in found}
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=7,
        frameon=False,
    )  # fmt: skip


def percent(axis: Axes, shares: Sequence[float]) -> None:
    """A logarithmic axis of the share removed, as the least and the largest ask."""
    axis.set_xscale("log")
    axis.set_xlabel("points removed (%)", fontsize=8)
    decades = [10.0**k for k in range(-2, 2) if min(shares) <= 10.0**k <= max(shares)]
    ends = [s for s in (min(shares), max(shares)) if all(abs(s / d - 1) > 0.6 for d in decades)]
    axis.set_xticks(sorted({*decades, *ends}), [f"{s:.2g}" for s in sorted({*decades, *ends})])
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())


def plain(axis: Axis, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis as numbers, where they are within its limits."""
    low, high = sorted(axis.get_view_interval())
    shown = [v for v in values if low <= v <= high]
    axis.set_ticks(shown, [f"{v:g}" for v in shown])
    axis.set_minor_formatter(ticker.NullFormatter())


def curves(axis: Axes, source: Table, methods: Sequence[str], metric: str = RELATIVE) -> None:
    """A metric against the share removed, the six baselines as one band."""
    share = {c.removed: 100 * c.share for c in source.cells}
    removals = source.removals()
    x = [share[m] for m in removals]

    def means(method: str) -> list[float]:
        found = [source.summary(method, m, metric) for m in removals]
        return [float("nan") if one is None else one.mean for one in found]

    if set(BASELINES) <= set(source.methods()):
        of_all = [means(name) for name in BASELINES]
        low, high = ([pick(v) for v in zip(*of_all, strict=True)] for pick in (min, max))
        axis.fill_between(x, low, high, color="#E69F00", alpha=0.35, lw=0, label="six baselines")
    for method in methods:
        if method not in source.methods():
            continue
        values = [list(source.values(method, m, metric).values()) for m in removals]
        axis.fill_between(
            x, [min(v) for v in values], [max(v) for v in values],
            color=LOOKS[method][0], alpha=0.15, lw=0,
        )  # fmt: skip
        axis.plot(x, means(method), **style(method))
    percent(axis, x)


def distances(
    records: Sequence[tuple[str, str]], methods: Sequence[str], columns: int = 3
) -> Figure:
    """A panel a record: distance to Retrain relative to none, both axes logarithmic."""
    width = {1: 4.4, 3: 2.3}.get(len(records), 3.0)
    figure, axes = panels(len(records), 2.5 if len(records) < 4 else 2.0, width)
    for axis, (name, title) in zip(axes, records, strict=True):
        curves(axis, table(name), methods)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=8)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(LENGTH, fontsize=8)
        if not axis.get_subplotspec().is_last_row():
            axis.set_xlabel("")
    legend(figure, columns)
    return figure


def dumbbells(
    rows: Sequence[tuple[str, str, int]], methods: Sequence[str], label: str, columns: int = 3
) -> Figure:
    """A line a record, a mark a method at one number of removals, the bar the seeds' range."""
    figure, (axis,) = panels(1, 0.32 * len(rows) + 0.7, 6.4)
    for at, (name, _, removed) in enumerate(rows):
        source = table(name)
        for method in methods:
            values = list(source.values(method, removed, RELATIVE).values())
            if values:
                shown = style(method) | {"ls": "", "ms": 6}
                axis.plot([min(values), max(values)], [at, at], color=shown["color"], lw=1.2)
                axis.plot(sum(values) / len(values), at, **shown)
    axis.axvline(1.0, color="#777777", ls=":", lw=1.2, label="none (unchanged)")
    axis.set_yticks(range(len(rows)), [title for _, title, _ in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel(label, fontsize=8)
    legend(figure, columns)
    return figure
