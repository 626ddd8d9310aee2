"""Whether a record of docs/results is what the code gives today: one seed, one number of removals.

python benchmarks/reproduce.py --data PATH covtype_logistic_l2 covtype_ridge_l2

Runs the record's own configuration (examples/experiments) for seed 0 and the least removals, and
prints the largest difference of every metric over the methods, seconds and bytes left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from pathlib import Path

import torch
from common import arguments

from lightning_muter.evaluation.commands import evaluate
from lightning_muter.evaluation.results_table import Table

ROOT = Path(__file__).parents[1]
_OF_THE_MACHINE = ("seconds", "bytes")


def differences(name: str, data: str) -> dict[str, object]:
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
    large = {metric: float(f"{v:.2g}") for metric, v in found.items() if not v < 1e-6}
    return {
        "record": name,
        "removed": removed,
        "values compared": compared,
        "not in the record": len(missing),
        "largest difference": float(f"{max(found.values(), default=math.nan):.2g}"),
        "metrics above 1e-6": large,
    }


def main() -> None:
    """Print one JSON line a record."""
    parser = arguments(__doc__ or "")
    parser.add_argument("records", nargs="+", help="folders of docs/results")
    given = parser.parse_args()
    for name in given.records:
        print(json.dumps(differences(name, given.data)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
