"""A memory of a few numbers, requests of it, and whether two are the same."""

from __future__ import annotations

import json

import torch

from lightning_muter import L2Ball, UnlearningMemory
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.kept import OuterProducts
from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.linalg.lanczos import TimeAverage
from lightning_muter.memory.start import Start, TrainingFlow
from lightning_muter.spec import Settings


def small_memory() -> UnlearningMemory:
    """Of six points and three parameters, with something in every field."""
    settings = Settings(
        method="muter",
        threat=L2Ball(0.5, data_range=(0.0, float("inf"))),
        head="head",
        weight_decay=0.01,
    )
    omega = torch.arange(3, dtype=torch.float64)
    memory = UnlearningMemory(
        settings=settings,
        omega_star=omega,
        omega=omega,
        curvature=DenseCurvature(torch.eye(3, dtype=torch.float64)),
        parameters=(("head.weight", (1, 2)), ("head.bias", (1,))),
        gradient=torch.zeros(3, dtype=torch.float64),
        residual_gradient=torch.ones(3, dtype=torch.float64),
        digests=torch.arange(96, dtype=torch.uint8).reshape(6, 16),
        removed=torch.zeros(6, dtype=torch.bool),
        weights=torch.ones(6, dtype=torch.float64),
        start=Start(
            omega + 1, omega - 1, TrainingFlow(TimeAverage((0.5, 1.5), (0.25, 0.75)), "steps")
        ),
        key=b"k" * 16,
        fingerprint="f" * 32,
        summary={"n": 6, "residual": 0.25, "largest": float("nan")},
        warnings=("the ascent did not settle",),
    )
    return memory


def forgotten(memory: UnlearningMemory, indices: list[int]) -> UnlearningMemory:
    """The memory after a request that took one outer product out of it."""
    assert memory.curvature is not None
    rows = 0.1 * torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    part = OuterProducts(rows, torch.ones(1, dtype=torch.bool))
    removed = RemovedPoints.of([part], 0.01)
    step = torch.full_like(memory.omega, 0.1)
    curvature, entry = memory.curvature.without(removed), {"status": "converged", "m": 1}
    return memory.forget(indices, curvature, removed, step, memory.omega + step, entry)


def same(a: UnlearningMemory, b: UnlearningMemory) -> bool:
    """Whether two memories are the same in every field, bit for bit."""
    tensors = ("omega_star", "omega", "gradient", "residual_gradient", "digests", "removed")
    plain = ("settings", "key", "fingerprint", "ledger", "warnings", "parameters", "memory_id")
    assert a.curvature is not None and b.curvature is not None
    assert a.start is not None and b.start is not None
    return (
        all(torch.equal(getattr(a, name), getattr(b, name)) for name in (*tensors, "weights"))
        and torch.equal(a.curvature.matrix, b.curvature.matrix)
        and torch.equal(a.start.initial, b.start.initial)
        and torch.equal(a.start.retraced, b.start.retraced)
        and a.start.flow == b.start.flow
        and all(getattr(a, name) == getattr(b, name) for name in plain)
        and (a.generation, json.dumps(a.summary)) == (b.generation, json.dumps(b.summary))
    )
