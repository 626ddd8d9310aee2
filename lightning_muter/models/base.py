"""The protocol between a model and everything second-order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_muter.errors import ConfigurationError
from lightning_muter.models.names import suggest
from lightning_muter.objectives.losses import PointLoss
from lightning_muter.responses import Response
from lightning_muter.threats import Geometry

__all__ = ["Derivatives", "Products", "evaluating", "measuring"]

#: adds a (rows, columns) block of Σ D_i to the memory: (row start, column start, block)
AddBlock = Callable[[int, int, Tensor], None]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, gradients on, no compiled graphs; everything restored after."""
    modes = [(m, m.training) for m in module.modules()]
    set_stance = getattr(torch.compiler, "set_stance", None)
    try:
        module.eval()
        with torch.inference_mode(False), torch.enable_grad():
            if set_stance is None:
                yield
            else:  # compiled graphs have no double backward
                with set_stance("force_eager"):
                    yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """`evaluating`, with attention that can be differentiated twice; everything restored after.

    The fused attention kernels, and the fast path that ``nn.TransformerEncoder`` takes in eval
    mode, have no double backward.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(module), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class Products:
    """Matrix-free products of a batch of n points at (ω, x + δ).

    ``ww``: v (p) -> Σ ∂ωω l v (p); ``wd``: α (n, d) -> Σ ∂ωδ l α (p); ``dw``: v (p) -> ∂δω l v
    (n, d); ``dd``: α (n, d) -> ∂δδ l α (n, d).
    """

    ww: Callable[[Tensor], Tensor]
    wd: Callable[[Tensor], Tensor]
    dw: Callable[[Tensor], Tensor]
    dd: Callable[[Tensor], Tensor]


class Derivatives(ABC):
    """Derivatives of l(ω, x + δ) in the named parameters ω (p, in order) and the input.

    ``x`` is (n, *input shape); perturbations and input gradients are flattened to (n, d). Results
    are float64 whatever the module computes in. Call inside `measuring`.
    """

    def __init__(self, module: nn.Module, names: list[str], loss: PointLoss) -> None:
        parameters = dict(module.named_parameters())
        missing = [name for name in names if name not in parameters]
        if missing or not names:
            raise ConfigurationError(
                f"parameters {missing or names} are not in the module"
                f"{suggest((missing or ['']), parameters)}"
            )
        self.module = module
        self.names = list(names)
        self.loss = loss
        self.parameters = [parameters[name] for name in names]
        self.p = sum(parameter.numel() for parameter in self.parameters)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the module computes in."""
        return self.parameters[0].dtype

    def get(self) -> Tensor:
        """ω (p,) as float64."""
        return torch.cat([p.detach().reshape(-1).double() for p in self.parameters])

    @torch.no_grad()
    def set(self, omega: Tensor) -> None:
        """Write ω (p,) into the module's parameters."""
        offset = 0
        for parameter in self.parameters:
            chunk = omega[offset : offset + parameter.numel()]
            parameter.copy_(chunk.reshape(parameter.shape).to(parameter))
            offset += parameter.numel()

    @contextmanager
    def at(self, omega: Tensor) -> Iterator[None]:
        """The module with ω (p,) in place; its own parameters come back bit by bit."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self.set(omega)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)

    def input_gradient(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (n,) and g = ∂_x l (n, d), both float64."""
        with torch.enable_grad():
            inputs = x.detach().requires_grad_(True)
            losses = self.loss(self.module(inputs), targets)
            (g,) = torch.autograd.grad(losses.sum(), inputs)
        return losses.detach().double(), g.reshape(len(x), -1).double()

    def second_input_derivatives(self, x: Tensor, targets: Tensor) -> Tensor:
        """∂δδ l (n, d, d), one coordinate of every point at a time, float64."""
        inputs = x.detach().requires_grad_(True)
        losses = self.loss(self.module(inputs), targets)
        (g,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
        flat = g.reshape(len(x), -1)
        rows = []
        for j in range(flat.shape[1]):
            row = None
            if flat.requires_grad:
                (row,) = torch.autograd.grad(
                    flat[:, j].sum(), inputs, retain_graph=True, allow_unused=True
                )
            rows.append(torch.zeros_like(flat) if row is None else row.reshape(len(x), -1))
        h = torch.stack([row.detach() for row in rows], dim=1).double()
        return (h + h.mT) / 2

    def products(self, x: Tensor, targets: Tensor, weights: Tensor | None = None) -> Products:
        """The four second-order products by double backward through one stored graph."""
        inputs = x.detach().requires_grad_(True)
        losses = self.loss(self.module(inputs), targets)
        total = losses.sum() if weights is None else losses @ weights.to(losses)
        grads = torch.autograd.grad(total, [*self.parameters, inputs], create_graph=True)
        g_omega = torch.cat([g.reshape(-1) for g in grads[:-1]])
        g_delta = grads[-1]

        def apply(outputs: Tensor, vector: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
            if not outputs.requires_grad:
                return [torch.zeros_like(w) for w in wanted]
            found = torch.autograd.grad(
                outputs, wanted, vector.to(outputs), retain_graph=True, allow_unused=True
            )
            return [
                torch.zeros_like(w) if f is None else f for w, f in zip(wanted, found, strict=True)
            ]

        def in_omega(outputs: Tensor, vector: Tensor) -> Tensor:
            found = apply(outputs, vector, self.parameters)
            return torch.cat([f.reshape(-1) for f in found]).double()

        def in_delta(outputs: Tensor, vector: Tensor) -> Tensor:
            return apply(outputs, vector, [inputs])[0].reshape(len(x), -1).double()

        return Products(
            ww=lambda v: in_omega(g_omega, v),
            wd=lambda a: in_omega(g_delta, a.reshape(g_delta.shape)),
            dw=lambda v: in_delta(g_omega, v),
            dd=lambda a: in_delta(g_delta, a.reshape(g_delta.shape)),
        )

    @abstractmethod
    def gradients(self, x: Tensor, targets: Tensor) -> Tensor:
        """∇_ω l of every point (n, p), float64."""

    def gradient_sum(self, x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Σ weights_i ∇_ω l_i (p,), float64."""
        return weights @ self.gradients(x, targets)

    @abstractmethod
    def add_direct(self, x: Tensor, targets: Tensor, weights: Tensor, add: AddBlock) -> None:
        """Σ weights_i ∂ωω l_i, block by block."""

    @abstractmethod
    def add_total(
        self,
        x: Tensor,
        targets: Tensor,
        weights: Tensor,
        geometry: Geometry,
        response: Response,
        add: AddBlock,
    ) -> Tensor:
        """Σ weights_i (∂ωω l + ∂ωδ l · R · ∂δω l), block by block.

        Returns which points (n,) had a usable K_i.
        """
