"""Inputs that lie outside the range that a threat was told, and what to say about them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["describe_outside", "outside"]

_ROUNDING = 1e-4  # of the range's largest number: bounds are typed with a few digits
_CHANNELS = 16  # more are not images' channels; they are not listed


def outside(x: Tensor, data_range: tuple[float, float]) -> Tensor:
    """Which coordinates of x (n, ...) lie outside (low, high) by more than rounding."""
    low, high = data_range
    own = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
    slack = max(_ROUNDING, 2 * own) * max(abs(low), abs(high))
    return (x < low - slack) | (x > high + slack)


def describe_outside(x: Tensor, data_range: tuple[float, float], beyond: Tensor) -> str:
    """The message of a refusal: what was seen, what was expected, and what would fit.

    Args:
        x: inputs (n, ...).
        data_range: the range that the threat was told.
        beyond: which of their coordinates lie outside.
    """
    low, high = float(x.min()), float(x.max())
    share = float(beyond.double().mean())
    seen = f"the inputs reach from {low:.4g} to {high:.4g}"
    if x.ndim == 4 and x.shape[1] <= _CHANNELS:
        channels = (
            f"channel {c} from {float(part.min()):.4g} to {float(part.max()):.4g}, "
            f"{float(beyond[:, c].double().mean()):.1%} outside"
            for c, part in enumerate(x.unbind(1))
        )
        seen += f" ({'; '.join(channels)})"
    return (
        f"{seen}: {share:.2%} of their coordinates lie outside data_range={data_range}, where no "
        "perturbation is allowed, so that the attack would be weaker than it looks; eps and "
        "data_range are on the scale of the tensors that the model receives. "
        f"{_way_out(low, high, data_range)}"
    )


def _way_out(low: float, high: float, data_range: tuple[float, float]) -> str:
    fits = f"these inputs would fit data_range=({low:.4g}, {high:.4g}) or wider"
    if low < data_range[0]:
        return (
            "They look normalised by a mean and a standard deviation: give the threat in the "
            "inputs' own scale, data_range=((low - mean) / std, (high - mean) / std) with the "
            f"least and the largest of its channels, and eps / std; {fits}; data_range=None sets "
            "no bound."
        )
    return (
        f"They look as if they had not been rescaled: rescale them to {data_range}, or give the "
        f"threat in the inputs' own scale, eps included; {fits}; data_range=None sets no bound."
    )
