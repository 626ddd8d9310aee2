"""Stage I against the plain weighted Gram product (p = 784, float64)."""

from __future__ import annotations

import json
import statistics
import time

import torch
from common import Logistic, arguments, one_or_seven

from lightning_muter import L2Ball
from lightning_muter.models import LinearHead
from lightning_muter.objectives.resolve import resolve_objective
from lightning_muter.spec import Settings
from lightning_muter.unlearning.objective import RobustObjective
from lightning_muter.unlearning.points import unweighted


def main() -> None:
    """Print one JSON line."""
    given = arguments(__doc__ or "").parse_args()
    torch.manual_seed(0)
    x, y = one_or_seven(given.data)
    model = Logistic().double()
    derivatives = LinearHead(model, "head", resolve_objective(None, "logistic"))
    settings = Settings(
        method="muter",
        threat=L2Ball(1.0),
        head="head",
        loss="logistic",
        weight_decay=1e-3,
    )
    weights = torch.rand(len(x), dtype=torch.float64)
    gram, stage = [], []
    for _ in range(5):
        start = time.perf_counter()
        x.T @ (x * weights.unsqueeze(1))
        gram.append(time.perf_counter() - start)
        # anew each time: an objective remembers the perturbations of its last pass
        objective = RobustObjective(derivatives, settings.problem(), lambda: [unweighted(x, y)])
        start = time.perf_counter()
        objective.curvature()
        stage.append(time.perf_counter() - start)
    print(
        json.dumps(
            {
                "gram_s": statistics.median(gram),
                "stage_one_s": statistics.median(stage),
                "ratio": statistics.median(s / g for s, g in zip(stage, gram, strict=True)),
            }
        )
    )


if __name__ == "__main__":
    main()
