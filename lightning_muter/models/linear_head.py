"""A linear head on frozen features: every second derivative in closed form (docs/theory.md)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_muter.curvature.head import HeadHessian, HeadPoints, HeadTotal
from lightning_muter.curvature.paired import PairedHessian, PairedPoints, PairedTotal
from lightning_muter.curvature.point import PointCurvature
from lightning_muter.errors import ConfigurationError
from lightning_muter.linalg.rows import own_scale
from lightning_muter.models.base import Linearisation, ModelView, Seen, heard
from lightning_muter.models.logits import CALLED, LogitsForm
from lightning_muter.models.names import linear_layers, suggest
from lightning_muter.objectives.base import Objective
from lightning_muter.objectives.output_curvature import Full, Outer
from lightning_muter.objectives.trades import BoundTRADES
from lightning_muter.responses import Dense, DiagonalLowRank, InputCurvature, Response
from lightning_muter.threats import Geometry
from lightning_muter.threats.pixels import Scaling

__all__ = ["FeatureHead", "HeadLinearisation", "LinearHead"]

_SAME = 1e-3  # features of one point differ by rounding alone
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
        self,
        module: nn.Module,
        head: str,
        objective: Objective,
        scaling: Scaling | None = None,
        form: LogitsForm = CALLED,
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
        super().__init__(module, names, objective, scaling, form)
        self.layer = layer
        self._linear = True  # until a forward pass shows otherwise

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The head's input h (n, F) and the module's outputs (n, ...), with the graph to x."""
        return self.run(self.received(x))

    def run(self, received: Tensor) -> tuple[Tensor, Tensor]:
        """The same at inputs (n, ...) as the module receives them."""
        seen: list[Tensor] = []
        handle = heard(self.layer, seen)
        try:
            outputs = self.logits(received)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise ConfigurationError(
                f"the head ran {len(seen)} times in one forward pass; a linear head runs once"
            )
        n = len(received)
        h = seen[0].reshape(n, -1)
        if h.shape[1] != self.layer.in_features:
            raise ConfigurationError(
                f"the head got {tuple(seen[0].shape)}, one feature vector a point is needed"
            )
        if outputs.numel() != n * self.layer.out_features:
            raise ConfigurationError(
                f"the head has {self.layer.out_features} outputs but forward returned shape "
                f"{tuple(outputs.shape)}: forward must return the head's own outputs"
            )
        return h, outputs

    def check(self, received: Tensor) -> None:
        own = self.get()
        elsewhere = own + torch.linspace(1.0, 2.0, self.p).to(own)
        with torch.no_grad():
            before, _ = self.run(received)
            with self.at(elsewhere):
                after, _ = self.run(received)
        if float((after - before).abs().max()) > _SAME * float(before.abs().max()):
            raise ConfigurationError(
                f"the head's input moves with the head's own parameters {self.names}, while its "
                "closed forms take that input as fixed: a layer below shares or reads them (tied "
                "weights, attention over the head's rows); name them by parameters=[...] instead "
                "of head="
            )

    def ascent(self, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.straight(x) if self._linear else None
        if outputs is None:
            self._linear = False
            return super().ascent(x, reference)
        level, r = self.objective.inner.rise(outputs, reference)
        unit, scale = own_scale(r)
        slope = (unit @ self.layer.weight.detach()).double() * scale.double()
        return level.double(), self._pulled(slope, x)

    def _pulled(self, slope: Tensor, x: Tensor) -> Tensor:
        """Rows (k, d) of derivatives in what the module receives, as derivatives in x."""
        return slope if self.scaling.identity else slope * self.scaling.slope(x)

    def straight(self, x: Tensor) -> Tensor | None:
        """The outputs (n, ...) of a module that is its head alone, from x as it is; None of others.

        Then the way from x to them is the head's weight. It is told by memory: the head reads what
        the module was given, and its own output, unchanged since, is what the module returns.
        """
        received, given = self.received(x), []

        def note(
            _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
        ) -> None:
            given.append(([*args, *named.values()][0], output, output._version))

        before = received._version
        handle = self.layer.register_forward_hook(note, with_kwargs=True)
        try:
            with torch.no_grad():
                outputs = self.logits(received)
        finally:
            handle.remove()
        same = len(given) == 1 and received._version == before
        for read, made, version in given:
            same = same and _same_memory(read, received) and _same_memory(outputs, made)
            same = same and made._version == version
        return outputs.detach() if same else None

    def linearise(self, seen: Seen, targets: Tensor, weights: Tensor) -> RowLinearisation:
        if isinstance(self.objective, BoundTRADES):
            return PairedLinearisation(self, self.objective, seen, targets, weights)
        return HeadLinearisation(self, seen, targets, weights)

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
        self, points: RowLinearisation, geometry: Geometry, response: Response
    ) -> tuple[DiagonalLowRank | Dense, Tensor]:
        """B = J R Jᵀ (n, F, F), and which points (n,) had a usable K."""
        w = points.head.weight
        if points.reads_input:
            s, pulled = points.head.s.dense(), self._pulled(w, points.x)
            low, usable = response.low_rank(geometry, pulled.T.expand(len(points), -1, -1), s)
            if self.scaling.identity:
                return low, usable
            return low.scaled(self.scaling.slope(points.x)), usable
        x = points.x
        if response.probes is not None:
            probed, usable = response.sketch(geometry, self._curvature_products(points))
            factors = self._push(x, probed.factors)
            nothing = torch.zeros_like(factors[:, 0])
            return DiagonalLowRank(nothing, factors, probed.coefficients), usable
        jacobian, bends = self._jacobian(x), self.bends(x)
        if bends and response.matrix_free and not self.prefers_dense(x):
            return response.congruence(geometry, self._input_curvature(points), jacobian)
        if bends:
            h = self.second_input_derivatives(points.seen, points.targets)
            r, usable = response.dense(geometry, h)
            return r.congruence(jacobian), usable
        low, usable = response.low_rank(geometry, (w @ jacobian).mT, points.head.s.dense())
        return low.congruence(jacobian), usable

    def _curvature_products(self, points: RowLinearisation) -> InputCurvature:
        """Products with ∂δδ l of a batch, by whichever way takes fewer passes through the network.

        Where φ is piecewise linear ∂δδ l = (WJ)ᵀ S (WJ): one pass an output, and none a product.
        """
        s = points.head.s
        few = self.layer.out_features - s.sums_to_zero <= _PASSES
        if not few or self.bends(points.x):
            return self._input_curvature(points)
        inputs = points.x.detach().requires_grad_(True)
        z = self.outputs(inputs).reshape(len(inputs), -1)
        if s.sums_to_zero:  # differences to the last output serve, since S 1 = 0
            z = z[:, :-1] - z[:, -1:]
        rows = [torch.autograd.grad(one.sum(), inputs, retain_graph=True)[0] for one in z.T]
        slopes = torch.stack([row.reshape(len(z), -1) for row in rows], dim=1).double()
        k = slopes.shape[1]
        middle = s.dense()[:, :k, :k]

        def curvature(vectors: Tensor) -> Tensor:
            return ((vectors @ slopes.mT) @ middle) @ slopes

        return curvature

    def _input_curvature(self, points: RowLinearisation) -> InputCurvature:
        product = self.products(points.seen, points.targets, torch.ones_like(points.weights)).inputs

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

    def _jacobian(self, x: Tensor) -> Tensor:
        """J (n, F, d)."""
        inputs = x.detach().requires_grad_(True)
        h, _ = self.features(inputs)
        rows = []
        for k in range(h.shape[1]):
            (row,) = torch.autograd.grad(h[:, k].sum(), inputs, retain_graph=True)
            rows.append(row.reshape(len(x), -1))
        return torch.stack(rows, dim=1).detach().double()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a tensor is another one, seen in a shape that may be its own."""
    in_order = (a.is_contiguous() and b.is_contiguous()) or a.stride() == b.stride()
    same = a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype
    return same and in_order


class FeatureHead(LinearHead):
    """A linear head whose input is what the adversary perturbs: the paper's networks variant."""

    def feature_response(
        self, points: RowLinearisation, geometry: Geometry, response: Response
    ) -> tuple[DiagonalLowRank | Dense, Tensor]:
        """B = R (n, F, F) at the head's input."""
        w, s = points.head.weight, points.head.s.dense()
        return response.low_rank(geometry, w.T.expand(len(points), -1, -1), s)


