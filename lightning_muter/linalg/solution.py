"""A solution with its evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.errors import SolverError

__all__ = ["Operator", "Solution", "finite", "relative_residual"]

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """A solution with its evidence: ‖A x - b‖ / ‖b‖, iterations and how it ended.

    ``status`` is "converged", "indefinite" (solved, but A is not positive definite),
    "minimum_norm" (A is singular) or "max_iterations".
    """

    value: Tensor
    residual: float
    iterations: int
    status: str


def relative_residual(residual: Tensor, rhs: Tensor) -> float:
    """‖residual‖ / ‖rhs‖; 0 where the right-hand side is 0."""
    scale = float(torch.linalg.vector_norm(rhs))
    return float(torch.linalg.vector_norm(residual)) / scale if scale > 0 else 0.0


def finite(solution: Solution) -> Solution:
    """The solution itself, or a `SolverError` where it holds NaN or infinity."""
    if not bool(torch.isfinite(solution.value).all()):
        raise SolverError(
            f"the system gave a solution that is not finite (status {solution.status}); the "
            "memory is singular or damaged: raise damping"
        )
    return solution
