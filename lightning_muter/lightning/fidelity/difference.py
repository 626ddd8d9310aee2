"""What a gradient that is not the package's own says of the loss behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Comparison", "tolerances"]

_ALIGNED = 1e-5


def _length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector))


@dataclass(frozen=True)
class Comparison:
    """Training's gradient of a batch beside the package's own, both (p,).

    ``omega`` holds the trained parameters, flattened, in the gradient's order; ``points`` is the
    batch's size; ``slack`` the difference in length that rounding may make, as a share of the
    longer gradient; ``floor`` the length below which a gradient has vanished; ``random`` says that
    training's gradient is the one that the module gives in train mode; ``asked`` is what
    ``training_step`` was asked to return.
    """

    found: Tensor
    own: Tensor
    omega: tuple[Tensor, ...]
    points: int
    slack: float
    floor: float
    random: bool = False
    asked: str = "the callback's loss"

    def agrees(self, penalty: float = 0.0) -> bool:
        """Whether they are the same, with an L2 penalty of this coefficient in training's loss."""
        own = self.own + penalty * torch.cat(self.omega) if penalty else self.own
        scale = max(_length(self.found), _length(own), self.floor)
        return _length(self.found - own) <= self.slack * scale

    def agrees_times(self, factor: float) -> bool:
        """Whether training's is ``factor`` times the package's own."""
        scaled = Comparison(
            self.found / factor, self.own, self.omega, self.points, self.slack, self.floor
        )
        return scaled.agrees()

    @property
    def ratio(self) -> float:
        """Training's length as a multiple of the package's own."""
        return _length(self.found) / max(_length(self.own), 1e-300)

    @property
    def cosine(self) -> float:
        """Of the angle between the two."""
        return float(F.cosine_similarity(self.found, self.own, dim=0))

    def explain(self) -> str:
        """The numbers, what they say of training's loss, and the way out."""
        apart = _length(self.found - self.own) / max(_length(self.own), 1e-300)
        return (
            f"the gradient that training_step leaves in the trained parameters is not that of "
            f"{self.asked} (relative difference {apart:.2g}, ratio of lengths {self.ratio:.4g}, "
            f"cosine {self.cosine:.4f}): {self._diagnosis()}"
        )

    def _diagnosis(self) -> str:
        if self.random:
            return (
                "the trained path is another one in train mode (dropout, or BatchNorm's batch "
                "statistics), where a memory knows eval mode alone: set that dropout to 0, or "
                "keep the module in eval mode"
            )
        if self.cosine > 1 - max(_ALIGNED, self.slack**2):
            if abs(self.ratio / self.points - 1) < 1e-2:
                return (
                    "training_step sums the loss over the batch: return the mean, or give loss= "
                    "the sum, as in nn.CrossEntropyLoss(reduction='sum')"
                )
            return (
                f"training_step's loss is {self.ratio:.4g} times the mean over the batch: return "
                "the mean itself, and scale the learning rate instead"
            )
        penalty = self.penalty
        if penalty is not None:
            return (
                f"training_step's loss has an L2 penalty of its own, {penalty:.4g}/2 times the "
                "squared weights: leave it to the optimizer's weight_decay, or give its sum with "
                f"the optimizer's by weight_decay= (here {penalty:.4g} + the optimizer's)"
            )
        return (
            "its loss is another one (label smoothing, class weights, labels of another coding, a "
            "further term, or inputs that the step or another callback changes): give the same "
            "loss to both, by the name of the module's attribute (loss='criterion'), a loss module "
            "with its arguments, a callable (outputs, targets) -> one value a point, or "
            "objective=TRADES(beta=...); and by forward= what makes the step's outputs, where it "
            "calls something else; MART, mixup and free adversarial training have no memory"
        )

    @property
    def penalty(self) -> float | None:
        """c where the difference is c times ω in all parameters that it moves, or None."""
        rest = self.found - self.own
        moved, weights, offset = [], [], 0
        for parameter in self.omega:
            part = rest[offset : offset + len(parameter)]
            offset += len(parameter)
            if _length(part) > 1e-3 * _length(rest):
                moved.append(part)
                weights.append(parameter)
        if not moved:
            return None
        a, b = torch.cat(moved), torch.cat(weights)
        aligned = float(F.cosine_similarity(a, b, dim=0)) > 1 - max(1e-4, self.slack)
        return float(a @ b / (b @ b)) if aligned else None

    @property
    def silenced(self) -> int:
        """How many of training's gradients are exactly 0 where the package's own are not."""
        large = self.own.abs() > self.slack * self.own.abs().max()
        return int(((self.found == 0) & large).sum()) if bool(self.found.any()) else 0


def tolerances(precision: str) -> tuple[float, float]:
    """The relative difference that rounding may make, and the share that has vanished in it."""
    if precision.startswith("64"):
        return 1e-5, 1e-8
    if precision.startswith("32"):
        return 1e-3, 4e-3
    return 1e-2, 0.3
