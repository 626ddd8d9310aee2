"""A dense sum whose rows lie on several processes, played by threads that meet at each sum."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.kept import OuterProducts
from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.curvature.sharded import ShardedDense, ShardedSum
from lightning_muter.linalg.solution import Solution, Status
from lightning_muter.parallel import Group

P = 11


def together(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """What ``work`` gives in each of some processes."""
    barrier, slots = threading.Barrier(size, timeout=60), [None] * size

    def exchanged(rank: int, value: Any) -> list[Any]:
        slots[rank] = value
        barrier.wait()
        found: list[Any] = list(slots)
        barrier.wait()
        return found

    def one(rank: int) -> Any:
        def total(tensor: Tensor) -> Tensor:
            return torch.stack(exchanged(rank, tensor)).sum(dim=0)

        def gather(value: Any) -> list[Any]:
            return exchanged(rank, value)

        try:
            return work(Group(rank=rank, size=size, sum=total, gather=gather))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def points(seed: int, k: int = 9) -> OuterProducts:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, P, generator=generator, dtype=torch.float64)
    return OuterProducts(rows, torch.ones(k, dtype=torch.bool))


def matrix_of(sign: Tensor | None = None, decay: float = 0.5) -> Tensor:
    expected = sum(points(seed).rows.T @ points(seed).rows for seed in range(5))
    return expected + decay * torch.eye(P, dtype=torch.float64)


def built(group: Group, decay: float = 0.5) -> ShardedDense:
    """Five chunks of points, an uneven number on each process."""
    total = ShardedSum(torch.zeros(P, dtype=torch.float64))
    for seed in range(5)[group.rows]:
        total.add(points(seed))
    return total.finished(group, 1.0, decay)


B = torch.linspace(-1.0, 2.0, P, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_products_solves_and_removals_are_those_of_the_whole_matrix(size: int) -> None:
    expected, gone = matrix_of(), points(3)
    left = expected - gone.rows.T @ gone.rows - 0.1 * torch.eye(P, dtype=torch.float64)

    def work(group: Group) -> dict[str, Any]:
        full = built(group)
        rest = full.without(RemovedPoints.of([gone], 0.1))
        return {
            "product": full.matvec(B),
            "diagonal": full.base_diagonal(),
            "solution": full.damped(0.2).solver().solve(B),
            "whole": full.whole().kept()["matrix"],
            "rest": rest.matvec(B),
            "folded": rest.folded().whole().kept()["matrix"],
            "kept": rest.whole().kept()["matrix"],
            "removed": rest.solver().solve(B),
            "extremes": full.extremes(),
            "bytes": full.nbytes,
        }

    eye, values = torch.eye(P, dtype=torch.float64), torch.linalg.eigvalsh(expected)
    for found in together(size, work):
        close = {
            "product": expected @ B,
            "diagonal": expected.diagonal(),
            "whole": expected,
            "rest": left @ B,
            "folded": left,
            "kept": left,
        }
        for name, one in close.items():
            torch.testing.assert_close(found[name], one, rtol=1e-12, atol=1e-12)
        for name, matrix in (("solution", expected + 0.2 * eye), ("removed", left)):
            solution: Solution = found[name]
            assert solution.status is Status.CONVERGED
            solved = torch.linalg.solve(matrix, B)
            torch.testing.assert_close(solution.value, solved, rtol=1e-10, atol=1e-10)
        assert found["extremes"] == pytest.approx((float(values[0]), float(values[-1])))
        assert found["bytes"] <= 8 * P * -(-P // size)


def test_a_memory_of_one_process_is_shared_by_its_rows() -> None:
    alone = ShardedDense(matrix_of())

    def work(group: Group) -> tuple[Tensor, int, int]:
        own = alone.shared(group)
        assert own.shared(group) is own
        return own.matvec(B), own.rows.untyped_storage().nbytes(), len(own.rows)

    found = together(2, work)
    for product, stored, rows in found:
        torch.testing.assert_close(product, matrix_of() @ B)
        assert stored == 8 * P * rows
    assert sum(rows for _, _, rows in found) == P


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_not_positive_definite_says_so(size: int) -> None:
    flat = torch.diag(torch.tensor([0.0, 0.0, *range(1, P - 1)], dtype=torch.float64))
    bent = torch.diag(torch.tensor([-1.0, *range(1, P)], dtype=torch.float64))
    ones = torch.ones(P, dtype=torch.float64)
    moved = torch.tensor([0.0, 0.0, *[1.0] * (P - 2)], dtype=torch.float64)

    def work(group: Group) -> list[Solution]:
        shares = [ShardedDense(one).shared(group) for one in (flat, flat, bent)]
        asked = (moved, ones, ones)
        return [one.solver().solve(b) for one, b in zip(shares, asked, strict=True)]

    for shortest, without, saddle in together(size, work):
        assert shortest.status is Status.MINIMUM_NORM
        direct = DenseCurvature(flat).solver().solve(moved)
        torch.testing.assert_close(shortest.value, direct.value, rtol=1e-10, atol=1e-12)
        assert without.status is Status.INCONSISTENT
        assert saddle.status is Status.INDEFINITE and saddle.residual < 1e-8


def test_a_singular_matrix_whose_blocks_are_not_says_so() -> None:
    tied = torch.ones(2, 2, dtype=torch.float64)  # each process's own block is the number 1

    def work(group: Group) -> Solution:
        found: Solution = ShardedDense(tied).shared(group).solver().solve(tied[0])
        return found

    for found in together(2, work):
        assert found.status is Status.MINIMUM_NORM
        torch.testing.assert_close(found.value, 0.5 * tied[0])
