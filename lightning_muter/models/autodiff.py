"""Any named parameters, by torch.func."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from lightning_muter.curvature.autodiff import AutodiffHessian, AutodiffTotal
from lightning_muter.curvature.point import PointCurvature
from lightning_muter.models.base import Linearisation, ModelView, Seen
from lightning_muter.models.beside import Name
from lightning_muter.responses import Response
from lightning_muter.threats import Geometry

__all__ = ["Autodiff", "AutodiffLinearisation"]

PointFunction = Callable[..., Tensor]


class Autodiff(ModelView):
    """Second derivatives of any model that ``torch.func`` can differentiate twice.

    Costs O(p) backward passes a batch for ∂ωω and O(d) a batch for ∂ωδ and ∂δδ: exact and
    general, meant for p and d of some thousands at the most.
    """

    def point_function(self) -> tuple[PointFunction, Tensor]:
        """(ω, y, beside, *seen) -> O of one point, and the module's ω (p,).

        ``beside`` holds the tensors of which the point has its own row.
        """
        logits, shapes = self.logits, [p.shape for p in self.parameters]
        sizes = [p.numel() for p in self.parameters]

        def loss(omega: Tensor, y: Tensor, own: dict[Name, Tensor], *seen: Tensor) -> Tensor:
            parts = torch.split(omega, sizes)
            values = {
                f"module.{name}": part.reshape(shape)
                for name, part, shape in zip(self.names, parts, shapes, strict=True)
            }
            rows = {name: one.unsqueeze(0) for name, one in own.items()}
            beside = logits.beside.with_tensors(rows)
            outputs = [
                functional_call(logits, values, (self.received(x.unsqueeze(0)), beside))
                for x in seen
            ]
            return self.objective.outer(outputs, y.unsqueeze(0)).squeeze(0)

        return loss, torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def linearise(self, seen: Seen, targets: Tensor, weights: Tensor) -> AutodiffLinearisation:
        return AutodiffLinearisation(self, seen, targets, weights)

    def chunk(self, x: Tensor, response: Response, budget: int) -> int:
        d = x[0].numel()
        return max(1, budget // (8 * (3 * self.p * d + 4 * d * d)))


class AutodiffLinearisation(Linearisation):
    """A batch of `Autodiff`: nothing is shared between points but the graph of one pass."""

    view: Autodiff

    def losses(self) -> Tensor:
        with torch.no_grad():
            return self.view.outer(self.seen, self.targets).detach().double()

    def gradients(self) -> Tensor:
        loss, omega = self.view.point_function()
        own = self.view.logits.beside.tensors()
        over = (None, 0, 0 if own else None, *(0 for _ in self.seen))
        gradients: Tensor = vmap(grad(loss), over)(omega, self.targets, own, *self.seen)
        return gradients.detach().double()

    def hessian(self) -> PointCurvature:
        products = self.view.products(self.seen, self.targets, self.weights)
        return AutodiffHessian(products.parameters, self.view.p, self.weights)

    def total(self, geometry: Geometry, response: Response) -> PointCurvature:
        view, seen, targets = self.view, self.seen, self.targets
        loss, omega = view.point_function()
        own = view.logits.beside.tensors()
        over = (None, 0, 0 if own else None, *(0 for _ in seen))
        mixed = vmap(jacrev(grad(loss), argnums=2 + len(seen)), over)(omega, targets, own, *seen)
        mixed = mixed.detach().reshape(len(self), view.p, -1).double()  # ∂ωδ O
        r, usable = response.dense(geometry, view.second_input_derivatives(seen, targets))
        products = view.products(seen, targets, self.weights)
        return AutodiffTotal(products.parameters, mixed, r, usable, self.weights)
