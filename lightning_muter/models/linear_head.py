"""A linear head on frozen features: every second derivative in closed form (docs/theory.md)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_muter.curvature.head import HeadHessian, HeadPoints, HeadTotal
from lightning_muter.curvature.point import PointCurvature
from lightning_muter.errors import ConfigurationError
from lightning_muter.models.base import Linearisation, ModelView
from lightning_muter.models.logits import CALLED, LogitsForm
from lightning_muter.models.names import linear_layers, suggest
from lightning_muter.objectives.losses import PointLoss
from lightning_muter.objectives.output_curvature import Outer
from lightning_muter.responses import Dense, DiagonalLowRank, InputCurvature, Response
from lightning_muter.threats import Geometry

__all__ = ["FeatureHead", "HeadLinearisation", "LinearHead"]

_SOLVE = 10  # products with ∂δδ l that a conjugate gradient solve takes, about
_PASSES = 40  # through the network that an iteration for a point's sketch takes, about
_PROBED = 64  # points that are sketched together at the least: smaller batches waste the network


class LinearHead(ModelView):
    """z = W h + b with h = φ(x + δ) frozen; the perturbation lives at the module's input.

    The features are read by a forward pre-hook on the head, so that the network need not be
    split; ∂φ/∂x comes from one vector-Jacobian product a feature, batched over points, and is
    skipped when the head reads the input itself.
    """

    def __init__(
        self, module: nn.Module, head: str, loss: PointLoss, form: LogitsForm = CALLED
    ) -> None:
        modules = dict(module.named_modules())
        if head not in modules:
            raise ConfigurationError(
                f"head={head!r} is no submodule{suggest([head], linear_layers(module))}"
            )
        layer = modules[head]
        if not isinstance(layer, nn.Linear):
            raise ConfigurationError(
                f"head={head!r} is a {type(layer).__name__}, a torch.nn.Linear is needed for the "
                f"exact path{suggest([head], linear_layers(module))}; or name its parameters with "
                "parameters=[...] to use Autodiff instead"
            )
        names = [f"{head}.weight"] + ([f"{head}.bias"] if layer.bias is not None else [])
        super().__init__(module, names, loss, form)
        self.layer = layer
        self._bends: bool | None = None

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The head's input h (n, F) and the module's outputs (n, ...), with the graph to x."""
        seen: list[Tensor] = []
        handle = self.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            outputs = self.logits(x)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise ConfigurationError(
                f"the head ran {len(seen)} times in one forward pass; a linear head runs once"
            )
        h = seen[0].reshape(len(x), -1)
        if h.shape[1] != self.layer.in_features:
            raise ConfigurationError(
                f"the head got {tuple(seen[0].shape)}, one feature vector a point is needed"
            )
        if outputs.numel() != len(x) * self.layer.out_features:
            raise ConfigurationError(
                f"the head has {self.layer.out_features} outputs but forward returned shape "
                f"{tuple(outputs.shape)}: forward must return the head's own outputs"
            )
        return h, outputs

    def linearise(self, x: Tensor, targets: Tensor, weights: Tensor) -> HeadLinearisation:
        return HeadLinearisation(self, x, targets, weights)

    def chunk(self, x: Tensor, response: Response, budget: int) -> int:
        d, f = x[0].numel(), self.layer.in_features
        if f == d:
            return max(1, budget // (16 * 8 * d))
        if response.rank:
            return max(_PROBED, budget // (8 * d * 8 * response.rank))
        dense = 4 * d * d if self.prefers_dense(x) else 0
        return max(1, budget // (8 * (8 * f * d + 3 * f * f + dense)))

    def prefers_dense(self, x: Tensor) -> bool:
        """Whether all of ∂δδ l (d products a point) is cheaper than solves for J's F rows."""
        return x[0].numel() <= _SOLVE * self.layer.in_features

    def feature_response(
        self, points: HeadLinearisation, geometry: Geometry, response: Response
    ) -> tuple[DiagonalLowRank | Dense, Tensor]:
        """B = J R Jᵀ (n, F, F), and which points (n,) had a usable K."""
        w = points.head.weight
        if points.reads_input:
            s = points.head.s.dense()
            return response.low_rank(geometry, w.T.expand(len(points), -1, -1), s)
        x, targets = points.x, points.targets
        if response.probes is not None:
            probed, usable = response.sketch(geometry, self._curvature_products(points))
            factors = self._push(x, probed.factors)
            nothing = torch.zeros_like(factors[:, 0])
            return DiagonalLowRank(nothing, factors, probed.coefficients), usable
        jacobian, bends = self._jacobian(x, points.head.r)
        if bends and response.matrix_free and not self.prefers_dense(x):
            return response.congruence(geometry, self._input_curvature(x, targets), jacobian)
        if bends:
            r, usable = response.dense(geometry, self.second_input_derivatives(x, targets))
            return r.congruence(jacobian), usable
        low, usable = response.low_rank(geometry, (w @ jacobian).mT, points.head.s.dense())
        return low.congruence(jacobian), usable

    def _curvature_products(self, points: HeadLinearisation) -> InputCurvature:
        """Products with ∂δδ l of a batch, by whichever way takes fewer passes through the network.

        Where φ is piecewise linear ∂δδ l = (WJ)ᵀ S (WJ): one pass an output, and none a product.
        """
        s = points.head.s
        inputs = points.x.detach().requires_grad_(True)
        h, outputs = self.features(inputs)
        weights = points.head.r.to(h) @ self.layer.weight.detach()
        few = self.layer.out_features - s.sums_to_zero <= _PASSES
        if not few or self._has_second_order(inputs, h, weights):
            return self._input_curvature(points.x, points.targets)
        z = outputs.reshape(len(h), -1)
        if s.sums_to_zero:  # differences to the last output serve, since S 1 = 0
            z = z[:, :-1] - z[:, -1:]
        rows = [torch.autograd.grad(one.sum(), inputs, retain_graph=True)[0] for one in z.T]
        slopes = torch.stack([row.reshape(len(h), -1) for row in rows], dim=1).double()
        k = slopes.shape[1]
        middle = s.dense()[:, :k, :k]

        def curvature(vectors: Tensor) -> Tensor:
            return ((vectors @ slopes.mT) @ middle) @ slopes

        return curvature

    def _input_curvature(self, x: Tensor, targets: Tensor) -> InputCurvature:
        ones = torch.ones(len(x), dtype=torch.float64, device=x.device)
        product = self.products(x, targets, ones).inputs

        def curvature(vectors: Tensor) -> Tensor:
            rows = [product(vectors[:, k]) for k in range(vectors.shape[1])]
            return torch.stack(rows, dim=1)

        return curvature

    def _push(self, x: Tensor, vectors: Tensor) -> Tensor:
        """J times vectors (n, k, d), without J: (n, k, F)."""
        inputs = x.detach().requires_grad_(True)
        h, _ = self.features(inputs)
        dual = torch.zeros_like(h, requires_grad=True)
        (pulled,) = torch.autograd.grad(h, inputs, dual, create_graph=True)
        rows = []
        for k in range(vectors.shape[1]):
            vector = vectors[:, k].reshape(x.shape).to(x)
            (row,) = torch.autograd.grad(pulled, dual, vector, retain_graph=True)
            rows.append(row)
        return torch.stack(rows, dim=1).double()

    def _jacobian(self, x: Tensor, r: Tensor) -> tuple[Tensor, bool]:
        """J (n, F, d), and whether φ has second derivatives here."""
        inputs = x.detach().requires_grad_(True)
        h, _ = self.features(inputs)
        bends = self._has_second_order(inputs, h, r.to(h) @ self.layer.weight.detach())
        rows = []
        for k in range(h.shape[1]):
            (row,) = torch.autograd.grad(h[:, k].sum(), inputs, retain_graph=True)
            rows.append(row.reshape(len(x), -1))
        return torch.stack(rows, dim=1).detach().double(), bends

    def _has_second_order(self, inputs: Tensor, h: Tensor, weights: Tensor) -> bool:
        """Whether Σ_k (Wᵀr)_k ∇²h_k is not identically zero, by one probing product."""
        if self._bends is not None:
            return self._bends
        (g,) = torch.autograd.grad((h * weights).sum(), inputs, create_graph=True)
        found = None
        if g.requires_grad:
            probe = torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype, device=g.device)
            (found,) = torch.autograd.grad(
                g, inputs, probe.reshape(g.shape), retain_graph=True, allow_unused=True
            )
        bends = found is not None and bool(found.any())
        if bool(weights.any()):
            self._bends = bends
        return bends


class FeatureHead(LinearHead):
    """A linear head whose input is what the adversary perturbs: the paper's networks variant."""

    def feature_response(
        self, points: HeadLinearisation, geometry: Geometry, response: Response
    ) -> tuple[DiagonalLowRank | Dense, Tensor]:
        """B = R (n, F, F) at the head's input."""
        w, s = points.head.weight, points.head.s.dense()
        return response.low_rank(geometry, w.T.expand(len(points), -1, -1), s)


class HeadLinearisation(Linearisation):
    """A batch of a head's points: h, z, r and S from one forward pass."""

    view: LinearHead

    def __init__(self, view: LinearHead, x: Tensor, targets: Tensor, weights: Tensor) -> None:
        super().__init__(view, x, targets, weights)
        with torch.no_grad():
            h, outputs = view.features(x)
        h, self._outputs = h.detach(), outputs.detach()  # a forward may switch gradients on
        # the head of a linear model reads the input's own memory: J is the identity
        self.reads_input = h.data_ptr() == x.data_ptr() and h.numel() == x.numel()
        r, s = view.loss.derivatives(self._outputs.reshape(len(x), -1).double(), targets)
        h = h.double()
        if view.layer.bias is not None:
            h = torch.cat([h, torch.ones_like(h[:, :1])], dim=1)
        self.head = HeadPoints(h, r, s, view.layer.weight.detach().double(), weights)

    def losses(self) -> Tensor:
        return self.view.loss(self._outputs, self.targets).double()

    def gradients(self) -> Tensor:
        head, f = self.head, self.head.weight.shape[1]
        weight = (head.r.unsqueeze(2) * head.features[:, None, :f]).reshape(len(self), -1)
        return torch.cat([weight, head.r], dim=1) if head.biased else weight

    def gradient_sum(self) -> Tensor:
        weighted = self.head.r * self.weights.unsqueeze(1)
        return self.head.vector_form(weighted.T @ self.head.features)

    def hessian(self) -> PointCurvature:
        return HeadHessian(self.head)

    def fisher(self) -> PointCurvature:
        return HeadHessian(replace(self.head, s=Outer(self.head.r)))

    def total(self, geometry: Geometry, response: Response) -> PointCurvature:
        return HeadTotal(self.head, *self.view.feature_response(self, geometry, response))
