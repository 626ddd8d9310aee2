"""Where a training that stopped early began, and how long it went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_muter.linalg.lanczos import TimeAverage

__all__ = ["Start"]


@dataclass(frozen=True)
class Start:
    """Where training that stopped early began, for a step of the same length.

    Attributes:
        initial: the ω (p,) that it started from.
        retraced: how far (p,) the quadratic model of all points comes from there within the
            horizon.
        average: the times of its flow that the trained ω is an average over; its end alone where
            nothing averages.
    """

    initial: Tensor
    retraced: Tensor
    average: TimeAverage

    def to(self, device: torch.device | str) -> Start:
        """The same on another device."""
        return Start(self.initial.to(device), self.retraced.to(device), self.average)

    def tensors(self) -> dict[str, Tensor]:
        """What is kept of it as tensors."""
        return {"initial": self.initial, "retraced": self.retraced}

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], flow: Mapping[str, Any] | None, horizon: float | None
    ) -> Start | None:
        """The inverse of `tensors`, or None where the memory has none.

        Args:
            tensors: of the memory.
            flow: the average's plain data; None in a folder of before there were averages.
            horizon: of the memory.
        """
        if "initial" not in tensors or horizon is None:
            return None
        average = TimeAverage.end(horizon) if flow is None else TimeAverage.from_dict(flow)
        return cls(tensors["initial"], tensors["retraced"], average)
