"""Adversarial training: the loss at the perturbed point is minimised and maximised alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_muter.objectives.base import Objective
from lightning_muter.objectives.losses import PointLoss

__all__ = ["Standard"]


@dataclass(frozen=True)
class Standard(Objective):
    """O = I = l(z(x + δ), y). Source: the paper."""

    point_loss: PointLoss
    even: ClassVar[bool] = False

    @property
    def loss(self) -> PointLoss:
        return self.point_loss

    @property
    def asked(self) -> str:
        return "the callback's loss"

    @property
    def inner(self) -> PointLoss:
        return self.point_loss

    def reference(self, clean: Callable[[], Tensor], targets: Tensor) -> Tensor:
        return targets

    def fixed(self, reference: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros(len(targets), dtype=torch.float64, device=targets.device)

    def seen(self, clean: Tensor, perturbed: Tensor) -> tuple[Tensor, ...]:
        return (perturbed,)

    def outer(self, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        return self.point_loss(outputs[-1], targets)
