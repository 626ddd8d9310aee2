"""`total_hessian`: the reference that users and tests can call on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.models import BatchForm, LogitsForm, measuring, view_of
from lightning_muter.models.logits import Forward, Output
from lightning_muter.objectives.module_loss import loss_in
from lightning_muter.objectives.resolve import AnyLoss
from lightning_muter.objectives.trades import TRADES
from lightning_muter.responses import resolve_response
from lightning_muter.threats import Threat
from lightning_muter.unlearning.point_problem import PointProblem
from lightning_muter.unlearning.points import checked

__all__ = ["total_hessian"]


def total_hessian(
    module: nn.Module,
    batch: Any,
    threat: Threat,
    *,
    head: str | None = None,
    parameters: Sequence[str] | None = None,
    loss: AnyLoss = "cross_entropy",
    objective: TRADES | None = None,
    response: str = "constrained",
    inverse: str = "neumann",
    neumann_order: int = 3,
    space: str = "input",
    weight_decay: float = 0.0,
    sketch: int = 0,
    delta: Tensor | None = None,
    forward: Forward | None = None,
    output: Output | None = None,
) -> Tensor:
    """Σ_i D_i over a batch: the Hessian of its robust loss in the chosen parameters.

    A sum, not a mean; every point carries ``weight_decay`` times the identity. The order of the
    p parameters is that of the module's weight (C, F), flattened, then its bias (C).

    Args:
        module: maps x (n, ...) to outputs (n, C); measured in eval mode and left as it was.
        batch: x (n, ...) as training receives it, and targets (n,); or a dictionary of these by
            their usual names, with the entries that ``forward`` takes beside x.
        threat: the constraint set.
        head: dotted name of a linear layer.
        parameters: names of parameters instead of a head.
        loss: a name, a loss module of torch, the name of an attribute of the module that is one, or
            a callable (outputs, targets) -> (n,).
        objective: TRADES(beta=...), whose loss at the clean point ``loss`` then is; None for
            adversarial training.
        response: "constrained" (ours) or "unconstrained" (the paper's eq. 4).
        inverse: with "unconstrained": "neumann" (eq. 15, 16) or "exact".
        neumann_order: the k at which the series is clipped.
        space: "input", or "features" for the variant that perturbs the head's input.
        weight_decay: λ of the training objective.
        sketch: seeded probes a point for the inner response of a network; 0 for the exact one.
        delta: the maximisers (n, ...) on the scale of ``threat.eps``, if they are known; found
            otherwise.
        forward: a method's name or a function (module, x) -> logits, where calling the module gives
            none.
        output: where the logits are in what it returns, or a function of it.

    Returns:
        A symmetric matrix (p, p), float64, on the module's device, wherever the batch is.

    Raises:
        ConfigurationError: the head is no linear layer, the loss does not fit the outputs or the
            targets, or inputs are no numbers or lie outside the threat's data range.

    Example:
        >>> import torch
        >>> from lightning_muter import L2Ball, total_hessian
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False)).double()
        >>> batch = (torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0]))
        >>> total_hessian(model, batch, L2Ball(eps=0.1), head="0", loss="logistic").shape
        torch.Size([3, 3])
    """
    own, form = loss_in(loss, module), LogitsForm(forward, output)
    x, targets, beside = BatchForm().taking(form.takes(module)).read(batch)
    view = view_of(module, own, head, parameters, space, threat.scaling, objective, form)
    points = checked(view, x, targets, beside)
    threat.check_inputs(points.x)
    resolved = resolve_response(response, inverse, neumann_order, sketch)
    problem = PointProblem("muter", threat, resolved, weight_decay)
    total = DenseCurvature.zeros(view.p, points.x.device)
    with measuring(module):
        view.beside(points.beside.part(slice(2))).check(points.x[:2])
        inner = None if delta is None else problem.given(view, points, delta.to(points.x.device))
        problem.accumulate(view, points, total, inner)
    total.add_identity(weight_decay * len(points))
    return total.matrix
