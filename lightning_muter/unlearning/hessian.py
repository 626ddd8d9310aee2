"""`total_hessian`: the reference that users and tests can call on its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.models import Autodiff, Derivatives, LinearHead
from lightning_muter.models.base import measuring
from lightning_muter.models.names import listed
from lightning_muter.objectives.losses import LossFunction, PointLoss, resolve_loss
from lightning_muter.responses import resolve_response
from lightning_muter.threats import Threat
from lightning_muter.unlearning.recipe import Recipe

__all__ = ["derivatives_for", "total_hessian"]


def derivatives_for(
    module: nn.Module,
    loss: str | LossFunction | PointLoss,
    head: str | None = None,
    parameters: Sequence[str] | None = None,
    space: str = "input",
) -> Derivatives:
    """The derivative provider for a linear head or for any named parameters."""
    if (head is None) == (parameters is None):
        raise ConfigurationError(
            f"head={head!r} and parameters={parameters!r}: give exactly one of the two"
        )
    if space not in ("input", "features"):
        raise ConfigurationError(f"space={space!r} is unknown; expected 'input' or 'features'")
    resolved = resolve_loss(loss)
    if head is not None:
        return LinearHead(module, head, resolved, feature_space=space == "features")
    if space == "features":
        raise ConfigurationError("space='features' needs a linear head: give head=...")
    return Autodiff(module, list(listed(parameters) or ()), resolved)


def total_hessian(
    module: nn.Module,
    batch: tuple[Tensor, Tensor] | Sequence[Tensor],
    threat: Threat,
    *,
    head: str | None = None,
    parameters: Sequence[str] | None = None,
    loss: str | LossFunction = "cross_entropy",
    response: str = "constrained",
    inverse: str = "neumann",
    neumann_order: int = 3,
    space: str = "input",
    weight_decay: float = 0.0,
    sketch: int = 0,
    delta: Tensor | None = None,
) -> Tensor:
    """Σ_i D_i over a batch: the Hessian of its robust loss in the chosen parameters.

    A sum, not a mean; every point carries ``weight_decay`` times the identity. The order of the
    p parameters is that of the module's weight (C, F), flattened, then its bias (C).

    Args:
        module: maps x (n, ...) to outputs (n, C); measured in eval mode and left as it was.
        batch: x (n, ...) on the scale of ``threat.eps``, and targets (n,).
        threat: the constraint set.
        head: dotted name of a linear layer.
        parameters: names of parameters instead of a head.
        loss: a name or a callable (outputs, targets) -> (n,).
        response: "constrained" (ours) or "unconstrained" (the paper's eq. 4).
        inverse: with "unconstrained": "neumann" (eq. 15, 16) or "exact".
        neumann_order: the k at which the series is clipped.
        space: "input", or "features" for the variant that perturbs the head's input.
        weight_decay: λ of the training objective.
        sketch: seeded probes a point for the inner response of a network; 0 for the exact one.
        delta: the maximisers (n, ...), if they are known; found otherwise.

    Returns:
        A symmetric matrix (p, p), float64, on the batch's device.

    Raises:
        ConfigurationError: the head is no linear layer, or the loss does not fit the outputs.

    Example:
        >>> import torch
        >>> from lightning_muter import L2Ball, total_hessian
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False)).double()
        >>> batch = (torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0]))
        >>> total_hessian(model, batch, L2Ball(eps=0.1), head="0", loss="logistic").shape
        torch.Size([3, 3])
    """
    derivatives = derivatives_for(module, loss, head, parameters, space)
    resolved = resolve_response(response, inverse, neumann_order, sketch)
    recipe = Recipe("muter", threat, resolved, weight_decay)
    x, targets = batch[0], batch[1]
    total = torch.zeros(derivatives.p, derivatives.p, dtype=torch.float64, device=x.device)

    def add(i: int, j: int, block: Tensor) -> None:
        total[i : i + block.shape[0], j : j + block.shape[1]] += block

    with measuring(module):
        inner = None if delta is None else recipe.given(derivatives, x, targets, delta)
        recipe.accumulate(derivatives, x, targets, add, inner)
    total.diagonal().add_(weight_decay * len(x))
    return total
