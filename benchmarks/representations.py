"""Ways to keep the curvature of a head, as memories: distance to Retrain, bytes, seconds.

The same head on a frozen network (scikit-learn's digits, tanh features), at its robust optimum;
the memory is the exact matrix, rows of some probes, a low-rank (Nyström) matrix, or EK-FAC: the
eigenbasis of the Kronecker factors with the curvature's own diagonal in it. A request takes the
points' curvature out of each, Retrain is Newton's method on the points that are left.

    python benchmarks/representations.py --seeds 3 --output FILE.csv
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_muter import L2Ball, UnlearningMemory
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.evaluation import Cell, Table
from lightning_muter.spec import Settings
from lightning_muter.unlearning.objective import RobustObjective, newton
from lightning_muter.unlearning.points import Batch
from lightning_muter.unlearning.sketch_noise import sketch_noise
from lightning_muter.unlearning.stage_one import build_memories
from lightning_muter.unlearning.steps import NewtonStep

N, FEATURES, DECAY = 1000, 48, 1e-3
PROBES = (1, 4, 16)
PROBLEM = Settings(
    method="muter",
    threat=L2Ball(0.3),
    head="2",
    solver="direct",
    weight_decay=DECAY,
    solver_tol=1e-10,
)


def problem(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(seed)
    data, target = load_digits(return_X_y=True)
    order = torch.randperm(len(data))[:N]
    x, y = torch.tensor(data / 16.0)[order], torch.tensor(target)[order]
    net = nn.Sequential(nn.Linear(64, FEATURES), nn.Tanh(), nn.Linear(FEATURES, 10)).double().eval()
    return net, x, y


def batch(x: Tensor, y: Tensor, which: Tensor) -> Batch:
    return Batch(x[which], y[which], torch.ones(len(which), dtype=torch.float64), which)


def optimum(net: nn.Sequential, x: Tensor, y: Tensor, which: Tensor) -> Tensor:
    view = PROBLEM.view(net)
    newton(RobustObjective(view, PROBLEM.problem(), lambda: [batch(x, y, which)]), 20)
    return view.get()


def memory_of(net: nn.Sequential, x: Tensor, y: Tensor, **kept: object) -> UnlearningMemory:
    settings = replace(PROBLEM, **kept)  # type: ignore[arg-type]
    everyone = batch(x, y, torch.arange(N))
    digests = torch.zeros(N, 16, dtype=torch.uint8)
    (memory,) = build_memories(net, [settings], [everyone], digests, bytes(16))
    return memory


def rows_of(memory: UnlearningMemory) -> RowsCurvature:
    assert isinstance(memory.curvature, RowsCurvature)
    return memory.curvature


def kronecker_basis(rows: RowsCurvature) -> Tensor:
    """Eigenvectors (p, p) of Σ h̃h̃ᵀ ⊗ Σ S, in the order of ω."""
    points = rows.blocks[0].points
    _, of_features = torch.linalg.eigh(points.features.T @ points.features)
    _, of_classes = torch.linalg.eigh(points.s.dense().sum(dim=0))
    outer = torch.einsum("ca,fb->cfab", of_classes, of_features)
    flat = outer.reshape(*outer.shape[:2], -1)
    return torch.stack([points.vector_form(column) for column in flat.unbind(dim=2)], dim=1)


def nystroem(matrix: Tensor, shift: float, rank: int) -> Tensor:
    """A rank of M - shift I by random products, and shift I."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(len(matrix), rank, generator=generator, dtype=torch.float64)
    rest = matrix - shift * torch.eye(len(matrix), dtype=torch.float64)
    basis, _ = torch.linalg.qr(probes)
    product = rest @ basis
    low = product @ torch.linalg.pinv(basis.T @ product, rtol=1e-10) @ product.T
    return low + shift * torch.eye(len(matrix), dtype=torch.float64)


def one(seed: int, share: float) -> dict[str, dict[str, float]]:
    """Method -> distance to Retrain relative to none, bytes, seconds of a request, noise."""
    net, x, y = problem(seed)
    omega = optimum(net, x, y, torch.arange(N))
    exact = memory_of(net, x, y)
    assert isinstance(exact.curvature, DenseCurvature)
    rows = {k: rows_of(memory_of(net, x, y, representation="rows", sketch=k)) for k in PROBES}
    matrix, shift, p = exact.curvature.matrix, N * DECAY, exact.p
    gone = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[: round(share * N)]
    left = torch.tensor(sorted(set(range(N)) - set(gone.tolist())))
    total = DenseCurvature.zeros(p, "cpu")
    view = exact.settings.view(net)
    sums = exact.settings.problem().accumulate(view, batch(x, y, gone), total)
    removed = total.matrix + len(gone) * DECAY * torch.eye(p, dtype=torch.float64)
    rhs = sums.gradient + len(gone) * DECAY * omega
    basis, budget = kronecker_basis(rows[1]), rows[1].nbytes
    rank = max(1, budget // (8 * p))
    low = nystroem(matrix, shift, min(rank, p))
    diagonal = (basis * (matrix @ basis)).sum(dim=0) - (basis * (removed @ basis)).sum(dim=0)

    def dense() -> Tensor:
        return torch.linalg.solve(matrix - removed, rhs)

    def by_rows(k: int) -> Tensor:
        return rows[k].without(gone.tolist()).solver().solve(rhs).value

    def by_low_rank() -> Tensor:
        return torch.linalg.solve(low - removed, rhs)

    def by_basis() -> Tensor:
        return basis @ ((basis.T @ rhs) / diagonal)

    width = FEATURES + 1
    ways: dict[str, tuple[Callable[[], Tensor], float]] = {
        "matrix": (dense, 8.0 * p * p),
        **{f"rows_probes_{k}": (partial(by_rows, k), float(rows[k].nbytes)) for k in PROBES},
        "nystroem_bytes_of_rows": (by_low_rank, 8.0 * p * min(rank, p)),
        "nystroem_rank_100": (
            lambda: torch.linalg.solve(nystroem(matrix, shift, 100) - removed, rhs), 800.0 * p),
        "ek_fac": (by_basis, 8.0 * (width**2 + 100 + p)),
    }  # fmt: skip
    retrain = optimum(net, x, y, left)
    none = float((omega - retrain).norm())
    found = {"none": {"distance_relative": 1.0}}
    for name, (solve, size) in ways.items():
        start = time.perf_counter()
        step = solve()
        spent = time.perf_counter() - start
        distance = float((omega + step - retrain).norm()) / none
        found[name] = {"distance_relative": distance, "bytes": size, "seconds": spent}
    for k, kept in rows.items():
        after = kept.without(gone.tolist())
        step, wanted = after.solver().solve(rhs).value, dense()
        found[f"rows_probes_{k}"] |= {
            "sketch_noise": sketch_noise(after, kept, NewtonStep(), rhs, step),
            "error": float((step - wanted).norm() / step.norm()),
        }
    return found


def main() -> None:
    """Print a line a seed, share and method, and add them to a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a table for the documentation, added to")
    given = parser.parse_args()
    for share in (0.01, 0.05):
        for seed in range(given.seeds):
            found = one(seed, share)
            for name, metrics in found.items():
                shown = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
                print(f"seed {seed}, {share:.0%} removed, {name}: {shown}", flush=True)
            if given.output is not None:
                Table(given.output).add(
                    Cell(seed, round(share * N), share, name, metric, value)
                    for name, metrics in found.items()
                    for metric, value in metrics.items()
                )


if __name__ == "__main__":
    main()
