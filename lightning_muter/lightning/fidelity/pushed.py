"""Whether a training step's gradient is of the weights that the step starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.fidelity.after_step import AfterStep
from lightning_muter.lightning.flavour import pl

__all__ = ["PushedWeights", "moved_between"]


class PushedWeights:
    """Compares the trained weights at a batch's start, at its backward pass, and after its step.

    A gradient of perturbed weights agrees with the package's own there: their values alone tell.
    A projection before each batch moves them too, and for good: what follows the step does not
    undo it.

    Args:
        parameters: the trained ones.
        moved_between: whether someone may move them between the last look at them and the
            optimizer's update.
    """

    def __init__(self, parameters: list[nn.Parameter], moved_between: bool) -> None:
        self._parameters, self._moved_between = parameters, moved_between
        self._after = AfterStep()
        self._start: Tensor | None = None
        self._backward: Tensor | None = None
        self._stepped: Tensor | None = None

    def begin(self) -> None:
        """A batch begins that is to be looked at."""
        self._start, self._backward, self._stepped = self._now(), None, None

    def moved(self) -> bool:
        """Whether the weights are others than at the batch's start."""
        return self._start is not None and not torch.equal(self._start, self._now())

    def backward_passed(self, optimizer: Optimizer) -> None:
        """The gradients of the batch are there, and ``optimizer`` has not stepped with them."""
        if not self.moved():
            return
        self._backward = self._now()

        def stepped() -> None:
            self._stepped = self._now()

        self._after.arm(optimizer, stepped)

    def check(self) -> None:
        """The batch is over, and whatever follows it.

        Raises:
            ConfigurationError: the weights were moved for the backward pass, and moved back.
        """
        self._after.disarm()
        start, backward, stepped = self._start, self._backward, self._stepped
        self._start = self._backward = self._stepped = None
        if start is None or backward is None:
            return
        stepped = backward if stepped is None else stepped
        pushed = backward - start
        undone = _length(self._now() - stepped + pushed) < 0.5 * _length(pushed)
        if undone or (
            self._moved_between and _length(stepped - start) < _length(stepped - backward)
        ):
            raise ConfigurationError(
                "training changes the trained weights before the backward pass of a batch and "
                "moves them back after it, as adversarial weight perturbation (AWP) does: that "
                "perturbation is no function of one point, and the objective no sum over points; "
                "train without it"
            )

    def close(self) -> None:
        """Leave the optimizer as it was."""
        self._after.disarm()

    def _now(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1).clone() for p in self._parameters])


def moved_between(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether a hook may move weights after a callback's on_before_optimizer_step."""
    own = ("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
    if any(_overrides(module, pl.LightningModule, name) for name in own):
        return True
    hooked = [_overrides(one, pl.Callback, own[0]) for one in trainer.callbacks]  # type: ignore[attr-defined]
    return sum(hooked) > 1  # the one that watches has it


def _overrides(one: Any, base: type, name: str) -> bool:
    return getattr(type(one), name) is not getattr(base, name)


def _length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector))
