"""The table and the picture of influence_depth.py's lines, and of influence_relu.py's.

Writes RECORD.jsonl, RECORD.csv and RECORD.png into ``--output``, and prints a markdown table: mean
over seeds, and their range.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import influence_relu
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
SINGLE, TENTH = "leave one out, Pearson", "LDS"
STYLES = {
    **dict(
        zip(
            FUNCTIONS,
            (
                ("#b2182b", "o", "-"),
                ("#2166ac", "s", "--"),
                ("#92c5de", "D", ":"),
                ("#4d4d4d", "^", "-."),
                ("#e08214", "v", "--"),
            ),
            strict=True,
        )
    ),
    influence_relu.AGAIN: ("#7fbf7b", "P", "-"),
    ITSELF: ("#c7c7c7", "x", "-"),
}


@dataclass(frozen=True)
class Record:
    """What a table has rows and columns of.

    Attributes:
        depths: what was trained.
        yardsticks: a column each.
        rows: functions, and what else stands in the place of a prediction.
        prefix: of the CSV file's metrics.
    """

    depths: Sequence[str]
    yardsticks: Sequence[str]
    rows: Sequence[str]
    prefix: str = ""

    def metric(self, depth: str, yardstick: str) -> str:
        """What the CSV file calls a column of a depth."""
        return f"{self.prefix}{SHORT[depth]}_{SHORT[yardstick]}"


RECORDS = {
    "influence_depth": Record(tuple(DEPTHS), YARDSTICKS, (*FUNCTIONS, ITSELF)),
    "influence_relu": Record(
        tuple(influence_relu.DEPTHS),
        influence_relu.YARDSTICKS,
        (*FUNCTIONS, influence_relu.AGAIN, ITSELF),
        "relu2_",
    ),
}


def cells(lines: Iterable[dict[str, Any]]) -> Iterable[Cell]:
    """Leave one out at 1 point, LDS at a tenth of them."""
    for line in lines:
        metric = f"{SHORT[line['depth']]}_{SHORT[line['yardstick']]}"
        if "activation" in line:
            metric = f"{line['activation']}{line['rounds']}_{metric}"
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


def markdown(table: Table, record: Record) -> str:
    """A row a depth and function, a column a yardstick: leave one out / LDS."""
    removals = table.removals()
    rows = ["| what is trained | function | " + " | ".join(record.yardsticks) + " |"]
    rows.append("|---" * (2 + len(record.yardsticks)) + "|")
    for depth in record.depths:
        for function in record.rows:
            metrics = [record.metric(depth, one) for one in record.yardsticks]
            found = [[entry(table, function, m, metric) for m in removals] for metric in metrics]
            columns = " | ".join(" / ".join(both) for both in found)
            rows.append(f"| {depth} | {function} | {columns} |")
    return "\n".join(rows)


def picture(table: Table, record: Record, path: Path) -> None:
    """A correlation against depth: a line a function, a column a yardstick."""
    plt = pyplot()
    removals = table.removals()
    shape = len(removals), len(record.yardsticks)
    figure, axes = plt.subplots(*shape, figsize=(10, 5.6), sharex=True, sharey=True, squeeze=False)
    names = [name.replace(" of ", "\nof ").replace(", ", ",\n") for name in record.depths]
    for line, removed in zip(axes, removals, strict=True):
        for axis, yardstick in zip(line, record.yardsticks, strict=True):
            metrics = [record.metric(depth, yardstick) for depth in record.depths]
            for function in record.rows:
                curve(axis, table, (function, removed), metrics)
            axis.set_xticks(range(len(names)), names, fontsize=7)
            axis.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
            axis.set_ylim(-0.3, 1.05)
    for axis, yardstick in zip(axes[0], record.yardsticks, strict=True):
        axis.set_title(yardstick, fontsize=9)
    for line, label in zip(axes, ("leave one out (Pearson)", "a tenth (LDS)"), strict=True):
        line[0].set_ylabel(label, fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curve(axis: Any, table: Table, key: tuple[str, int], metrics: Sequence[str]) -> None:
    """Means over seeds, with bars from the lowest to the highest, a metric a place."""
    function, removed = key
    places, means, low, high = [], [], [], []
    for place, metric in enumerate(metrics):
        found = list(table.values(function, removed, metric).values())
        if found:
            mean = sum(found) / len(found)
            places.append(place)
            means.append(mean)
            low.append(mean - min(found))
            high.append(max(found) - mean)
    colour, marker, dash = STYLES[function]
    axis.errorbar(
        places, means, yerr=[low, high], color=colour, marker=marker, linestyle=dash,
        label=function, markersize=4, linewidth=1.2, capsize=2,
    )  # fmt: skip


def main() -> None:
    """Collect lines; without any files draw what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", help="output of the record's script")
    parser.add_argument("--record", choices=list(RECORDS), default="influence_depth")
    parser.add_argument("--output", type=Path, default=Path("docs/results/audits"))
    given = parser.parse_args()
    record, stem = RECORDS[given.record], given.output / given.record
    table = Table(stem.with_suffix(".csv"))
    if given.files:
        text = "".join(path.read_text() for path in given.files)
        lines = [json.loads(line) for line in text.splitlines()]
        table.path.unlink(missing_ok=True)
        table = Table(table.path)
        table.add(cells(lines))
        stem.with_suffix(".jsonl").write_text(text)
    print(markdown(table, record))
    picture(table, record, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
