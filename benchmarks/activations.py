"""What units make of what they receive, and its slope as a function of the value made."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Activation(ABC):
    """A function of one number that tells its slope by its value."""

    @abstractmethod
    def value(self, received: Tensor) -> Tensor:
        """What units send on."""

    @abstractmethod
    def slope(self, value: Tensor) -> Tensor:
        """The first derivative where units send on ``value``."""

    @abstractmethod
    def module(self) -> nn.Module:
        """The same in torch."""


class Tanh(Activation):
    """The hyperbolic tangent."""

    def value(self, received: Tensor) -> Tensor:
        return received.tanh()

    def slope(self, value: Tensor) -> Tensor:
        return 1 - value * value

    def module(self) -> nn.Module:
        return nn.Tanh()


class Relu(Activation):
    """max(t, 0), of slope 0 at 0."""

    def value(self, received: Tensor) -> Tensor:
        return received.clamp(min=0)

    def slope(self, value: Tensor) -> Tensor:
        return (value > 0).to(value)

    def module(self) -> nn.Module:
        return nn.ReLU()


ACTIVATIONS: dict[str, Activation] = {"relu": Relu(), "tanh": Tanh()}
