"""Whether a training step's gradient is of the weights that the step starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_muter.errors import ConfigurationError

__all__ = ["PushedWeights"]


class PushedWeights:
    """Compares the trained weights at a batch's start, at its backward pass, and after it.

    A gradient of perturbed weights agrees with the package's own there: their values alone tell.

    Args:
        parameters: the trained ones.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._start: Tensor | None = None
        self._backward: Tensor | None = None

    def begin(self) -> None:
        """A batch begins that is to be looked at."""
        self._start, self._backward = self._now(), None

    def moved(self) -> bool:
        """Whether the weights are others than at the batch's start."""
        return self._start is not None and not torch.equal(self._start, self._now())

    def backward_passed(self) -> None:
        """The gradients of the batch are there, and no optimizer has stepped with them."""
        if self.moved():
            self._backward = self._now()

    def check(self) -> None:
        """The batch is over, and whatever follows it.

        Raises:
            ConfigurationError: the weights were moved for the backward pass, and moved back.
        """
        start, backward, now = self._start, self._backward, self._now()
        self._start = self._backward = None
        if start is None or backward is None:
            return
        if torch.linalg.vector_norm(now - start) < torch.linalg.vector_norm(now - backward):
            raise ConfigurationError(
                "training changes the trained weights before the backward pass of a batch and "
                "moves them back after it, as adversarial weight perturbation (AWP) does: that "
                "perturbation is no function of one point, and the objective no sum over points; "
                "train without it"
            )

    def _now(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1).clone() for p in self._parameters])
