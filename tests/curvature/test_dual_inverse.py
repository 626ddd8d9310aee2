"""The preconditioner in the span of few points' rows, against the inverse that it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_muter.curvature.base import PointFacts
from lightning_muter.curvature.class_blocks import ClassBlocks
from lightning_muter.curvature.dual_inverse import DualInverse
from lightning_muter.curvature.head import HeadPoints
from lightning_muter.curvature.pivot_factors import PivotFactors
from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.curvature.preconditioner import preconditioner_of
from lightning_muter.curvature.rows import RowsCurvature, RowsOptions
from lightning_muter.linalg.solution import Status
from lightning_muter.objectives.output_curvature import Categorical, Diagonal
from lightning_muter.parallel import Group

CPU = torch.device("cpu")
WIDTH, CLASSES = 41, 9  # with a bias


def few(
    points: int = 8, probes: int = 2, softmax: bool = True, tol: float = 1e-10
) -> RowsCurvature:
    """Rows of few points on a wide head, some of whose probes weigh much."""
    generator = torch.Generator().manual_seed(points + probes)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = torch.softmax(2 * drawn(points, CLASSES), dim=1)
    r = q - torch.nn.functional.one_hot(q.argmax(dim=1), CLASSES)
    s = Categorical(q) if softmax else Diagonal(q * (1 - q))
    features = torch.cat([drawn(points, WIDTH - 1), torch.ones(points, 1).double()], dim=1)
    weights = torch.rand(points, generator=generator, dtype=torch.float64) + 0.5
    head = HeadPoints(features, r, s, drawn(CLASSES, WIDTH - 1), weights)
    factors = drawn(points, probes, WIDTH - 1) * 10 ** (drawn(points, probes, 1) / 2)
    bent = [head.bend(factors[:, k] @ head.weight.T) for k in range(probes)]
    slopes = torch.stack(bent, dim=1) if bent else drawn(points, 0, CLASSES)
    coefficients = torch.rand(points, probes, generator=generator, dtype=torch.float64) + 0.5
    facts = PointFacts(torch.arange(points) * 3, weights, weights)
    rows = PointRows(head, factors, slopes, coefficients, None, facts)
    parts = (rows[: points // 2], rows[points // 2 :])
    return RowsCurvature(parts, CLASSES * WIDTH, 0.01, RowsOptions(tol=tol, probes=1))


def eye_of(rows: RowsCurvature) -> Tensor:
    return torch.eye(rows.p, dtype=torch.float64)


def expected_inverse(rows: RowsCurvature, gone: int | None = None) -> Tensor:
    """Π (blockdiag + V D Vᵀ)⁻¹ Π + (I - Π) / σ by dense matrices; probes of ``gone`` weigh 0."""
    whole = PointRows.cat(rows.blocks)
    direct = whole.without_probes(torch.ones_like(whole.coefficients).bool())
    p, form = rows.p, whole.points
    places = torch.stack([form.matrix_form(v) for v in eye_of(rows)])  # (p, C, F̃)
    block = sum(
        places[:, c] @ direct.class_block(c) @ places[:, c].T for c in range(CLASSES)
    ) + rows.shift * eye_of(rows)
    weights = (whole.points.weights.unsqueeze(1) * whole.coefficients).clone()
    if gone is not None:
        weights[whole.facts.indices == gone] = 0
    v = torch.stack(
        [
            form.vector_form(torch.stack([whole.probe(k, c)[i] for c in range(CLASSES)]))
            for i in range(len(whole))
            for k in range(whole.coefficients.shape[1])
        ]
    ) if whole.coefficients.numel() else torch.zeros(0, p).double()  # fmt: skip
    total = block + v.T @ (v * weights.flatten().unsqueeze(1))
    if not rows.centred:
        return torch.linalg.inv(total)
    mean = places.mean(dim=1, keepdim=True).expand(-1, CLASSES, -1)
    rest = torch.stack([form.vector_form(one) for one in mean], dim=1)
    pi = eye_of(rows) - rest
    return pi @ torch.linalg.inv(total) @ pi + rest / rows.shift


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("probes", [0, 1, 2])
def test_it_is_the_inverse_of_blocks_and_probes(
    probes: int, softmax: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_muter.curvature.pivot_factors._LEFT", 1e-13)
    monkeypatch.setattr("lightning_muter.curvature.dual_inverse._TOGETHER", 4)
    rows = few(probes=probes, softmax=softmax)
    found = DualInverse.of(rows.blocks, rows.shift, 10**9, CPU)
    inverse = found.apply(eye_of(rows))
    expected = expected_inverse(rows)
    torch.testing.assert_close(inverse, expected, rtol=1e-8, atol=1e-9 * float(expected.max()))
    torch.testing.assert_close(found.apply(eye_of(rows)[3]), inverse[3])
    # a point that is gone is known
    if probes:
        now = found.now(rows.without([6]).blocks, rows.shift).apply(eye_of(rows))
        expected = expected_inverse(rows, gone=6)
        torch.testing.assert_close(now, expected, rtol=1e-8, atol=1e-9 * float(expected.max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("budget", [10**9, 60_000])
def test_few_pivots_leave_it_symmetric_and_positive(budget: int, dtype: torch.dtype) -> None:
    rows = few(points=20, probes=1)
    blocks = tuple(one.converted(dtype) for one in rows.blocks)
    found = DualInverse.of(blocks, rows.shift, budget, CPU)
    assert found.nbytes <= budget
    inverse = found.apply(eye_of(rows))
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-5, atol=1e-5 / rows.shift)
    values = torch.linalg.eigvalsh((inverse + inverse.T) / 2)
    assert float(values[0]) > 0
    assert float(values[-1]) == pytest.approx(1 / rows.shift, rel=1e-4)
    most = max(one.pivots.shape[1] for one in found.factors)
    assert most <= DualInverse.room(blocks, budget)
    assert budget == 10**9 or most < 20


def test_pivots_leave_little_of_a_class_s_block_outside_their_span() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(30, 50, generator=generator, dtype=torch.float64) * 0.9 ** torch.arange(50)
    weights = torch.rand(3, 30, generator=generator, dtype=torch.float64)
    weights[1] *= 1e-3
    weights[2] = 0
    shift = 0.5
    found = PivotFactors.of(torch.arange(3), h @ h.T, weights, shift, 30)
    assert 0 < found.pivots.shape[1] < 30 and not bool(found.inner[2].any())
    for c in range(3):
        used = found.pivots[c, found.inner[c].diagonal() != 0]
        assert len(used.unique()) == len(used)
        q = torch.linalg.qr(h[used].T).Q
        left = h - h @ q @ q.T
        assert float((weights[c] * left.square().sum(dim=1)).sum()) <= 2 * shift + 1e-12
        block = q @ (q.T @ (h.T * weights[c]) @ h @ q) @ q.T + shift * torch.eye(50).double()
        total = torch.zeros(50, 3, 30, dtype=torch.float64)
        pairs = torch.zeros_like(total)
        pairs[:, c] = h.T
        found.add_to(total, pairs)
        inverse = (torch.eye(50).double() + total[:, c] @ h) / shift
        torch.testing.assert_close(inverse, torch.linalg.inv(block))
        whole = (h.T * weights[c]) @ h + shift * torch.eye(50).double()
        ratios = torch.linalg.eigvals(inverse @ whole).real  # docs/theory.md
        assert float(ratios.min()) >= 0.2 and float(ratios.max()) <= 5


@pytest.mark.parametrize("scale", [30.0, 3000.0])
def test_points_that_are_there_often_are_pivots_once(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(40, 30, generator=generator).repeat(30, 1)
    weights = scale * torch.rand(1, 1200, generator=generator)
    found = PivotFactors.of(torch.arange(1), h @ h.T, weights, 1.0, 1200)
    assert found.pivots.shape[1] == 30  # rounding of 1,200 points is none
    total = torch.zeros(30, 1, 1200)
    found.add_to(total, h.T.unsqueeze(1))
    inverse = torch.eye(30).double() + (total[:, 0] @ h).double()
    block = (h.double().T * weights[0].double()) @ h.double() + torch.eye(30).double()
    error = torch.linalg.eigvalsh((inverse + inverse.T) / 2 - torch.linalg.inv(block)).abs()
    assert float(error.max()) < 2e-9 * float(block.trace())


def test_eigenvalues_too_far_apart_for_float32_are_taken_in_float64() -> None:
    rows = few(points=8, probes=1)
    single = tuple(one.converted(torch.float32) for one in rows.blocks)
    assert DualInverse.of(single, 10.0, 10**9, CPU).span.features.dtype == torch.float32
    assert DualInverse.of(single, 1e-3, 10**9, CPU).span.features.dtype == torch.float64


def test_it_solves_in_fewer_products_than_blocks() -> None:
    rows = few(points=20, probes=1)
    rhs = rows.sample_gradient()
    found = rows.solver().solve(rhs)
    assert isinstance(rows.preconditioner(CPU), DualInverse)
    matrix = torch.stack([rows.matvec(v) for v in eye_of(rows)])
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, rhs), rtol=1e-8, atol=1e-9)
    assert found.status is Status.CONVERGED and found.residual <= 1e-10
    blocks = ClassBlocks.of(rows.blocks, rows.shift, Group(), 10**9, CPU)
    by_blocks = replace(rows, _inverses={rows.damping: (rows.points, blocks)}).solver().solve(rhs)
    assert found.iterations < 0.7 * by_blocks.iterations


def test_it_is_made_anew_once_some_points_are_gone() -> None:
    rows = few(points=20, probes=1)
    first = rows.preconditioner(CPU)
    for gone, kept in (([0, 3], True), ([0, 3, 6, 9, 12], False)):
        left = rows.without(gone)
        rhs = torch.stack([one.gradient() for one in rows.rows_of(gone)]).sum(dim=0)
        found = left.solver().solve(rhs)
        assert (left.preconditioner(CPU).nbytes == first.nbytes) == kept
        matrix = torch.stack([left.matvec(v) for v in eye_of(rows)])
        expected = torch.linalg.solve(matrix, rhs)
        torch.testing.assert_close(found.value, expected, rtol=1e-8, atol=1e-9)
    stale = replace(left, _inverses={rows.damping: (left.points, first)}).solver().solve(rhs)
    assert found.iterations < 0.7 * stale.iterations


def test_which_serves_is_chosen_by_sizes() -> None:
    def chosen(rows: RowsCurvature, budget: int = 10**9, shift: float = 1.0) -> type:
        return type(preconditioner_of(rows.blocks, shift, Group(), budget, CPU))

    assert chosen(few(points=8)) is DualInverse
    assert chosen(few(points=80)) is ClassBlocks  # its own products would take longer
    assert chosen(few(points=8), shift=0.0) is ClassBlocks  # singular outside the span
    assert chosen(few(points=20, probes=1), budget=58_000) is DualInverse  # where blocks do not fit
    assert chosen(few(points=20, probes=1), budget=1_000) is ClassBlocks  # which are then shared
    negative = few(points=8)
    minus = tuple(replace(one, coefficients=-one.coefficients) for one in negative.blocks)
    assert chosen(replace(negative, blocks=minus)) is ClassBlocks