class RowLinearisation(Linearisation):
    """A batch of a head's points, by the perturbed rows: h, r and S, and whether h is the input."""

    view: LinearHead
    head: HeadPoints
    reads_input: bool

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor, bool]:
        """h̃ (n, F̃), float64, and the outputs of points x (n, ...); whether h is x itself."""
        with torch.no_grad():
            received = self.view.received(x)
            h, outputs = self.view.run(received)
        h, outputs = h.detach(), outputs.detach()  # a forward may switch gradients on
        reads = _same_memory(h, received)  # as the head of a linear model does
        h = h.double()
        if self.view.layer.bias is not None:
            h = torch.cat([h, torch.ones_like(h[:, :1])], dim=1)
        return h, outputs, reads

    @property
    def _weight(self) -> Tensor:
        return self.view.layer.weight.detach().double()

    def _outer_products(self, r: Tensor, features: Tensor) -> Tensor:
        """r ⊗ h̃ (n, p) of every point, in the order of ω."""
        f = self.head.weight.shape[1]
        weight = (r.unsqueeze(2) * features[:, None, :f]).reshape(len(self), -1)
        return torch.cat([weight, r], dim=1) if self.head.biased else weight


class HeadLinearisation(RowLinearisation):
    """A batch of a head's points: h, z, r and S from one forward pass."""

    def __init__(self, view: LinearHead, seen: Seen, targets: Tensor, weights: Tensor) -> None:
        super().__init__(view, seen, targets, weights)
        h, self._outputs, self.reads_input = self._rows(self.x)
        r, s = view.loss.derivatives(self._outputs.reshape(len(self), -1).double(), targets)
        self.head = HeadPoints(h, r, s, self._weight, weights)

    def losses(self) -> Tensor:
        return self.view.loss(self._outputs, self.targets).double()

    def gradients(self) -> Tensor:
        return self._outer_products(self.head.r, self.head.features)

    def gradient_sum(self) -> Tensor:
        weighted = self.head.r * self.weights.unsqueeze(1)
        return self.head.vector_form(weighted.T @ self.head.features)

    def hessian(self) -> PointCurvature:
        return HeadHessian(self.head)

    def fisher(self) -> PointCurvature:
        return HeadHessian(replace(self.head, s=Outer(self.head.r)))

    def total(self, geometry: Geometry, response: Response) -> PointCurvature:
        return HeadTotal(self.head, *self.view.feature_response(self, geometry, response))


