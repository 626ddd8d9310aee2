"""A linear head on frozen features: exact blocks from Gram matrices (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.models.base import AddBlock, Derivatives
from lightning_muter.models.names import linear_layers, suggest
from lightning_muter.objectives.losses import PointLoss
from lightning_muter.responses import Dense, DiagonalLowRank, Response
from lightning_muter.threats import Geometry

__all__ = ["LinearHead"]

_SOLVE = 10  # products with ∂δδ l that a conjugate gradient solve takes, about


class LinearHead(Derivatives):
    """z = W h + b with h = φ(x + δ) frozen: every second derivative in closed form.

    The features are read by a forward pre-hook on the head, so that the network need not be
    split; ∂φ/∂x comes from one vector-Jacobian product a feature, batched over points, and is
    skipped when the head reads the input itself. With ``feature_space`` the perturbation lives at
    the head's input (the paper's published variant for networks).
    """

    def __init__(
        self, module: nn.Module, head: str, loss: PointLoss, feature_space: bool = False
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
        super().__init__(module, names, loss)
        self.layer = layer
        self.feature_space = feature_space
        self._second_order: bool | None = None
        self._reads_input = False

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The head's input h (n, F) and the outputs z (n, C), with the graph to x."""
        seen: list[Tensor] = []
        handle = self.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            outputs = self.module(x)
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
        return h, outputs.reshape(len(x), -1)

    def gradient_sum(self, x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        h, r, _ = self._head(x, targets)
        r = r * weights.unsqueeze(1)
        weight = (r.T @ h).reshape(-1)
        return torch.cat([weight, r.sum(dim=0)]) if self.layer.bias is not None else weight

    def gradients(self, x: Tensor, targets: Tensor) -> Tensor:
        h, r, _ = self._head(x, targets)
        weight = (r.unsqueeze(2) * h.unsqueeze(1)).reshape(len(x), -1)
        return torch.cat([weight, r], dim=1) if self.layer.bias is not None else weight

    def _head(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            h, z = self.features(x)
        # the head of a linear model reads the input's own memory: J is the identity
        self._reads_input = h.data_ptr() == x.data_ptr() and h.numel() == x.numel()
        r, s = self.loss.derivatives(z.double(), targets)
        return h.double(), r, s

    def add_direct(self, x: Tensor, targets: Tensor, weights: Tensor, add: AddBlock) -> None:
        h, _, s = self._head(x, targets)
        h, s = self._extend(h), s * weights[:, None, None]
        c = s.shape[1]
        for a in range(c):
            for b in range(a, c):  # S ⊗ h̃h̃ᵀ
                self._add(a, b, h.T @ (h * s[:, a, b, None]), add)

    def _extend(self, h: Tensor) -> Tensor:
        if self.layer.bias is None:
            return h
        return torch.cat([h, torch.ones_like(h[:, :1])], dim=1)

    def _add(self, a: int, b: int, block: Tensor, add: AddBlock) -> None:
        """Place the (F̃, F̃) block of classes (a, b), and of (b, a), in the order of ω."""
        f, c = self.layer.in_features, self.layer.out_features
        for i, j, m in [(a, b, block)] + ([(b, a, block.T)] if a != b else []):
            add(i * f, j * f, m[:f, :f])
            if self.layer.bias is not None:
                add(i * f, c * f + j, m[:f, f:])
                add(c * f + i, j * f, m[f:, :f])
                add(c * f + i, c * f + j, m[f:, f:])

    def add_total(
        self,
        x: Tensor,
        targets: Tensor,
        weights: Tensor,
        geometry: Geometry,
        response: Response,
        add: AddBlock,
    ) -> Tensor:
        h, r, s = self._head(x, targets)
        w = self.layer.weight.detach().double()
        b, usable = self._feature_response(x, targets, geometry, response, w, s)
        sw = s @ w  # (n, C, F): rows (S W)_a
        t = b.apply(sw.mT)  # (n, F, C): columns B (S W)_aᵀ
        # direct weight and h̃h̃ᵀ's indirect one
        quadratic = (s + sw @ t) * weights[:, None, None]
        weighted = r * weights.unsqueeze(1)
        h, f = self._extend(h), self.layer.in_features
        for a in range(s.shape[1]):
            for c in range(a, s.shape[1]):
                # G = r ⊗ I + (S W) ⊗ h̃, so G B Gᵀ falls into the four terms below
                left = h * (0.5 * quadratic[:, a, c, None])
                left[:, :f].addcmul_(weighted[:, a, None], t[:, :, c])
                if a == c:
                    half = h.T @ left
                    block = half + half.T
                else:
                    right = h * (0.5 * quadratic[:, a, c, None])
                    right[:, :f].addcmul_(weighted[:, c, None], t[:, :, a])
                    block = left.T @ h
                    block.addmm_(h.T, right)
                b.add_weighted_sum(block[:f, :f], weighted[:, a] * r[:, c])
                self._add(a, c, block, add)
        return usable

    def _feature_response(
        self,
        x: Tensor,
        targets: Tensor,
        geometry: Geometry,
        response: Response,
        w: Tensor,
        s: Tensor,
    ) -> tuple[DiagonalLowRank | Dense, Tensor]:
        """B = J R Jᵀ (n, F, F)."""
        if self.feature_space or self._reads_input:
            return response.low_rank(geometry, w.T.expand(len(x), -1, -1), s)
        if response.probes is not None:
            probed, usable = response.sketch(geometry, self._input_curvature(x, targets))
            factors = self._push(x, probed.factors)
            nothing = torch.zeros_like(factors[:, 0])
            return DiagonalLowRank(nothing, factors, probed.coefficients), usable
        jacobian, bends = self._jacobian(x, targets)
        if bends and response.matrix_free and not self.prefers_dense(x):
            return response.congruence(geometry, self._input_curvature(x, targets), jacobian)
        if bends:
            r, usable = response.dense(geometry, self.second_input_derivatives(x, targets))
            return r.congruence(jacobian), usable
        low, usable = response.low_rank(geometry, (w @ jacobian).mT, s)
        return low.congruence(jacobian), usable

    def prefers_dense(self, x: Tensor) -> bool:
        """Whether all of ∂δδ l (d products a point) is cheaper than solves for J's F rows."""
        return x[0].numel() <= _SOLVE * self.layer.in_features

    def _input_curvature(self, x: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
        dd = self.products(x, targets).dd

        def curvature(vectors: Tensor) -> Tensor:
            rows = [dd(vectors[:, k]) for k in range(vectors.shape[1])]
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

    def _jacobian(self, x: Tensor, targets: Tensor) -> tuple[Tensor, bool]:
        """J (n, F, d), and whether φ has second derivatives here."""
        inputs = x.detach().requires_grad_(True)
        h, z = self.features(inputs)
        r, _ = self.loss.derivatives(z.detach().double(), targets)
        bends = self._bends(inputs, h, (r.to(h) @ self.layer.weight.detach()))
        rows = []
        for k in range(h.shape[1]):
            (row,) = torch.autograd.grad(h[:, k].sum(), inputs, retain_graph=True)
            rows.append(row.reshape(len(x), -1))
        return torch.stack(rows, dim=1).detach().double(), bends

    def _bends(self, inputs: Tensor, h: Tensor, weights: Tensor) -> bool:
        """Whether Σ_k (Wᵀr)_k ∇²h_k is not identically zero, by one probing product."""
        if self._second_order is not None:
            return self._second_order
        (g,) = torch.autograd.grad((h * weights).sum(), inputs, create_graph=True)
        found = None
        if g.requires_grad:
            probe = torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype, device=g.device)
            (found,) = torch.autograd.grad(
                g, inputs, probe.reshape(g.shape), retain_graph=True, allow_unused=True
            )
        bends = found is not None and bool(found.any())
        if bool(weights.any()):
            self._second_order = bends
        return bends
