"""Curvature of any named parameters, from derivatives of one point at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_muter.curvature.kept import Materialised
from lightning_muter.curvature.point import AddBlock, KeptCurvature, PointCurvature
from lightning_muter.responses import Dense

__all__ = ["AutodiffHessian", "AutodiffTotal"]


class AutodiffHessian(PointCurvature):
    """Σ w_i ∂ωω l_i, known by its products.

    Args:
        product: v (p,) -> Σ w_i ∂ωω l_i v (p,).
        p: how many parameters.
        weights: (n,).
    """

    def __init__(self, product: Callable[[Tensor], Tensor], p: int, weights: Tensor) -> None:
        super().__init__(torch.ones_like(weights, dtype=torch.bool))
        self._product, self.p, self.weights = product, p, weights

    def add_to(self, add: AddBlock) -> None:
        for j in range(self.p):
            unit = self.weights.new_zeros(self.p)
            unit[j] = 1.0
            add(0, j, self.direct(unit).unsqueeze(1))

    def kept(self) -> Sequence[KeptCurvature]:
        return [Materialised.of([self], self.p, self.weights.device)]

    def direct(self, v: Tensor) -> Tensor:
        return self._product(v)


class AutodiffTotal(AutodiffHessian):
    """Σ w_i (∂ωω l + ∂ωδ l · R · ∂δω l); the inner unknowns are perturbations of the input.

    Args:
        product: as in `AutodiffHessian`.
        mixed: ∂ωδ l (n, p, d).
        response: R (n, d, d).
        usable: which points (n,) had a usable K.
        weights: (n,).
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        mixed: Tensor,
        response: Dense,
        usable: Tensor,
        weights: Tensor,
    ) -> None:
        super().__init__(product, mixed.shape[1], weights)
        self.mixed, self.response, self.usable = mixed, response, usable

    def add_to(self, add: AddBlock) -> None:
        super().add_to(add)
        weighted = self.weights[:, None, None] * self.response.apply(self.mixed.mT).mT
        left = weighted.permute(1, 0, 2).reshape(self.p, -1)
        add(0, 0, left @ self.mixed.permute(1, 0, 2).reshape(self.p, -1).T)

    @property
    def inner_size(self) -> int:
        return self.mixed.shape[0] * self.mixed.shape[2]

    def couple(self, v: Tensor) -> Tensor:
        return (v @ self.mixed).reshape(-1)

    def spread(self, alpha: Tensor) -> Tensor:
        return torch.einsum("npd,nd->p", self.mixed, alpha.reshape(len(self.mixed), -1))

    def respond(self, alpha: Tensor) -> Tensor:
        moved = self.response.apply(alpha.reshape(len(self.mixed), -1, 1)).squeeze(2)
        return (moved * self.weights.unsqueeze(1)).reshape(-1)

    def response_diagonal(self) -> Tensor:
        return (self.response.main_diagonal() * self.weights.unsqueeze(1)).reshape(-1)
