"""The tidy table of a run: one line a seed × removals × method × metric, in a CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_muter.errors import ConfigurationError

__all__ = ["COLUMNS", "Cell", "Summary", "Table"]

COLUMNS = ("seed", "removed", "share", "method", "metric", "value")


@dataclass(frozen=True)
class Cell:
    """One measured value."""

    seed: int
    removed: int
    share: float
    method: str
    metric: str
    value: float


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over n seeds."""

    mean: float
    std: float
    n: int


class Table:
    """Cells in a CSV file; a group of cells is added in one step or not at all."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.cells: list[Cell] = []
        self._index: dict[tuple[str, int, str], dict[int, float]] = {}
        self._indexed = 0
        if self.path.exists():
            self.cells = _read(self.path)

    def has(self, seed: int, removed: int, method: str) -> bool:
        """Whether a method's metrics are there."""
        return any((c.seed, c.removed, c.method) == (seed, removed, method) for c in self.cells)

    def add(self, cells: Iterable[Cell]) -> None:
        """Append cells and replace the file."""
        self.cells.extend(cells)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for cell in self.cells:
            writer.writerow([getattr(cell, name) for name in COLUMNS])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".csv.new")
        partial.write_text(text.getvalue())
        os.replace(partial, self.path)

    def removals(self) -> list[int]:
        """The numbers of removed points, ascending."""
        return sorted({c.removed for c in self.cells})

    def methods(self) -> list[str]:
        """The methods in the order of their first cell."""
        return list(dict.fromkeys(c.method for c in self.cells))

    def values(self, method: str, removed: int, metric: str) -> dict[int, float]:
        """A metric by seed."""
        for cell in self.cells[self._indexed :]:
            key = (cell.method, cell.removed, cell.metric)
            self._index.setdefault(key, {})[cell.seed] = cell.value
        self._indexed = len(self.cells)
        return dict(self._index.get((method, removed, metric), {}))

    def summary(self, method: str, removed: int, metric: str) -> Summary | None:
        """A metric over the seeds, or None where it was not measured."""
        values = torch.tensor(
            list(self.values(method, removed, metric).values()), dtype=torch.float64
        )
        if len(values) == 0:
            return None
        std = float(values.std()) if len(values) > 1 else 0.0
        return Summary(float(values.mean()), std, len(values))


def _read(path: Path) -> list[Cell]:
    with path.open() as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ConfigurationError(
                f"{path} has columns {reader.fieldnames}, expected {list(COLUMNS)}: it is no table "
                "of an evaluation"
            )
        return [
            Cell(
                int(row["seed"]),
                int(row["removed"]),
                float(row["share"]),
                row["method"],
                row["metric"],
                float(row["value"]),
            )
            for row in reader
        ]
