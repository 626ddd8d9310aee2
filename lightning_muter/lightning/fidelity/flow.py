"""How long a gradient flow training follows: the steps that moved ω as plain SGD does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muter.errors import ConfigurationError
from lightning_muter.unlearning.flow import flow_rate

__all__ = ["StepWatch", "holds"]


def holds(optimizer: Optimizer, parameters: list[nn.Parameter]) -> bool:
    """Whether an optimizer has any of the parameters."""
    wanted = {id(p) for p in parameters}
    return any(id(p) in wanted for group in optimizer.param_groups for p in group["params"])


@dataclass(frozen=True)
class _Step:
    """ω (p,) before a step, the move that SGD makes from there, and the flow's time of it."""

    before: Tensor
    move: Tensor
    time: float


class StepWatch:
    """Predicts each step of SGD, counts its time, and refuses one that goes another way.

    A step that moves nothing (skipped by a gradient scaler) takes no time.

    Args:
        parameters: the trained ones.
        slack: the relative difference that rounding may make.
        time: of the flow so far.
    """

    def __init__(self, parameters: list[nn.Parameter], slack: float, time: float = 0.0) -> None:
        self._parameters, self._slack = parameters, slack
        self._eps = torch.finfo(parameters[0].dtype).eps
        self._step: _Step | None = None
        self._last = self._omega()
        self.time = time

    def _omega(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1).double() for p in self._parameters])

    def before_step(self, optimizer: Optimizer, share: float) -> None:
        """An optimizer is about to step.

        Args:
            optimizer: any of training's.
            share: the gradient's length as a share of the mean gradient's; less than 1 in the
                shorter last round of gradient accumulation.

        Raises:
            ConfigurationError: the step before went another way.
        """
        self.settle()
        if holds(optimizer, self._parameters):
            rate = flow_rate(optimizer, self._parameters) or 0.0
            self._step = _Step(self._omega(), _sgd(optimizer, self._parameters), rate * share)

    def settle(self) -> None:
        """Compare the last step with its prediction, and count its time.

        Raises:
            ConfigurationError: ω moved another way than SGD moves it.
        """
        now, step = self._omega(), self._step
        self._step = None
        before = self._last if step is None else step.before
        last, self._last = self._last, now
        rounding = 4 * self._eps * float(torch.linalg.vector_norm(now))
        if not torch.equal(before, last):
            raise _refusal("the weights moved between two steps", before - last)
        moved = now - before
        if step is None:
            if bool(moved.any()):
                raise _refusal("the weights moved without a step of their optimizer", moved)
            return
        if not bool(moved.any()):
            return
        self.time += step.time
        apart = float(torch.linalg.vector_norm(moved - step.move))
        if not apart <= self._slack * float(torch.linalg.vector_norm(step.move)) + rounding:
            raise _mismatch(moved, step.move)


def _refusal(what: str, moved: Tensor) -> ConfigurationError:
    return ConfigurationError(
        f"horizon='training', but {what} by {float(torch.linalg.vector_norm(moved)):.3g}: averaged "
        "weights (WeightAveraging, EMA, SWA), weights that are set or clipped, and steps past "
        "Lightning's optimizers follow no gradient flow; leave them out, or give newton_steps=..."
    )


def check_rates(optimizers: list[Optimizer], parameters: list[nn.Parameter]) -> None:
    """Refuse trained parameters whose optimizers follow no gradient flow of one rate.

    Raises:
        ConfigurationError: naming the optimizers.
    """
    holders = [o for o in optimizers if holds(o, parameters)]
    if len(holders) > 1:
        raise ConfigurationError(
            f"horizon='training' with {len(holders)} optimizers of the trained parameters: steps "
            "that move a part of them each follow no gradient flow; give all of them to one, or "
            "give newton_steps=..., or a number for horizon="
        )
    if any(flow_rate(optimizer, parameters) is None for optimizer in holders):
        names = [type(optimizer).__name__ for optimizer in holders]
        raise ConfigurationError(
            f"horizon='training' with {names}: it needs torch.optim.SGD of one learning rate, "
            "since others follow no gradient flow; give a number, newton_steps, or horizon=None"
        )


def _mismatch(moved: Tensor, expected: Tensor) -> ConfigurationError:
    lengths = [float(torch.linalg.vector_norm(v)) for v in (moved, expected)]
    ratio = lengths[0] / max(lengths[1], 1e-300)
    cosine = float(F.cosine_similarity(moved, expected, dim=0))
    if cosine > 0.999 and ratio < 1:
        what = "gradient clipping shortens it: leave it out"
    elif cosine > 0.999:
        what = "it is longer by one factor: the step is not that of its learning rate"
    else:
        what = (
            "gradients are changed before the step (clipping by value, noise), some parameters "
            "move at another rate, or the optimizer has a rule of its own: use plain "
            "torch.optim.SGD"
        )
    return ConfigurationError(
        f"horizon='training', but a step moved the weights by {lengths[0]:.3g}, where SGD's rate "
        f"and gradient say {lengths[1]:.3g} (ratio {ratio:.4g}, cosine {cosine:.4f}): {what}, or "
        "give newton_steps=..., or a number for horizon="
    )


def _sgd(optimizer: Optimizer, parameters: list[nn.Parameter]) -> Tensor:
    """The move (p,) of torch.optim.SGD from the gradients and momenta as they are."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    moves = []
    for parameter in parameters:
        group, gradient = groups.get(id(parameter)), parameter.grad
        if group is None or gradient is None:
            moves.append(torch.zeros(parameter.numel(), dtype=torch.float64).to(parameter.device))
            continue
        step = gradient.detach().double() + group["weight_decay"] * parameter.detach().double()
        momentum = group["momentum"]
        if momentum:
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                buffer = momentum * buffer.double() + (1 - group["dampening"]) * step
            else:
                buffer = step
            step = step + momentum * buffer if group["nesterov"] else buffer
        moves.append(-float(group["lr"]) * step.reshape(-1))
    return torch.cat(moves)
