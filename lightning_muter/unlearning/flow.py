"""How far training's gradient flow came, and where a Retrain of the same length would end."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muter.linalg.lanczos import TimeAverage, flow
from lightning_muter.linalg.solution import Operator, Solution

__all__ = ["flow_rate", "retrace"]


def flow_rate(optimizer: Optimizer, parameters: Iterable[Tensor] | None = None) -> float | None:
    """The time of the gradient flow that one step takes: lr (1 - dampening) / (1 - momentum).

    None where a step does not follow the gradient (Adam and the like), or where the parameter
    groups move at different rates. With ``parameters`` only their groups count.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(2))]
        >>> flow_rate(torch.optim.SGD(weights, lr=0.1, momentum=0.5))
        0.2
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return None
    wanted = None if parameters is None else {id(p) for p in parameters}
    rates = {
        float(group["lr"]) * (1 - group["dampening"] * bool(group["momentum"])) / (1 - momentum)
        for group in optimizer.param_groups
        if wanted is None or any(id(p) in wanted for p in group["params"])
        if (momentum := float(group["momentum"])) < 1
    }
    return rates.pop() if len(rates) == 1 else None


def retrace(
    hessian: Operator, gradient: Tensor, offset: Tensor, horizon: float | TimeAverage
) -> Solution:
    """ω(h) - ω(0) of the gradient flow of a quadratic model of F, known at ω*.

    Of several times it is the average: where averaged weights come to.

    Source: ours (docs/theory.md). A request moves ω by the difference of two: with the model of
    the remaining points, and with that of all.

    Args:
        hessian: products with the model's Hessian.
        gradient: its gradient at ω* (p,).
        offset: ω(0) - ω* (p,).
        horizon: h, or the times that are averaged over.

    Raises:
        SolverError: as in `flow`.
    """
    return flow(hessian, -gradient - hessian(offset), horizon)
