"""Where a training that stopped early began, and how long it went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_muter.linalg.lanczos import TimeAverage

__all__ = ["Start", "TrainingFlow"]


@dataclass(frozen=True)
class TrainingFlow:
    """The times of a training's flow that its ω averages over, and what a Retrain keeps of them.

    A step of lr on the mean of n points is a time of lr / n of their sum's flow.

    Attributes:
        average: the times; the end alone where nothing averages.
        pace: a Retrain takes as many "epochs", each of fewer steps of a longer time, which is as
            long in all; or as many "steps", which is longer.
    """

    average: TimeAverage
    pace: Literal["epochs", "steps"] = "epochs"

    def of_remaining(self, share: float) -> TimeAverage:
        """The times of a Retrain on points of this share of the weight."""
        return self.average if self.pace == "epochs" else self.average.scaled(1 / share)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**self.average.to_dict(), "pace": self.pace}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingFlow:
        """The inverse of `to_dict`.

        Raises:
            ValueError: it is no flow.
        """
        if not isinstance(data, Mapping) or data["pace"] not in ("epochs", "steps"):
            raise ValueError(f"{data!r} is no flow of a training")
        return cls(TimeAverage.from_dict(data), data["pace"])


@dataclass(frozen=True)
class Start:
    """Where training that stopped early began, for a step of the same length.

    Attributes:
        initial: the ω (p,) that it started from.
        retraced: how far (p,) the quadratic model of all points comes from there within the
            horizon.
        flow: how long it went.
    """

    initial: Tensor
    retraced: Tensor
    flow: TrainingFlow

    def to(self, device: torch.device | str) -> Start:
        """The same on another device."""
        return Start(self.initial.to(device), self.retraced.to(device), self.flow)

    def tensors(self) -> dict[str, Tensor]:
        """What is kept of it as tensors."""
        return {"initial": self.initial, "retraced": self.retraced}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], flow: Any) -> Start | None:
        """The inverse of `tensors` and of the flow's plain data; None where a memory has neither.

        Raises:
            ValueError: one without the other, or a flow that is none.
        """
        if "initial" not in tensors and flow is None:
            return None
        return cls(tensors["initial"], tensors["retraced"], TrainingFlow.from_dict(flow))
