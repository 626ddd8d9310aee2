"""A view of a module's trained parameters, and its linearisation at a batch."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from lightning_muter.curvature.kept import OuterProducts
from lightning_muter.curvature.point import PointCurvature
from lightning_muter.errors import ConfigurationError
from lightning_muter.models.beside import Beside
from lightning_muter.models.logits import CALLED, LogitsForm
from lightning_muter.models.names import suggest
from lightning_muter.models.precision import computing, full_precision, widened
from lightning_muter.objectives.base import Objective
from lightning_muter.responses import Response
from lightning_muter.threats import Geometry
from lightning_muter.threats.pixels import Scaling

__all__ = [
    "Linearisation",
    "ModelView",
    "Products",
    "Seen",
    "evaluating",
    "heard",
    "measuring",
]

#: the inputs of n points that an objective looks at, the perturbed ones last
Seen = tuple[Tensor, ...]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, gradients on, no compiled graphs; everything restored after.

    Nor the fast path that ``nn.TransformerEncoder`` takes in eval mode, nor cuDNN's recurrent
    layers: the former has no derivative, the latter none in eval mode and no second one.
    """
    modes = [(m, m.training) for m in module.modules()]
    set_stance = getattr(torch.compiler, "set_stance", None)
    fast, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    try:
        if any(isinstance(m, nn.RNNBase) for m, _ in modes):
            torch.backends.cudnn.enabled = False
        torch.backends.mha.set_fastpath_enabled(False)
        if any(training for _, training in modes):
            module.eval()
        with torch.inference_mode(False), torch.enable_grad():
            if set_stance is None:
                yield
            else:  # compiled graphs have no double backward
                with set_stance("force_eager"):
                    yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, training in modes:
            if m.training != training:
                m.training = training


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """`evaluating`, with attention that can be differentiated twice; everything restored after.

    The fused attention kernels have no double backward. A module of half precision is one of
    single precision meanwhile: what moved in it is rounded when it is restored.
    """
    with (
        widened(module),
        full_precision(),
        evaluating(module),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


@dataclass(frozen=True)
class Products:
    """Matrix-free products of a batch of n points at (ω, x + δ), by double backward.

    ``parameters``: v (p) -> Σ w_i ∂ωω l_i v (p); ``inputs``: α (n, d) -> w_i ∂δδ l_i α_i (n, d).
    """

    parameters: Callable[[Tensor], Tensor]
    inputs: Callable[[Tensor], Tensor]


class Linearisation(ABC):
    """A batch at (ω, x + δ): what one forward pass says of it, computed once.

    Gradients, curvature and losses of the points all come from here. Results are float64 whatever
    the module computes in. ``seen`` are the inputs that the objective looks at, x + δ last;
    ``weights`` (n,) multiply each point's terms in sums.
    """

    def __init__(self, view: ModelView, seen: Seen, targets: Tensor, weights: Tensor) -> None:
        self.view, self.seen, self.targets, self.weights = view, seen, targets, weights

    @property
    def x(self) -> Tensor:
        """x + δ (n, ...)."""
        return self.seen[-1]

    def __len__(self) -> int:
        return self.seen[-1].shape[0]

    @abstractmethod
    def losses(self) -> Tensor:
        """l (n,)."""

    @abstractmethod
    def gradients(self) -> Tensor:
        """∇_ω l of every point (n, p), without its weight."""

    def gradient_sum(self) -> Tensor:
        """Σ weights_i ∇_ω l_i (p,)."""
        return self.weights @ self.gradients()

    @abstractmethod
    def hessian(self) -> PointCurvature:
        """Σ weights_i ∂ωω l_i."""

    def fisher(self) -> PointCurvature:
        """Σ weights_i ∇_ω l_i ∇_ω l_iᵀ."""
        usable = torch.ones_like(self.weights, dtype=torch.bool)
        return OuterProducts(self.gradients() * self.weights.sqrt().unsqueeze(1), usable)

    @abstractmethod
    def total(self, geometry: Geometry, response: Response) -> PointCurvature:
        """Σ weights_i (∂ωω l + ∂ωδ l · R · ∂δω l)."""


def heard(layer: nn.Module, inputs: list[Tensor]) -> RemovableHandle:
    """Append what a layer of one input is given, by position or by name; until removed."""

    def listen(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        inputs.extend([*args, *named.values()][:1])

    return layer.register_forward_pre_hook(listen, with_kwargs=True)


def _check_made(parameters: Mapping[str, nn.Parameter]) -> None:
    lazy = [name for name, one in parameters.items() if isinstance(one, UninitializedParameter)]
    if lazy:
        raise ConfigurationError(
            f"the parameters {lazy} have no size yet: run a batch through the module before fit, "
            "or give its lazy layers their sizes"
        )


def _parametrised(module: nn.Module, missing: Sequence[str]) -> str:
    """Why a weight is no parameter where something makes it of others."""
    for name in missing:
        path, _, last = name.rpartition(".")
        try:
            layer = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(getattr(layer, last, None), Tensor):
            own = [f"{path}.{one}" if path else one for one, _ in layer.named_parameters()]
            return (
                f": {name!r} is made of other parameters (weight or spectral normalisation), so "
                "that outputs are not linear in what is trained: take it off, or name what is "
                f"trained by parameters={own}"
            )
    return ""


class ModelView(ABC):
    """The named parameters ω (p, in order) of a module, and derivatives of a point's objective.

    ``x`` is (n, *input shape); perturbations and input gradients are flattened to (n, d). Results
    are float64 whatever the module computes in. Call inside `measuring`. With a ``scaling`` x is
    in pixels, and the way to what the module receives is a part of every graph.
    """

    def __init__(
        self,
        module: nn.Module,
        names: list[str],
        objective: Objective,
        scaling: Scaling | None = None,
        form: LogitsForm = CALLED,
    ) -> None:
        parameters = dict(module.named_parameters())
        _check_made(parameters)
        missing = [name for name in names if name not in parameters]
        if missing or not names:
            raise ConfigurationError(
                f"parameters {missing or names} are not in the module"
                f"{_parametrised(module, missing)}"
                f"{suggest((missing or ['']), parameters)}"
            )
        self.module = module
        self.logits = form.of(module)
        self.names = list(names)
        self.objective = objective
        self.loss = objective.loss
        self.scaling = scaling or Scaling()
        self.parameters = [parameters[name] for name in names]
        self.p = sum(parameter.numel() for parameter in self.parameters)
        self._bends: bool | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the module is differentiated in."""
        return computing(self.parameters[0].dtype)

    @property
    def kept_as(self) -> torch.dtype:
        """The dtype that the trained parameters are kept in."""
        return self.parameters[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

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

    def beside(self, beside: Beside) -> ModelView:
        """The same view for points that have something beside x, which forward takes."""
        if not beside and not self.logits.beside:
            return self
        found = copy.copy(self)
        found.logits = self.logits.form.of(self.module, beside)
        return found

    def received(self, x: Tensor) -> Tensor:
        """Points x (n, ...) as the module receives them; the same tensor without a scaling."""
        if self.scaling.identity:
            return x
        return self.scaling.normalised(x).to(next(self.module.parameters()).dtype)

    def outputs(self, x: Tensor) -> Tensor:
        """The logits (n, ...) at points x, with the graph to x."""
        found: Tensor = self.logits(self.received(x))
        return found

    def ascent(self, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """What an adversary ascends in the loss's place: levels (n,), gradients (n, d), float64."""
        slope = self.objective.inner.slope(self.outputs, x, reference)
        return slope.level.double(), slope.scaled.double() * slope.scale.double()

    def bends(self, x: Tensor) -> bool:
        """Whether the logits have a second derivative in x, by one probing product at some points.

        A network of ReLUs has none: all that its logits bend is at kinks. Found out once.
        """
        if self._bends is None:
            with torch.enable_grad():
                self._bends = self._probe(x)
        return self._bends

    def _probe(self, x: Tensor) -> bool:
        inputs = x.detach().requires_grad_(True)
        outputs = self.outputs(inputs).reshape(len(x), -1)
        direction = torch.linspace(0.5, 1.5, outputs.shape[1]).to(outputs)
        (g,) = torch.autograd.grad((outputs @ direction).sum(), inputs, create_graph=True)
        if not g.requires_grad:
            return False
        probe = torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype, device=g.device)
        try:
            (found,) = torch.autograd.grad(g, inputs, probe.reshape(g.shape), allow_unused=True)
        except RuntimeError:  # a layer without a double backward may bend: no method needs it here
            return True
        return found is not None and bool(found.any())

    def outer(self, seen: Seen, targets: Tensor) -> Tensor:
        """The objective's O (n,) at the module's parameters, with its graph."""
        return self.objective.outer([self.outputs(x) for x in seen], targets)

    def second_input_derivatives(self, seen: Seen, targets: Tensor) -> Tensor:
        """∂δδ O (n, d, d), one coordinate of every point at a time, float64."""
        x = seen[-1]
        inputs = x.detach().requires_grad_(True)
        losses = self.outer((*seen[:-1], inputs), targets)
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

    def products(self, seen: Seen, targets: Tensor, weights: Tensor) -> Products:
        """Second-order products through one stored graph of the points' weighted O."""
        x = seen[-1]
        inputs = x.detach().requires_grad_(True)
        losses = self.outer((*seen[:-1], inputs), targets)
        total = losses @ weights.to(losses)
        *g_omega, g_delta = torch.autograd.grad(
            total, [*self.parameters, inputs], create_graph=True
        )
        g_flat = torch.cat([g.reshape(-1) for g in g_omega])

        def along_parameters(v: Tensor) -> Tensor:
            found = _again(g_flat, v, self.parameters)
            return torch.cat([f.reshape(-1) for f in found]).double()

        def along_inputs(alpha: Tensor) -> Tensor:
            (found,) = _again(g_delta, alpha.reshape(g_delta.shape), [inputs])
            return found.reshape(len(x), -1).double()

        return Products(along_parameters, along_inputs)

    def check(self, received: Tensor) -> None:  # noqa: B027 - most views assume nothing
        """Refuse a module that is not what the view takes it for, at some points (n, ...).

        Raises:
            ConfigurationError: with what it is instead.
        """

    @abstractmethod
    def linearise(self, seen: Seen, targets: Tensor, weights: Tensor) -> Linearisation:
        """Points as the objective sees them, with weights (n,), at the module's parameters."""

    @abstractmethod
    def chunk(self, x: Tensor, response: Response, budget: int) -> int:
        """How many points like x (n, ...) have their curvature computed in ``budget`` bytes."""


def _again(outputs: Tensor, vector: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of outputsᵀ vector in what is wanted; zeros where nothing depends on it."""
    if not outputs.requires_grad:
        return [torch.zeros_like(w) for w in wanted]
    found = torch.autograd.grad(
        outputs, wanted, vector.to(outputs), retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(w) if f is None else f for w, f in zip(wanted, found, strict=True)]
