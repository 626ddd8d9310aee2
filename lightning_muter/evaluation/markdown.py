"""Markdown tables that are regenerated from the CSV files of runs, and checked to be current."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_muter.errors import ConfigurationError
from lightning_muter.evaluation.results_table import Table

__all__ = ["render", "update_tables"]

#: <!-- table FILE metric=NAME removed=1,40 methods=a,b --> ... <!-- /table -->
_BLOCK = re.compile(r"(<!-- table (?P<what>[^>]*?) -->\n)(?P<body>.*?)(<!-- /table -->)", re.S)


def render(table: Table, metric: str, removed: Sequence[int], methods: Sequence[str]) -> str:
    """A markdown table, mean ± standard deviation over the seeds, methods by rows.

    Example:
        >>> from lightning_muter.evaluation import Cell
        >>> table = Table("no-such-file.csv")
        >>> table.cells = [Cell(0, 1, 0.1, "muter", "distance", 0.25)]
        >>> print(render(table, "distance", [1], ["muter"]))
        | distance | 1 (10%) |
        |---|---|
        | muter | 0.25 (n = 1) |
        <BLANKLINE>
    """
    shares = {c.removed: c.share for c in table.cells}
    head = [f"{m:,} ({100 * shares[m]:.2g}%)" for m in removed]
    lines = [f"| {metric} | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for method in methods:
        entries = [_entry(table, method, m, metric) for m in removed]
        lines.append(f"| {method} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def _entry(table: Table, method: str, removed: int, metric: str) -> str:
    found = table.summary(method, removed, metric)
    if found is None:
        return "–"
    if found.n == 1:
        return f"{found.mean:.2g} (n = 1)"
    return f"{found.mean:.2g} ± {found.std:.1g}"


def update_tables(files: Sequence[str | os.PathLike[str]], check: bool = False) -> list[str]:
    """Rewrite every table block of markdown files from its CSV, relative to the file.

    Args:
        files: markdown files.
        check: change nothing.

    Returns:
        The files whose tables were not current.

    Raises:
        ConfigurationError: a block names a file or an option that is not there.
    """
    stale = []
    for name in files:
        path = Path(name)
        text = path.read_text()
        fresh = _BLOCK.sub(lambda match, at=path: _block(match, at), text)  # type: ignore[misc]
        if fresh != text:
            stale.append(str(path))
            if not check:
                path.write_text(fresh)
    return stale


def _block(match: re.Match[str], path: Path) -> str:
    words = match["what"].split()
    options = dict(word.split("=", 1) for word in words[1:])
    source = path.parent / words[0]
    if not source.exists() or not set(options) <= {"metric", "removed", "methods"}:
        raise ConfigurationError(
            f"{path}: table {match['what']!r} needs an existing CSV file and the options metric=, "
            "removed=, methods="
        )
    table = Table(source)
    removed = [int(m) for m in options["removed"].split(",")] if "removed" in options else None
    methods = options["methods"].split(",") if "methods" in options else table.methods()
    body = render(
        table,
        options.get("metric", "distance_relative"),
        removed or table.removals(),
        methods,
    )
    return f"{match[1]}{body}{match[4]}"
