"""Inner responses R_i = P K_i^{-1} P and what they become at the features of a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lightning_muter.responses.matrices import Dense, DiagonalLowRank
from lightning_muter.threats import Geometry

__all__ = ["InputCurvature", "Response"]

#: vectors (n, k, d) -> ∂δδ l times them
InputCurvature = Callable[[Tensor], Tensor]


class Response(Protocol):
    """How δ* moves: from curvature (low rank V S Vᵀ, or dense H) and geometry to R.

    Both return R and a mask (n,) of points whose K_i was usable there.
    """

    @property
    def constrained(self) -> bool: ...

    @property
    def matrix_free(self) -> bool:
        """Whether `congruence` is there."""

    @property
    def rank(self) -> int:
        """How many probes a point a sketch takes; 0 for exact responses."""

    @property
    def probes(self) -> Tensor | None:
        """Probes (n, k, d) of the points at hand, where R is to be sketched."""

    def rough(self) -> Response:
        """The response to a tolerance that is enough for a step of Newton's."""

    def seeded(self, points: Tensor) -> Response:
        """The response with the probes of points (n, d); itself where nothing is sketched."""

    def sketch(
        self, geometry: Geometry, curvature: InputCurvature
    ) -> tuple[DiagonalLowRank, Tensor]:
        """An unbiased estimate of R from ``probes``, with ∂δδ l known by its products alone."""

    def low_rank(self, geometry: Geometry, v: Tensor, s: Tensor) -> tuple[DiagonalLowRank, Tensor]:
        """R for ∂δδ l = V S Vᵀ with V (n, d, C), S (n, C, C)."""

    def dense(self, geometry: Geometry, h: Tensor) -> tuple[Dense, Tensor]:
        """R for ∂δδ l = H (n, d, d)."""

    def congruence(
        self, geometry: Geometry, curvature: InputCurvature, jacobian: Tensor
    ) -> tuple[Dense, Tensor]:
        """J R Jᵀ (n, F, F) for J (n, F, d), with ∂δδ l known by its products alone."""
