"""The noise of probes that a request tells, against the error that exact responses show."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from lightning_muter import L2Ball
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.spec import Settings
from lightning_muter.unlearning.points import Batch, unweighted
from lightning_muter.unlearning.request import Outcome, forget, forget_rows
from lightning_muter.unlearning.sketch_noise import noise_warning, probes_for
from lightning_muter.unlearning.stage_one import build_memories

N, D, FEATURES, CLASSES = 160, 12, 10, 4
GONE = [3, 50, 99]
BASE = Settings(
    method="muter",
    threat=L2Ball(0.4),
    head="2",
    solver="direct",
    weight_decay=0.02,
    solver_tol=1e-10,
)
SEEDS = (0, 1, 2)
KINDS = {
    "constrained": BASE,
    "unconstrained": replace(BASE, response="unconstrained", neumann_order=1, damping=200.0),
    "early": replace(BASE, horizon=0.02),
}


@cache
def problem(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(D, FEATURES), nn.Tanh(), nn.Linear(FEATURES, CLASSES))
    return net.double().eval(), torch.randn(N, D).double(), torch.randint(0, CLASSES, (N,))


@cache
def built(kind: str, seed: int, sketch: int, representation: str) -> UnlearningMemory:
    net, x, y = problem(seed)
    settings = replace(KINDS[kind], sketch=sketch, representation=representation)
    digests, p = torch.zeros(N, 16, dtype=torch.uint8), CLASSES * (FEATURES + 1)
    ones = torch.ones(N, dtype=torch.float64)
    parts = [torch.arange(k, k + 40) for k in range(0, N, 40)]
    batches = [Batch(x[some], y[some], ones[some], some) for some in parts]
    initial = torch.zeros(p, dtype=torch.float64)
    (memory,) = build_memories(net, [settings], batches, digests, bytes(16), initial=initial)
    return memory


def request(memory: UnlearningMemory, seed: int) -> Outcome:
    net, x, y = problem(seed)
    if isinstance(memory.curvature, RowsCurvature):
        return forget_rows(memory, GONE)
    return forget(memory, memory.settings.view(net), GONE, x[GONE], y[GONE])


def error(kind: str, seed: int, sketch: int, representation: str) -> tuple[float, float]:
    """What a request says of its noise, and the error that it has beside exact responses."""
    sketched = request(built(kind, seed, sketch, representation), seed)
    exact = request(built(kind, seed, 0, "dense"), seed)
    update, wanted = sketched.solution.value, exact.solution.value
    assert sketched.sketch_noise is not None and exact.sketch_noise is None
    return sketched.sketch_noise, float((update - wanted).norm() / update.norm())


def size(values: list[float]) -> float:
    return math.sqrt(sum(one**2 for one in values) / len(values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sketch", [1, 8])
def test_the_noise_that_a_request_of_rows_tells_is_the_error_that_it_has(
    kind: str, sketch: int
) -> None:
    pairs = [error(kind, seed, sketch, "rows") for seed in SEEDS]
    told, true = (size(list(some)) for some in zip(*pairs, strict=True))
    assert true / 2 <= told <= 2 * true
    if kind == "constrained":
        for one, other in pairs:
            assert other / 2 <= one <= 2 * other


@pytest.mark.parametrize("sketch", [1, 8])
def test_a_matrix_tells_the_noise_that_its_sample_of_points_has(sketch: int) -> None:
    pairs = [error("constrained", seed, sketch, "dense") for seed in SEEDS]
    told, true = (size(list(some)) for some in zip(*pairs, strict=True))
    assert true / 2 <= told <= 2 * true
    for seed, (told, _) in zip(SEEDS, pairs, strict=True):
        assert built("constrained", seed, sketch, "dense").summary["sketch_noise"] == told
        rows = built("constrained", seed, sketch, "rows").summary["sketch_noise"]
        assert rows / 2 <= told <= 2 * rows


def test_a_sketch_that_is_too_noisy_is_in_doubt_and_says_how_many_probes_would_do() -> None:
    few, many = (built("constrained", 0, sketch, "rows") for sketch in (1, 8))
    assert few.summary["sketch_noise"] > 0.1 > many.summary["sketch_noise"]
    assert [said for said in few.warnings if "sketch=" in said]
    assert not [said for said in many.warnings if "probe" in said]
    assert not [said for said in request(few, 0).warnings if "probe" in said]  # the memory's, once
    unsaid = replace(few, summary={})
    (said,) = [said for said in request(unsaid, 0).warnings if "probe" in said]
    noise = request(unsaid, 0).sketch_noise
    assert noise is not None and said == noise_warning(noise, 1)
    assert f"sketch={probes_for(noise, 1)}," in said and request(few, 0).sketch_noise == noise


def test_exact_rows_and_other_methods_have_no_noise() -> None:
    net, x, y = problem(0)
    settings = replace(BASE, head="0", sketch=1, representation="rows")
    linear = nn.Sequential(nn.Linear(D, CLASSES)).double()
    digests, everyone = torch.zeros(N, 16, dtype=torch.uint8), unweighted(x, y)
    (memory,) = build_memories(linear, [settings], [everyone], digests, bytes(16))
    assert "sketch_noise" not in memory.summary and forget_rows(memory, GONE).sketch_noise is None
    clean = replace(settings, method="newton", head="2")
    (memory,) = build_memories(net, [clean], [everyone], digests, bytes(16))
    assert "sketch_noise" not in memory.summary and forget_rows(memory, GONE).sketch_noise is None


def test_the_coins_of_a_point_are_its_own() -> None:
    rows = built("constrained", 0, 8, "rows").curvature
    assert isinstance(rows, RowsCurvature)
    whole, part = rows.resampled(), rows.without(GONE).resampled()
    assert whole is not None and part is not None
    kept = ~whole.blocks[0].are_of(GONE)
    assert torch.equal(whole.blocks[0].coefficients[kept], part.blocks[0].coefficients)
    share = whole.blocks[0].coefficients * 8
    assert set(share.unique().tolist()) == {0.0, 2.0}
    assert abs(float(share.mean()) - 1) < 0.05  # 1,280 coins
