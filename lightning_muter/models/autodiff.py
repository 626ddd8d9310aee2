"""Any named parameters, by torch.func."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from lightning_muter.models.base import AddBlock, Derivatives
from lightning_muter.responses import Response
from lightning_muter.threats import Geometry

__all__ = ["Autodiff"]

PointFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class Autodiff(Derivatives):
    """Second derivatives of any model that ``torch.func`` can differentiate twice.

    Costs O(p) backward passes a batch for ∂ωω and O(d) a batch for ∂ωδ and ∂δδ: exact and
    general, meant for p and d of some thousands at the most.
    """

    def _point(self) -> tuple[PointFunction, Tensor]:
        module, shapes = self.module, [p.shape for p in self.parameters]
        sizes = [p.numel() for p in self.parameters]

        def loss(omega: Tensor, x: Tensor, y: Tensor) -> Tensor:
            parts = torch.split(omega, sizes)
            values = {
                name: part.reshape(shape)
                for name, part, shape in zip(self.names, parts, shapes, strict=True)
            }
            outputs = functional_call(module, values, (x.unsqueeze(0),))
            return self.loss(outputs, y.unsqueeze(0)).squeeze(0)

        return loss, torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def gradients(self, x: Tensor, targets: Tensor) -> Tensor:
        loss, omega = self._point()
        gradients: Tensor = vmap(grad(loss), (None, 0, 0))(omega, x, targets)
        return gradients.detach().double()

    def add_direct(self, x: Tensor, targets: Tensor, weights: Tensor, add: AddBlock) -> None:
        products = self.products(x, targets, weights)
        for j in range(self.p):
            unit = torch.zeros(self.p, dtype=torch.float64, device=x.device)
            unit[j] = 1.0
            add(0, j, products.ww(unit).unsqueeze(1))

    def add_total(
        self,
        x: Tensor,
        targets: Tensor,
        weights: Tensor,
        geometry: Geometry,
        response: Response,
        add: AddBlock,
    ) -> Tensor:
        self.add_direct(x, targets, weights, add)
        loss, omega = self._point()
        mixed = vmap(jacrev(grad(loss), argnums=1), (None, 0, 0))(omega, x, targets)
        mixed = mixed.detach().reshape(len(x), self.p, -1).double()  # ∂ωδ l
        r, usable = response.dense(geometry, self.second_input_derivatives(x, targets))
        weighted = weights[:, None, None] * (mixed @ r.matrices)
        left = weighted.permute(1, 0, 2).reshape(self.p, -1)
        add(0, 0, left @ mixed.permute(1, 0, 2).reshape(self.p, -1).T)
        return usable
