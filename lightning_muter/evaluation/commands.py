"""The commands evaluate, plot and tables of the command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

from lightning_muter.errors import ConfigurationError
from lightning_muter.evaluation.experiment import Experiment
from lightning_muter.evaluation.markdown import render, update_tables
from lightning_muter.evaluation.plots import plot_comparison, plot_pareto
from lightning_muter.evaluation.results_table import Cell, Table
from lightning_muter.evaluation.runner import run
from lightning_muter.lightning.flavour import pl
from lightning_muter.lightning.parsing import CommandParser

__all__ = ["COMMANDS", "DATA_VARIABLE"]

#: where experiments look for data files
DATA_VARIABLE = "MUTER_DATA"


def evaluate(args: Sequence[str]) -> None:
    """Run a declared experiment, or what is missing of it."""
    parser = CommandParser(
        prog="lightning-muter evaluate",
        description="Run a declared experiment, or what is missing of it.",
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="the experiment's YAML")
    parser.add_class_arguments(Experiment, as_group=False)
    parser.add_argument(
        "--output", type=str, required=True, help="the run's folder: its table, its heads"
    )
    parser.add_argument(
        "--data", type=str | None, default=None, help="where the experiment's data files are"
    )
    parser.add_argument(
        "--logger",
        type=pl.loggers.Logger | None,
        default=None,
        help="a Lightning logger for live metrics",
    )
    config = parser.parse_args(list(args))
    if config.data is not None:
        os.environ[DATA_VARIABLE] = config.data
    given = parser.instantiate_classes(config).as_dict()
    output, logger = given.pop("output"), given.pop("logger")
    for name in ("config", "data"):
        given.pop(name, None)
    table = run(Experiment(**given), output, _live(logger))
    print(render(table, "distance_relative", table.removals(), table.methods()))


def _live(logger: pl.loggers.Logger | None) -> Callable[[list[Cell]], None] | None:
    if logger is None:
        return None

    def log(cells: list[Cell]) -> None:
        metrics = {f"{c.method}/{c.metric}/seed{c.seed}": c.value for c in cells}
        logger.log_metrics(metrics, step=cells[0].removed)
        logger.save()

    return log


def plot(args: Sequence[str]) -> None:
    """Draw the plots of a run beside its table."""
    parser = CommandParser(
        prog="lightning-muter plot", description="Draw the plots of a run beside its table."
    )
    parser.add_argument("results", type=str, help="a run's folder, or its results.csv")
    parser.add_argument("--title", type=str, default="", help="what stands above the plots")
    given: Any = parser.parse_args(list(args))
    path = Path(given.results)
    path = path / "results.csv" if path.is_dir() else path
    if not path.is_file():
        raise ConfigurationError(f"there is no table {path}: give the folder of a run")
    table = Table(path)
    comparison = path.with_name("comparison.png")
    print(plot_comparison(table, comparison, given.title, score=_score(path.with_name("run.json"))))
    print(plot_pareto(table, path.with_name("pareto.png"), given.title))


def _score(run: Path) -> str:
    """What a run's clean and robust metrics are, by its loss."""
    loss = json.loads(run.read_text())["experiment"]["loss"] if run.exists() else ""
    return "loss" if "squared" in loss else "accuracy"


def tables(args: Sequence[str]) -> None:
    """Regenerate the tables of markdown files from the CSV files of runs."""
    parser = CommandParser(
        prog="lightning-muter tables", description="Regenerate tables of markdown files."
    )
    parser.add_argument("files", type=str, nargs="+", help="markdown files with tables in them")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if not current")
    given: Any = parser.parse_args(list(args))
    stale = update_tables(given.files, given.check)
    for name in stale:
        print(f"{name}: tables {'are not current' if given.check else 'updated'}")
    if stale and given.check:
        sys.exit(1)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "evaluate": evaluate,
    "plot": plot,
    "tables": tables,
}
