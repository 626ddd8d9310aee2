"""Inputs that lie outside the range that a threat was told, and what to say about them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.threats.pixels import Values, largest, per_channel

__all__ = ["describe_outside", "outside"]

_ROUNDING = 1e-4  # of the range's largest number: bounds are typed with a few digits
_CHANNELS = 16  # more are not images' channels; they are not listed

_Range = tuple[Values, Values]


def outside(x: Tensor, data_range: _Range) -> Tensor:
    """Which coordinates of x (n, C, ...) lie outside (low, high) by more than rounding."""
    low, high = (per_channel(end, x) for end in data_range)
    own = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
    size = max(abs(largest(data_range[0])), abs(largest(data_range[1])))
    slack = max(_ROUNDING, 2 * own) * size
    return (x < low - slack) | (x > high + slack)


def describe_outside(x: Tensor, data_range: _Range, beyond: Tensor, as_received: bool) -> str:
    """The message of a refusal: what was seen, what was expected, and what would fit.

    Args:
        x: inputs (n, C, ...), in pixels where the threat has a mean and a std.
        data_range: the range that the threat was told.
        beyond: which of their coordinates lie outside.
        as_received: whether the threat is on the scale of what training receives.
    """
    low, high = float(x.min()), float(x.max())
    share = float(beyond.double().mean())
    what = "the inputs" if as_received else "the inputs, taken back to pixels by mean and std,"
    seen = f"{what} reach from {low:.4g} to {high:.4g}"
    if x.ndim == 4 and x.shape[1] <= _CHANNELS:
        channels = (
            f"channel {c} from {float(part.min()):.4g} to {float(part.max()):.4g}, "
            f"{float(beyond[:, c].double().mean()):.1%} outside"
            for c, part in enumerate(x.unbind(1))
        )
        seen += f" ({'; '.join(channels)})"
    scale = (
        "without mean= and std= eps and data_range are on the scale of the tensors that the model "
        "receives"
        if as_received
        else "eps and data_range are in pixels, before mean and std"
    )
    return (
        f"{seen}: {share:.2%} of their coordinates lie outside data_range={data_range}, where no "
        f"perturbation is allowed, so that the attack would be weaker than it looks; {scale}. "
        f"{_way_out(x, data_range, as_received)}"
    )


def _way_out(x: Tensor, data_range: _Range, as_received: bool) -> str:
    low, high = float(x.min()), float(x.max())
    fits = f"these inputs would fit data_range=({low:.4g}, {high:.4g}) or wider"
    if not as_received:
        return (
            "Give the mean and the std that the data set normalises by, on the scale of "
            f"data_range (0.4914 for pixels in [0, 1] is 125.3 for 0 to 255); {fits}."
        )
    if bool((x < per_channel(data_range[0], x)).any()):
        return (
            "They look normalised by a mean and a standard deviation: give the threat mean= and "
            "std= as the data set normalises by them, and eps and data_range stay in pixels; "
            f"{_fitting(x, data_range)}{fits}; data_range=None sets no bound."
        )
    return (
        f"They look as if they had not been rescaled: rescale them to {data_range}, or give the "
        f"threat in the inputs' own scale, eps included; {fits}; data_range=None sets no bound."
    )


def _fitting(x: Tensor, data_range: _Range) -> str:
    """The mean and std that take these inputs to the whole range, channel by channel."""
    if x.ndim != 4 or x.shape[1] > _CHANNELS:
        return ""
    columns = x.double().transpose(0, 1).reshape(x.shape[1], -1)
    least, most = columns.amin(dim=1), columns.amax(dim=1)
    low, high = (torch.as_tensor(per_channel(end, columns.T)).double() for end in data_range)
    if not bool((most > least).all()):
        return ""
    std = (high - low) / (most - least)
    mean = low - least * std
    return (
        f"if some of these pixels reach both ends of the range, that is mean={_shown(mean)}, "
        f"std={_shown(std)}; "
    )


def _shown(values: Tensor) -> str:
    return f"[{', '.join(f'{v:.4g}' for v in values.tolist())}]"
