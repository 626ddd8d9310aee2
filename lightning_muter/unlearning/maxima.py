"""The perturbations of the last pass, for the next one at the same parameters."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_muter.adversary.maximiser import InnerMaximum
from lightning_muter.models import ModelView
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import Batch

__all__ = ["LastMaxima"]

_BYTES = 256 * 2**20


class LastMaxima:
    """δ* of a pass, as long as the next passes ask for the same points at the same ω.

    A step's last trial is where the next Hessian is taken: without this every δ* of it would be
    found twice, which for a network is most of the time. What takes more than 256 MB is not kept.
    """

    def __init__(self) -> None:
        self._omega: Tensor | None = None
        self._problem: PointProblem | None = None
        self._parts: list[InnerMaximum] = []
        self._next = 0

    def begin(self, omega: Tensor, problem: PointProblem) -> None:
        """A pass over all batches starts at ω (p,)."""
        if not self._known(omega, problem):
            self._parts = []
        self._omega, self._problem, self._next = omega.clone(), problem, 0

    def _known(self, omega: Tensor, problem: PointProblem) -> bool:
        if self._omega is None or self._problem is None or not torch.equal(omega, self._omega):
            return False
        # the response has no part in where δ* is
        return replace(self._problem, response=problem.response) == problem

    def of(self, view: ModelView, batch: Batch) -> InnerMaximum | None:
        """δ* of the pass's next batch; None where the method looks at clean points."""
        problem = self._problem
        assert problem is not None
        if METHODS[problem.method].points == "clean" or len(batch) == 0:
            return None
        place = self._next
        known = self.kept(batch)
        if known is not None:
            return known
        found = problem.perturb(view, batch)
        del self._parts[place:]
        if len(self._parts) == place and self._taken() + _bytes(found) <= _BYTES:
            self._parts.append(found)
        return found

    def kept(self, batch: Batch) -> InnerMaximum | None:
        """δ* of the pass's next batch where the last pass found it; nothing is found or kept."""
        place, self._next = self._next, self._next + 1
        if place < len(self._parts) and len(self._parts[place].delta) == len(batch):
            return self._parts[place]
        return None

    def _taken(self) -> int:
        return sum(_bytes(one) for one in self._parts)


def _bytes(found: InnerMaximum) -> int:
    return found.delta.nbytes + found.grad.nbytes
