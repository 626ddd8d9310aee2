"""Rows: the same sum as the matrix, for every loss and dtype, and after every request."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_muter import TRADES, ConfigurationError, L2Ball, LinfBall, StateError, Threat
from lightning_muter.curvature.base import PointFacts
from lightning_muter.curvature.class_blocks import ClassBlocks
from lightning_muter.curvature.class_factors import FullFactor, ThinFactor
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.head import HeadPoints
from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.curvature.rows import RowsCurvature, RowsOptions, RowsSolver
from lightning_muter.linalg.cg import conjugate_gradients
from lightning_muter.linalg.solution import Status
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.objectives.output_curvature import Categorical
from lightning_muter.objectives.resolve import AnyLoss
from lightning_muter.parallel import Group
from lightning_muter.spec import Settings
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.request import forget, forget_rows
from lightning_muter.unlearning.stage_one import build_memories

N, D = 24, 7
LAM = 0.05


def network(outputs: int, bias: bool = True) -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, outputs, bias=bias)
    return nn.Sequential(*layers).double().eval()


#: name -> the loss, its outputs, its targets
LOSSES: dict[str, tuple[AnyLoss, int]] = {
    "cross_entropy": ("cross_entropy", 5),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), 5),
    "logistic": ("logistic", 1),
    "squared": ("squared", 1),
    "several labels": (nn.BCEWithLogitsLoss(), 4),
    "several outputs": (nn.MSELoss(), 3),
}
#: the same with the loss of the clean point beside the divergence
BY_TRADES = {
    "TRADES": ("cross_entropy", 5),
    "TRADES, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), 4),
}
LOSSES |= BY_TRADES
THREATS: dict[str, Threat] = {
    "l2": L2Ball(0.3),
    "l2 range": L2Ball(0.3, data_range=(-3, 3)),
    "linf": LinfBall(0.1, bandwidth=0.02),
}


def targets(loss: str, outputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if loss in ("cross_entropy", "smoothed") or loss in BY_TRADES:
        return torch.randint(0, outputs, (N,), generator=generator)
    if loss in ("logistic", "squared"):
        return torch.randint(0, 2, (N,), generator=generator)
    drawn = torch.rand(N, outputs, generator=generator, dtype=torch.float64)
    return (drawn > 0.5).double() if loss == "several labels" else drawn


def points() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(N, D, generator=generator, dtype=torch.float64).clamp(-2.9, 2.9)


@cache
def built(
    loss: str, threat: str, method: str, representation: str, dtype: str = "float64"
) -> UnlearningMemory:
    value, outputs = LOSSES[loss]
    objective = TRADES(beta=3.0) if loss in BY_TRADES else None
    kept = Settings(
        method=method,
        threat=THREATS[threat],
        head="2",
        loss=value,  # type: ignore[arg-type]
        solver="direct",
        weight_decay=LAM,
        sketch=2,
        representation=representation,
        row_dtype=dtype,
        solver_tol=1e-12 if dtype == "float64" else None,
        objective=objective,
    )
    digests = torch.zeros(N, 16, dtype=torch.uint8)
    x, y = points(), targets(loss, outputs)
    pieces = [unweighted(x[some], y[some]) for some in (slice(7), slice(7, 20), slice(20, N))]
    (memory,) = build_memories(network(outputs), [kept], pieces, digests, bytes(16))
    return memory


def rows_of(memory: UnlearningMemory) -> RowsCurvature:
    assert isinstance(memory.curvature, RowsCurvature)
    return memory.curvature


def columns(rows: RowsCurvature) -> Tensor:
    return torch.stack([rows.matvec(v) for v in torch.eye(rows.p, dtype=torch.float64)], dim=1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


CASES = [
    (loss, threat, method)
    for loss in LOSSES
    for threat in THREATS
    for method in ("muter", "newton_delta", "fisher_delta", "influence")
    if loss not in BY_TRADES or method != "fisher_delta"  # whose outer products are of two inputs
]


@pytest.mark.parametrize(("loss", "threat", "method"), CASES)
def test_rows_equal_the_matrix_and_so_do_their_requests(
    loss: str, threat: str, method: str
) -> None:
    dense, rows = (built(loss, threat, method, kind) for kind in ("dense", "rows"))
    assert isinstance(dense.curvature, DenseCurvature)
    assert relative(columns(rows_of(rows)), dense.curvature.matrix) <= 1e-10
    torch.testing.assert_close(rows.residual_gradient, dense.residual_gradient)
    outputs, gone = LOSSES[loss][1], [0, 9, 23]
    view = dense.settings.view(network(outputs))
    x, y = points()[gone], targets(loss, outputs)[gone]
    by_matrix = forget(dense, view, gone, x, y)
    by_index = forget_rows(rows, gone)
    step = by_matrix.memory.omega - dense.omega_star
    assert relative(by_index.memory.omega - rows.omega_star, step) <= 1e-8
    # the matrix's request finds δ* anew
    assert relative(by_index.memory.gradient, by_matrix.memory.gradient) <= 1e-10
    assert by_index.solution.status is by_matrix.solution.status
    assert by_index.solution.residual <= 1e-11 and by_index.solution.tol == 1e-12
    left = by_matrix.memory.curvature
    assert isinstance(left, DenseCurvature)
    assert relative(columns(rows_of(by_index.memory)), left.matrix) <= 1e-10


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["cross_entropy", "TRADES"]),
    st.permutations(range(N)),
    st.integers(1, N - 1),
    st.integers(1, 5),
)
def test_a_memory_after_requests_is_bit_by_bit_the_rows_of_the_others(
    loss: str, order: list[int], count: int, at_once: int
) -> None:
    memory = built(loss, "l2", "muter", "rows")
    gone = order[:count]
    rows = rows_of(memory)
    for first in range(0, count, at_once):
        rows = rows.without(gone[first : first + at_once])
    whole, left = rows_of(memory).kept(), rows.kept()
    kept = torch.tensor([i not in gone for i in range(N)])
    assert whole.keys() == left.keys()
    for name, tensor in whole.items():
        assert torch.equal(left[name], tensor[kept])
    assert rows.shift == pytest.approx((N - count) * LAM, rel=1e-14)


@pytest.mark.parametrize("loss", ["cross_entropy", "TRADES"])
def test_a_folder_gives_back_the_same_rows(loss: str) -> None:
    rows = rows_of(built(loss, "l2", "muter", "rows"))
    omega = built(loss, "l2", "muter", "rows").omega_star
    again = RowsCurvature.restore(rows.kept(), omega, LAM, rows.options)
    v = torch.randn(rows.p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(again.matvec(v), rows.matvec(v))


def test_float32_rows_halve_the_memory_and_reach_what_is_asked() -> None:
    exact, half = (
        built("cross_entropy", "l2", "muter", "rows", dtype) for dtype in ("float64", "float32")
    )
    numbers = 3 * 8 + 1  # a point's weight, index, active share and flag stay
    assert rows_of(half).nbytes - N * numbers == (rows_of(exact).nbytes - N * numbers) // 2
    found, expected = forget_rows(half, [3, 4]), forget_rows(exact, [3, 4])
    step = expected.memory.omega - exact.omega_star
    assert 1e-9 < relative(found.memory.omega - half.omega_star, step) < 1e-4
    assert found.solution.status is Status.CONVERGED
    assert found.solution.residual <= 1e-5 == found.solution.tol
    strict = replace(rows_of(half), options=replace(rows_of(half).options, tol=1e-13))
    refined = strict.solver().solve(half.residual_gradient)  # products by all digits refine it
    by_all_digits = torch.stack([strict.exactly(v) for v in torch.eye(strict.p).double()], dim=1)
    direct = torch.linalg.solve(by_all_digits, half.residual_gradient)
    assert refined.status is Status.CONVERGED and refined.residual <= 1e-13
    assert relative(refined.value, direct) <= 1e-10
    few = replace(rows_of(half), options=replace(rows_of(half).options, tol=1e-13, max_iter=3))
    assert few.solver().solve(half.residual_gradient).status is Status.MAX_ITERATIONS


def test_many_rows_iterate_in_float32_and_end_with_all_digits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = built("cross_entropy", "l2", "muter", "rows")
    rows, rhs = rows_of(memory), memory.residual_gradient
    plain = rows.solver().solve(rhs)
    monkeypatch.setattr("lightning_muter.curvature.rows._LARGE", 0)
    products = {torch.float32: 0, torch.float64: 0}
    matvec = PointRows.matvec

    def counted(self: PointRows, v: Tensor) -> Tensor:
        products[self.dtype] += 1
        return matvec(self, v)

    monkeypatch.setattr(PointRows, "matvec", counted)
    found = rows.solver().solve(rhs)
    assert found.status is Status.CONVERGED and found.residual <= 1e-12
    assert relative(found.value, plain.value) <= 1e-11
    assert products[torch.float64] < products[torch.float32] / 2
    negative = replace(rows, damping=-2 * rows.extremes()[0] - 1.0, _inverses={})
    assert negative.solver().solve(rhs).status is Status.INDEFINITE


def test_a_point_that_has_no_row_is_refused() -> None:
    memory = built("cross_entropy", "l2", "muter", "rows")
    once = forget_rows(memory, [2]).memory
    with pytest.raises(StateError, match="rows of 1 of the 2 points"):
        forget_rows(once, [2, 3])
    with pytest.raises(StateError, match="representation='rows'"):
        forget_rows(built("cross_entropy", "l2", "muter", "dense"), [2])


@pytest.mark.parametrize("loss", ["cross_entropy", "TRADES", "several labels"])
def test_a_request_that_removes_a_class_s_last_point_says_so(loss: str) -> None:
    memory, y = built(loss, "l2", "muter", "rows"), targets(loss, LOSSES[loss][1])
    own = (y if y.ndim == 1 else y.argmax(dim=1)) == 2
    gone, others = torch.nonzero(own).flatten().tolist(), torch.nonzero(~own).flatten().tolist()
    once = forget_rows(memory, gone[:-1])
    assert not any("no point is left" in said for said in once.warnings)
    last = forget_rows(once.memory, gone[-1:])
    found = [said for said in last.warnings if "no point is left of class 2:" in said]
    assert len(found) == (loss == "cross_entropy")
    again = forget_rows(last.memory, others[:1])  # said once
    assert not any("no point is left" in said for said in again.warnings)


#: bytes -> blocks of 7 x 7 numbers that fit; in float32 where those of float64 do not
BUDGETS = {10**9: 5, 1200: 5, 600: 3, 1: 1}


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_preconditioner_is_exact_on_vectors_that_are_equal_for_every_class(
    budget: int,
) -> None:
    rows = rows_of(built("cross_entropy", "l2", "muter", "rows"))
    blocks = ClassBlocks.of(rows.blocks, rows.shift, Group(), budget, torch.device("cpu"))
    assert len(blocks.factors) == BUDGETS[budget] and blocks.centred
    assert blocks.exact == (budget > 1000)
    everywhere = torch.randn(1, 7, generator=torch.Generator().manual_seed(1)).double()
    v = rows.blocks[0].points.vector_form(everywhere.expand(5, -1))
    torch.testing.assert_close(rows.matvec(v), rows.shift * v)
    rtol = 1e-12 if budget == 10**9 else 1e-5  # within a small budget the blocks are float32
    torch.testing.assert_close(blocks.apply(v), v / rows.shift, rtol=rtol, atol=0)
    eye = torch.eye(rows.p, dtype=torch.float64)
    inverse = torch.stack([blocks.apply(u) for u in eye], dim=1)
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-5, atol=1e-7)
    assert float(torch.linalg.eigvalsh((inverse + inverse.T) / 2)[0]) > 0


def test_few_points_of_a_class_make_blocks_of_few_rows() -> None:
    rows = rows_of(built("cross_entropy", "l2", "muter", "rows"))
    few = rows.blocks[0][:1]
    cpu, group = torch.device("cpu"), Group()
    thin = ClassBlocks.of([few], 0.7, group, 10**9, cpu)
    assert all(isinstance(one, ThinFactor) for one in thin.factors) and thin.exact
    for c, factor in enumerate(thin.factors):
        block = few.class_block(c) + 0.7 * torch.eye(7, dtype=torch.float64)
        found = factor.whole(factor.halved(torch.eye(7, dtype=torch.float64)))
        torch.testing.assert_close(found, torch.linalg.inv(block), rtol=1e-10, atol=1e-12)
    # without weight decay, and of many points, whole blocks
    for some, shift in (([few], 0.0), (rows.blocks, 0.7)):
        full = ClassBlocks.of(some, shift, group, 10**9, cpu)
        assert all(isinstance(one, FullFactor) for one in full.factors)


@pytest.mark.parametrize("loss", ["cross_entropy", "TRADES", "TRADES, smoothed"])
def test_the_block_of_a_class_is_the_matrix_s_own(loss: str) -> None:
    rows = rows_of(built(loss, "l2", "muter", "rows"))
    width, whole = 7, columns(rows) - rows.shift * torch.eye(rows.p, dtype=torch.float64)
    classes = rows.p // width
    for c in range(classes):
        places = [*range(c * 6, c * 6 + 6), classes * 6 + c]  # the weight's row and the bias
        found = torch.stack([one.class_block(c) for one in rows.blocks]).sum(dim=0)
        torch.testing.assert_close(found, whole[places][:, places])


def test_fisher_information_of_two_inputs_has_no_rows() -> None:
    with pytest.raises(ConfigurationError, match="with TRADES, no Fisher method"):
        built("TRADES", "l2", "fisher_delta", "rows")


def test_one_output_is_its_own_block_and_solved_at_once() -> None:
    rows = rows_of(built("logistic", "l2", "muter", "rows"))
    found = RowsSolver(rows, 1e-10).solve(built("logistic", "l2", "muter", "rows").omega_star)
    assert found.iterations <= 2 and found.residual <= 1e-10


def test_the_blocks_of_the_classes_save_products() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = rows_of(built("cross_entropy", "l2", "muter", "rows"))
    rhs = torch.randn(rows.p, generator=generator, dtype=torch.float64)
    with_blocks = RowsSolver(rows, 1e-10).solve(rhs)
    without = conjugate_gradients(rows.matvec, rhs, None, 1e-10)
    assert with_blocks.iterations < 0.75 * without.iterations
    torch.testing.assert_close(with_blocks.value, without.value, rtol=1e-7, atol=1e-9)


def test_without_weight_decay_the_shortest_solution_is_named_so() -> None:
    rows = rows_of(built("cross_entropy", "l2", "muter", "rows"))
    flat = replace(rows, decay=0.0, options=RowsOptions(tol=1e-9), _inverses={})
    rhs = flat.blocks[0].gradient()
    found = flat.solver().solve(rhs)
    assert found.status is Status.MINIMUM_NORM and found.residual <= 1e-8
    expected = torch.linalg.pinv(columns(flat), rtol=1e-11) @ rhs
    torch.testing.assert_close(found.value, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ["cross_entropy", "TRADES", "several labels", "logistic"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_many_systems_at_once_are_solved_as_one_by_one(loss: str, dtype: str) -> None:
    rows = rows_of(built(loss, "l2 range", "muter", "rows", dtype))
    generator = torch.Generator().manual_seed(6)
    rhs = torch.randn(5, rows.p, generator=generator, dtype=torch.float64)
    rhs[2] = 0
    rhs[3] *= 1e-9
    together = rows.solver().solve(rhs)
    whole = torch.stack([rows.exactly(v) for v in torch.eye(rows.p).double()], dim=1)
    assert together.status is Status.CONVERGED
    assert together.residual <= rows.options.tolerance
    left = (together.value @ whole - rhs).norm(dim=1) / rhs.norm(dim=1).clamp(min=1e-300)
    assert float(left.max()) == pytest.approx(together.residual, rel=0.1, abs=1e-14)
    for x, b in zip(together.value, rhs, strict=True):
        alone = rows.solver().solve(b)
        torch.testing.assert_close(x, alone.value, rtol=1e-4, atol=1e-4 * float(alone.value.norm()))
    negative = replace(rows, damping=-2 * rows.extremes()[0] - 1.0, _inverses={})
    assert negative.solver().solve(rhs).status is Status.INDEFINITE


def coupled(points: int = 400, features: int = 12, classes: int = 16) -> RowsCurvature:
    """Rows of which some probes weigh much, each in many classes."""
    generator = torch.Generator().manual_seed(8)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = torch.softmax(3 * drawn(points, classes), dim=1)
    r = q - torch.nn.functional.one_hot(q.argmax(dim=1), classes)
    one = torch.ones(points, dtype=torch.float64)
    head = HeadPoints(drawn(points, features), r, Categorical(q), drawn(classes, features), one)
    factors = drawn(points, 1, features) * 10 ** drawn(points, 1, 1)
    slopes = head.bend(factors[:, 0] @ head.weight.T).unsqueeze(1)
    facts = PointFacts(torch.arange(points), one, one)
    rows = PointRows(head, factors, slopes, one.unsqueeze(1), None, facts)
    options = RowsOptions(tol=1e-8, probes=1)
    return RowsCurvature((rows[:150], rows[150:]), classes * features, 1e-3, options)


def test_heavy_probes_beside_the_blocks_save_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = coupled()
    rhs = rows.sample_gradient()
    found = rows.solver().solve(rhs)
    monkeypatch.setattr("lightning_muter.curvature.heavy_probes._MOST", 0)
    blocks_alone = replace(rows, _inverses={}).solver().solve(rhs)
    assert found.status is blocks_alone.status is Status.CONVERGED
    assert found.iterations < 0.6 * blocks_alone.iterations
    torch.testing.assert_close(found.value, blocks_alone.value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_heavy_probes_cost_no_products_where_none_weighs_much(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(built(loss, "l2", "muter", "rows"))
    rhs = torch.randn(rows.p, generator=torch.Generator().manual_seed(0)).double()
    found = replace(rows, _inverses={}).solver().solve(rhs)
    monkeypatch.setattr("lightning_muter.curvature.heavy_probes._MOST", 0)
    assert found.iterations <= replace(rows, _inverses={}).solver().solve(rhs).iterations


def test_the_preconditioner_is_the_inverse_of_blocks_and_heavy_probes() -> None:
    rows, cpu = coupled(), torch.device("cpu")
    blocks = ClassBlocks.of(rows.blocks, rows.shift, Group(), 10**9, cpu)
    assert blocks.heavy is not None and len(blocks.heavy.probes.points) == 400 // 8
    assert blocks.nbytes == 8 * 16 * 12**2 + 4 * 50 * rows.p + 8 * 2 * 50**2
    heavy = torch.isin(torch.arange(400), blocks.heavy.probes.points)
    assert float(torch.cat([one.probe_sizes() for one in rows.blocks])[heavy].min()) > 0
    whole = PointRows.cat(rows.blocks)
    width = 12
    parts = torch.zeros(rows.p, rows.p, dtype=torch.float64)
    light = whole.without_probes(heavy.unsqueeze(1))
    for c in range(16):
        own = slice(c * width, (c + 1) * width)
        parts[own, own] = light.class_block(c)
    probes = whole.probes(heavy.unsqueeze(1))
    v = torch.cat([probes.probe(0, c) for c in range(16)], dim=1)

    def expected(weights: Tensor, shift: float) -> Tensor:
        centre = torch.eye(16).double() - 1 / 16
        pi = torch.kron(centre, torch.eye(width).double())
        blocked = parts + rows.shift * torch.eye(rows.p).double()
        inner = pi @ torch.linalg.inv(blocked) @ pi
        gram = torch.linalg.inv(torch.diag(1 / weights) + v @ inner @ v.T)
        return inner - inner @ v.T @ gram @ v @ inner + (torch.eye(rows.p).double() - pi) / shift

    eye = torch.eye(rows.p).double()
    everyone = torch.ones(50).double()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(blocks.apply(eye), expected(everyone, rows.shift), **close)
    # a point that is gone, and a coin that counts a probe twice, are known
    gone = int(blocks.heavy.probes.points[7])
    now = blocks.now(rows.without([gone]).blocks, rows.shift)
    assert now.heavy is not None
    weights = everyone.clone()
    weights[7] = 1e-12
    torch.testing.assert_close(now.apply(eye), expected(weights, rows.shift), **close)
    other = rows.resampled()
    assert other is not None
    coins = blocks.now(other.blocks, rows.shift).heavy
    assert coins is not None and set(coins.probes.weights.tolist()) == {0.0, 2.0}


def test_whole_blocks_of_few_points_on_a_wide_head_are_shared() -> None:
    torch.manual_seed(3)
    wide = nn.Sequential(nn.Linear(D, 64), nn.Tanh(), nn.Linear(64, 5)).double().eval()
    kept = built("cross_entropy", "l2", "muter", "rows").settings
    pieces, digests = (
        [unweighted(points()[:3], targets("cross_entropy", 5)[:3])],
        torch.zeros(3, 16, dtype=torch.uint8),
    )
    (memory,) = build_memories(wide, [kept], pieces, digests, bytes(16))
    rows = rows_of(memory)
    whole = ClassBlocks.of(rows.blocks, 0.0, Group(), 10**9, torch.device("cpu"))
    assert len(whole.factors) == 1  # five would be read for longer than many products take
    rhs = torch.randn(rows.p, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = rows.solver().solve(rhs)
    assert relative(rows.matvec(found.value), rhs) <= 1e-11


@pytest.mark.parametrize("budget", [10**9, 8 * 4 * 192 * 8, 4000])
def test_blocks_and_heavy_probes_stay_within_the_budget(budget: int) -> None:
    rows = coupled()
    blocks = ClassBlocks.of(rows.blocks, rows.shift, Group(), budget, torch.device("cpu"))
    assert blocks.nbytes <= budget