class PairedLinearisation(RowLinearisation):
    """A batch of a head's points under TRADES: the rows of x and of x + δ."""

    def __init__(
        self,
        view: LinearHead,
        objective: BoundTRADES,
        seen: Seen,
        targets: Tensor,
        weights: Tensor,
    ) -> None:
        super().__init__(view, seen, targets, weights)
        clean, c, _ = self._rows(seen[0])
        perturbed, a, self.reads_input = self._rows(seen[1])
        self._losses = objective.outer((c, a), targets).double()
        self._r, r, s = objective.derivatives(c.double(), a.double(), targets)
        self._pairs = PairedPoints(clean, perturbed, r, s, self._weight, weights, self._r)
        self.head = HeadPoints(perturbed, r, Full(s.dense()[2]), self._weight, weights)

    def losses(self) -> Tensor:
        return self._losses

    def gradients(self) -> Tensor:
        own = self._outer_products(self._r, self._pairs.clean)
        return own + self._outer_products(self._pairs.r, self._pairs.perturbed)

    def gradient_sum(self) -> Tensor:
        c, a = (r * self.weights.unsqueeze(1) for r in (self._r, self._pairs.r))
        return self.head.vector_form(self._pairs.gather(c, a))

    def hessian(self) -> PointCurvature:
        return PairedHessian(self._pairs)

    def total(self, geometry: Geometry, response: Response) -> PointCurvature:
        return PairedTotal(self._pairs, *self.view.feature_response(self, geometry, response))
