"""The table and the picture of influence_depth.py's lines.

Writes influence_depth.jsonl, influence_depth.csv and influence_depth.png into ``--output``, and
prints a markdown table: mean over seeds, and their range.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from influence_depth import DEPTHS, FUNCTIONS, ITSELF, YARDSTICKS

from lightning_muter.evaluation.plots import pyplot
from lightning_muter.evaluation.results_table import Cell, Table

#: what the CSV file calls depths and yardsticks
SHORT = {
    "head of 1 layer": "head1",
    "head of 2 layers": "head2",
    "head of 3 layers": "head3",
    "network, whole": "network",
    "Retrain from ω*": "retrain_near",
    "Retrain from the start": "retrain_start",
    "PBRF": "pbrf",
}
ROWS = (*FUNCTIONS, ITSELF)
SINGLE, TENTH = "leave one out, Pearson", "LDS"
STYLES = (
    ("#b2182b", "o", "-"),
    ("#2166ac", "s", "--"),
    ("#92c5de", "D", ":"),
    ("#4d4d4d", "^", "-."),
    ("#e08214", "v", "--"),
    ("#c7c7c7", "x", "-"),
)


def cells(lines: Iterable[dict[str, Any]]) -> Iterable[Cell]:
    """Leave one out at 1 point, LDS at a tenth of them."""
    for line in lines:
        metric = f"{SHORT[line['depth']]}_{SHORT[line['yardstick']]}"
        n = line["n"]
        for removed, name in ((1, SINGLE), (n // 10, TENTH)):
            if name in line:
                yield Cell(line["seed"], removed, removed / n, line["function"], metric, line[name])


def entry(table: Table, function: str, removed: int, metric: str) -> str:
    """The mean, and the range where there are several seeds."""
    found = list(table.values(function, removed, metric).values())
    if not found:
        return "–"
    mean = sum(found) / len(found)
    if len(found) == 1:
        return f"{mean:.2f} (n = 1)"
    return f"{mean:.2f} ({min(found):.2f} to {max(found):.2f})"


def markdown(table: Table) -> str:
    """A row a depth and function, a column a yardstick: leave one out / LDS."""
    removals = table.removals()
    rows = ["| what is trained | function | " + " | ".join(YARDSTICKS) + " |"]
    rows.append("|---" * (2 + len(YARDSTICKS)) + "|")
    for depth in DEPTHS:
        for function in ROWS:
            metrics = [f"{SHORT[depth]}_{SHORT[one]}" for one in YARDSTICKS]
            found = [[entry(table, function, m, metric) for m in removals] for metric in metrics]
            columns = " | ".join(" / ".join(both) for both in found)
            rows.append(f"| {depth} | {function} | {columns} |")
    return "\n".join(rows)


def picture(table: Table, path: Path) -> None:
    """A correlation against depth: a line a function, a column a yardstick."""
    plt = pyplot()
    removals = table.removals()
    figure, axes = plt.subplots(
        len(removals), len(YARDSTICKS), figsize=(10, 5.6), sharex=True, sharey=True, squeeze=False
    )
    names = [name.replace(" of ", "\nof ").replace(", ", ",\n") for name in DEPTHS]
    for line, removed in zip(axes, removals, strict=True):
        for axis, yardstick in zip(line, YARDSTICKS, strict=True):
            for function, (colour, marker, dash) in zip(ROWS, STYLES, strict=True):
                curve(axis, table, (function, removed, yardstick), (colour, marker, dash))
            axis.set_xticks(range(len(names)), names, fontsize=7)
            axis.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
            axis.set_ylim(-0.3, 1.05)
    for axis, yardstick in zip(axes[0], YARDSTICKS, strict=True):
        axis.set_title(yardstick, fontsize=9)
    for line, label in zip(axes, ("leave one out (Pearson)", "a tenth (LDS)"), strict=True):
        line[0].set_ylabel(label, fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curve(axis: Any, table: Table, key: tuple[str, int, str], style: tuple[str, str, str]) -> None:
    """Means over seeds, with bars from the lowest to the highest."""
    function, removed, yardstick = key
    places, means, low, high = [], [], [], []
    for place, depth in enumerate(DEPTHS):
        metric = f"{SHORT[depth]}_{SHORT[yardstick]}"
        found = list(table.values(function, removed, metric).values())
        if found:
            mean = sum(found) / len(found)
            places.append(place)
            means.append(mean)
            low.append(mean - min(found))
            high.append(max(found) - mean)
    colour, marker, dash = style
    axis.errorbar(
        places, means, yerr=[low, high], color=colour, marker=marker, linestyle=dash,
        label=function, markersize=4, linewidth=1.2, capsize=2,
    )  # fmt: skip


def main() -> None:
    """Collect lines; without any files draw what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", help="output of influence_depth.py")
    parser.add_argument("--output", type=Path, default=Path("docs/results/audits"))
    given = parser.parse_args()
    kept, table = (
        given.output / "influence_depth.jsonl",
        Table(given.output / "influence_depth.csv"),
    )
    if given.files:
        text = "".join(path.read_text() for path in given.files)
        lines = [json.loads(line) for line in text.splitlines()]
        table.path.unlink(missing_ok=True)
        table = Table(table.path)
        table.add(cells(lines))
        kept.write_text(text)
    print(markdown(table))
    picture(table, given.output / "influence_depth.png")


if __name__ == "__main__":
    main()
