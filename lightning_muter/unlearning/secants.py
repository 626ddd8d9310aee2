"""A curvature's solves bettered by the steps that were taken: the BFGS method's inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.unlearning.kinks import Solve

__all__ = ["Secants"]


class Secants:
    """H⁻¹ for a curvature that has y = H s for the last steps s and changes y of the gradient.

    Of all such matrices it is the one nearest to the curvature that it began with, in the metric
    of the BFGS method. Source: Nocedal and Wright, Numerical Optimization (2006), algorithm 7.4.

    Args:
        solve: with the curvature that it begins with, symmetric and positive definite.
        gradient: (p,) where the first step begins.
    """

    def __init__(self, solve: Solve, gradient: Tensor) -> None:
        self._begun = solve
        self._gradient = gradient
        self._known: list[tuple[Tensor, Tensor, Tensor]] = []

    def step(self) -> Tensor:
        """H⁻¹ g (p,) at the last gradient g."""
        rest, shares = self._gradient, []
        for s, y, along in reversed(self._known):
            shares.append(torch.dot(s, rest) / along)
            rest = rest - shares[-1] * y
        found = self._begun(rest.unsqueeze(1)).squeeze(1)
        for s, y, along in self._known:
            found = found + (shares.pop() - torch.dot(y, found) / along) * s
        return found

    def learn(self, moved: Tensor, gradient: Tensor) -> None:
        """A step s (p,) was taken, and the gradient (p,) is another one."""
        y, self._gradient = gradient - self._gradient, gradient
        along = torch.dot(moved, y)
        if float(along) > 0:  # of a strictly convex function it is, rounding aside
            self._known.append((moved, y, along))
