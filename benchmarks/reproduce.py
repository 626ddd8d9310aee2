"""Whether a record of docs/results is what the code gives today: one seed, one number of removals.

    python benchmarks/reproduce.py --data PATH covtype_logistic_l2 covtype_ridge_l2
    python benchmarks/reproduce.py                         # the table of docs/results.md alone

Runs the record's own configuration (examples/experiments) for seed 0 and the least removals, takes
the largest difference of every metric over the methods, seconds and bytes left out, into
docs/results/reproduced.jsonl, and writes the table of docs/results.md anew from that file.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import arguments

from lightning_muter.evaluation.commands import evaluate
from lightning_muter.evaluation.results_table import Table

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results" / "reproduced.jsonl"
PAGE = ROOT / "docs" / "results.md"
#: differences below it are rounding
SMALL = 1e-6
_OF_THE_MACHINE = ("seconds", "bytes")
_TABLE = re.compile(r"(?<=<!-- reproduced -->\n).*?(?=<!-- /reproduced -->)", re.S)


def differences(name: str, data: str) -> dict[str, Any]:
    """By metric, the largest |now - then| over the methods, relative where values are above 1."""
    record = Table(ROOT / "docs" / "results" / name / "results.csv")
    removed = min(record.removals())
    config = str(ROOT / "examples" / "experiments" / f"{name}.yaml")
    with tempfile.TemporaryDirectory() as place:
        asked = ["-c", config, "--seeds", "1", "--removals", f"[{removed}]"]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate([*asked, "--output", place, "--data", data])
        now = Table(Path(place) / "results.csv")
    found: dict[str, float] = {}
    compared, missing = 0, set()
    for cell in now.cells:
        if any(word in cell.metric for word in _OF_THE_MACHINE):
            continue
        then = record.values(cell.method, removed, cell.metric).get(0)
        if then is None:
            missing.add(f"{cell.method} {cell.metric}")
            continue
        same = then == cell.value or (math.isnan(then) and math.isnan(cell.value))
        apart = 0.0 if same else abs(then - cell.value) / max(1.0, abs(then))
        found[cell.metric] = max(found.get(cell.metric, 0.0), apart)
        compared += 1
    large = {metric: float(f"{v:.2g}") for metric, v in found.items() if not v < SMALL}
    return {
        "record": name,
        "removed": removed,
        "values compared": compared,
        "not in the record": len(missing),
        "largest difference": float(f"{max(found.values(), default=math.nan):.2g}"),
        "metrics above 1e-6": large,
        "torch": torch.__version__,
    }


def kept() -> dict[str, dict[str, Any]]:
    """The lines of the file by their record."""
    if not KEPT.exists():
        return {}
    lines = [json.loads(line) for line in KEPT.read_text().splitlines()]
    return {line["record"]: line for line in lines}


def rendered(lines: dict[str, dict[str, Any]]) -> str:
    """A markdown table, a row a record."""
    head = (
        "| record | removed | values compared | largest difference | differ by more than 1e-6 |\n"
    )
    rows = []
    for name, line in sorted(lines.items()):
        apart = sorted(line["metrics above 1e-6"].items(), key=lambda pair: -pair[1])
        shown = [f"{metric} {value:.2g}" for metric, value in apart[:4]]
        more = [f"{len(apart) - 4} more"] if len(apart) > 4 else []
        cells = (name, line["removed"], line["values compared"], line["largest difference"])
        rows.append(
            "| " + " | ".join(str(one) for one in cells) + f" | {', '.join(shown + more)} |"
        )
    return head + "|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def with_table(page: str, lines: dict[str, dict[str, Any]]) -> str:
    """A page with its table anew."""
    return _TABLE.sub(lambda _: rendered(lines), page)


def main() -> None:
    """Print one JSON line a record, and keep it."""
    parser = arguments(__doc__ or "")
    parser.add_argument("records", nargs="*", help="folders of docs/results")
    given = parser.parse_args()
    for name in given.records:
        line = differences(name, given.data)
        print(json.dumps(line), flush=True)
        lines = {**kept(), name: line}
        KEPT.write_text("".join(json.dumps(lines[key]) + "\n" for key in sorted(lines)))
    PAGE.write_text(with_table(PAGE.read_text(), kept()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
