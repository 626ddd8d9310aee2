"""A solution with its evidence, and the status that says how it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from lightning_muter.errors import SolverError

__all__ = ["Operator", "Solution", "Status", "finite", "relative_residual"]

Operator = Callable[[Tensor], Tensor]


class Status(str, Enum):
    """How a system was solved, from best to worst; each member carries its remedy.

    A member equals its text, so that ``result.status == "converged"`` reads as it says.

    Example:
        >>> Status.worst([Status.CONVERGED, Status.INDEFINITE]) is Status.INDEFINITE
        True
        >>> Status.CONVERGED == "converged", Status.CONVERGED.remedy
        (True, '')
    """

    remedy: str

    def __new__(cls, text: str, remedy: str) -> Status:
        member = str.__new__(cls, text)
        member._value_ = text
        member.remedy = remedy
        return member

    CONVERGED = ("converged", "")
    MINIMUM_NORM = (
        "minimum_norm",
        "the system is singular along directions that the request does not move: the shortest "
        "solution was taken; weight decay or damping makes it unique",
    )
    DOUBTFUL = (
        "doubtful",
        "the system was solved, but what it is a system of is in doubt: read the warnings",
    )
    INCONSISTENT = (
        "inconsistent",
        "the system is singular along directions that the request moves, so that it has no "
        "solution: train with weight decay, or give damping",
    )
    INDEFINITE = (
        "indefinite",
        "the solution is a saddle of the quadratic model, not its minimum, and may lie farther "
        "from Retrain than doing nothing: use response='constrained', more newton_steps or damping",
    )
    MAX_ITERATIONS = (
        "max_iterations",
        "the solver stopped at its limit, or at its numbers' rounding, before the residual that "
        "was asked: use solver='direct' with representation='dense', damping, or, of rows, a "
        "larger solver_tol or row_dtype='float64'",
    )

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def worst(cls, statuses: Iterable[Status]) -> Status:
        """The last of them in the order of this class; "converged" where there is none."""
        order = list(cls)
        return max(statuses, key=order.index, default=cls.CONVERGED)


@dataclass(frozen=True)
class Solution:
    """A solution with its evidence: ‖A x - b‖ / ‖b‖, iterations and how it ended.

    ``tol`` is the residual that was asked; None of a direct solve, which ends at rounding.
    """

    value: Tensor
    residual: float
    iterations: int
    status: Status
    tol: float | None = None


def relative_residual(residual: Tensor, rhs: Tensor) -> float:
    """‖residual‖ / ‖rhs‖ of the worst system (..., d); 0 where the right-hand side is 0."""
    scale = torch.linalg.vector_norm(rhs, dim=-1)
    length = torch.linalg.vector_norm(residual, dim=-1)
    return float(torch.where(scale == 0, 0.0, length / scale).max())


def finite(solution: Solution) -> Solution:
    """The solution itself, or a `SolverError` where it holds NaN or infinity."""
    if not math.isfinite(float(torch.linalg.vector_norm(solution.value, torch.inf))):
        raise SolverError(
            f"the system gave a solution that is not finite (status {solution.status}); the "
            "memory is singular or damaged: raise damping"
        )
    return solution
