"""What training minimises at a point, and what its adversary maximises there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from lightning_muter.objectives.losses import PointLoss

__all__ = ["Objective"]


class Objective(ABC):
    """An outer loss O that training minimises at the maximiser δ* of an inner one, I.

    O and I differ by terms without δ and a positive factor: δ* maximises both, and a point's
    curvature is ∂ωω O + ∂ωδ O · R · ∂δω O. What is called ``seen`` are the inputs of a point that
    O looks at, the perturbed one last.
    """

    #: whether I has no gradient at δ = 0 and nearly the same values at δ and -δ
    even: ClassVar[bool]

    @property
    @abstractmethod
    def loss(self) -> PointLoss:
        """The loss of a point's outputs and its target, without any adversary."""

    @property
    @abstractmethod
    def asked(self) -> str:
        """What ``training_step`` has to return, for a person."""

    @property
    @abstractmethod
    def inner(self) -> PointLoss:
        """What the adversary ascends: a loss of the perturbed outputs and a `reference`."""

    @abstractmethod
    def reference(self, clean: Callable[[], Tensor], targets: Tensor) -> Tensor:
        """What the inner loss compares the perturbed outputs with; ``clean`` makes those of x."""

    @abstractmethod
    def fixed(self, reference: Tensor, targets: Tensor) -> Tensor:
        """O less what the adversary ascends (n,)."""

    @abstractmethod
    def seen(self, clean: Tensor, perturbed: Tensor) -> tuple[Tensor, ...]:
        """The inputs that O looks at, of x (n, ...) and x + δ."""

    @abstractmethod
    def outer(self, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """O (n,) of the outputs at the inputs that are `seen`."""
