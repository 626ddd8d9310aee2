"""How long a gradient flow training follows: the steps that moved ω as plain SGD does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.fidelity.averaging import AverageWatch
from lightning_muter.lightning.fidelity.difference import tolerances
from lightning_muter.lightning.flavour import pl
from lightning_muter.linalg.lanczos import TimeAverage
from lightning_muter.memory.start import TrainingFlow
from lightning_muter.objectives.losses import PointLoss
from lightning_muter.unlearning.flow import flow_rate

__all__ = ["StepWatch", "holds", "horizon_of", "pace_of"]


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
        average: follows the callback that averages the weights, if there is one.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        slack: float,
        time: float = 0.0,
        average: AverageWatch | None = None,
    ) -> None:
        self._parameters, self._slack = parameters, slack
        self.average = average
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

    @classmethod
    def of(
        cls,
        trainer: pl.Trainer,
        parameters: list[nn.Parameter],
        averaging: pl.Callback | None,
        state: Mapping[str, Any],
    ) -> StepWatch:
        """That of a training which starts, or goes on from the ``state`` of a checkpoint.

        Raises:
            ConfigurationError: its optimizers follow no gradient flow, or nothing is known of what
                the checkpoint's average was.
        """
        check_rates(trainer.optimizers, parameters)
        if not trainer.lr_scheduler_configs and state.get("flow_time", 0.0) == 0:
            _check_moving(trainer.optimizers, parameters)
        slack, _ = tolerances(str(trainer.precision))
        average = None if averaging is None else AverageWatch(averaging, slack)
        if average is not None and state.get("flow_time", 0.0) > 0:
            average.load_state_dict(state.get("average"))
        return cls(parameters, slack, state.get("flow_time", 0.0), average)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know."""
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return {"flow_time": self.time, **average}

    def finish(self) -> TimeAverage:
        """The times that the trained weights are an average over: the end, where nothing averages.

        Raises:
            ConfigurationError: the weights are not what training, or its averaging, left.
        """
        if self.average is not None:
            return self.average.times(self._omega())
        self.settle()
        return TimeAverage.end(self.time)

    def settle(self) -> None:
        """Compare the last step with its prediction, and count its time.

        Raises:
            ConfigurationError: ω moved another way than SGD moves it.
        """
        try:
            self._settle()
        finally:
            if self.average is not None:
                self.average.look(self.time, self._last)

    def _settle(self) -> None:
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
        "weights of one's own (Lightning's WeightAveraging and StochasticWeightAveraging are "
        "followed), weights that are set or clipped, and steps past Lightning's optimizers follow "
        "no gradient flow; leave them out, or give newton_steps=..."
    )


def pace_of(trainer: pl.Trainer, loss: PointLoss) -> Literal["epochs", "steps"]:
    """What a Retrain of this training would have as many of.

    Of a batch of all points there is one an epoch, however many they are; its sum grows with them.
    """
    by_steps = trainer.max_epochs in (None, -1) or trainer.global_step >= trainer.max_steps
    limited = trainer.max_steps > 0 and by_steps
    if trainer.num_training_batches == 1:
        return "epochs" if loss.summed else "steps"
    return "steps" if limited else "epochs"


def horizon_of(
    asked: float | Literal["training"] | None, flow: TrainingFlow | None, weights: Tensor
) -> tuple[float | None, TrainingFlow | None]:
    """A memory's horizon, and training's flow where it is that.

    Args:
        asked: as the callback has it.
        flow: of training's own times, Σ lr; None where nothing followed them.
        weights: of the points (n,): F is a sum, and its flow as much faster.
    """
    if asked != "training" or flow is None:
        return None if asked == "training" else asked, None
    average = flow.average.scaled(1 / float(weights.sum()))
    return average.mean, replace(flow, average=average)


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


def _check_moving(optimizers: list[Optimizer], parameters: list[nn.Parameter]) -> None:
    """Refuse a learning rate of 0 that nothing raises: training would take no time of the flow.

    Raises:
        ConfigurationError: naming the way out.
    """
    rates = [flow_rate(one, parameters) for one in optimizers if holds(one, parameters)]
    if rates and not any(rates):
        raise ConfigurationError(
            "horizon='training' with SGD's lr=0 and no scheduler that would raise it: such a "
            "training goes nowhere, and so would a request; give a learning rate above 0, or "
            "newton_steps=... in the place of the horizon"
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
