"""Numbers of pixel scale: one for all of an input, or one a channel, and the way to and from it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError

__all__ = [
    "Scaling",
    "Values",
    "as_values",
    "check_channels",
    "largest",
    "per_channel",
    "per_feature",
    "times",
]

#: a number, or one a channel: dimension 0 of a point, (C, H, W) or (d,)
Values = Union[float, tuple[float, ...]]  # noqa: UP007 - read by jsonargparse


def as_values(name: str, given: Any) -> Values:
    """A number as it is, numbers of channels as a tuple.

    Raises:
        ConfigurationError: anything else, or NaN.
    """
    single = isinstance(given, numbers.Real) and not isinstance(given, bool)
    if not single and not isinstance(given, (Sequence, Tensor)) and not hasattr(given, "tolist"):
        raise ConfigurationError(f"{name}={given!r} must be a number, or one a channel")
    try:
        values = [float(v) for v in ([given] if single else given)]
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigurationError(f"{name}={given!r} must be a number, or one a channel") from error
    if not values or any(math.isnan(v) for v in values):
        raise ConfigurationError(f"{name}={given!r} must be a number, or one a channel, and no NaN")
    plain = given if type(given) in (int, float) else values[0]  # none of numpy's
    return plain if single else tuple(values)


def largest(values: Values) -> float:
    """The largest of the numbers."""
    return max(values) if isinstance(values, tuple) else values


def times(factor: float, values: Values) -> Values:
    """Every number times a factor.

    Example:
        >>> times(2.0, (1.0, 3.0))
        (2.0, 6.0)
    """
    return tuple(factor * v for v in values) if isinstance(values, tuple) else factor * values


def per_feature(values: Values, x: Tensor) -> Tensor | float:
    """The numbers as they multiply flat points x (n, d): (d,), each channel's for all its pixels.

    Example:
        >>> per_feature((1.0, 2.0), torch.zeros(1, 4))
        tensor([1., 1., 2., 2.])
    """
    if not isinstance(values, tuple):
        return values
    row = torch.tensor(values, dtype=x.dtype, device=x.device)
    return row.repeat_interleave(x.shape[1] // len(values))


def per_channel(values: Values, x: Tensor) -> Tensor | float:
    """The numbers as they act on points x (n, C, ...).

    Example:
        >>> per_channel((1.0, 2.0), torch.zeros(5, 2, 8, 8)).shape
        torch.Size([2, 1, 1])
    """
    if not isinstance(values, tuple):
        return values
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    row = torch.tensor(values, dtype=dtype, device=x.device)
    return row.reshape(-1, *(1 for _ in x.shape[2:]))


def check_channels(name: str, values: Values | None, x: Tensor) -> None:
    """Refuse numbers that are not one a channel of points x (n, C, ...).

    Raises:
        ConfigurationError: with the channels that the points have.
    """
    if isinstance(values, tuple) and (x.ndim < 2 or x.shape[1] != len(values)):
        channels = x.shape[1] if x.ndim > 1 else 1
        raise ConfigurationError(
            f"{name}={values} are {len(values)} numbers, and a point of shape "
            f"{tuple(x.shape[1:])} has {channels} channels (its first dimension): give one number, "
            "or one a channel"
        )


@dataclass(frozen=True)
class Scaling:
    """What normalised a data set: x' = (x - mean) / std, channel by channel.

    Both are None where the inputs that training receives are on the threat's own scale.

    Example:
        >>> scaling = Scaling(mean=(0.5,), std=(0.25,))
        >>> scaling.pixels(scaling.normalised(torch.tensor([[0.75]])))
        tensor([[0.7500]])
    """

    mean: Values | None = None
    std: Values | None = None

    @property
    def identity(self) -> bool:
        """Whether nothing is scaled."""
        return self.mean is None

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels (n, C, ...) as training receives them; the same tensor where nothing is scaled."""
        if self.mean is None or self.std is None:
            return pixels
        return (pixels - per_channel(self.mean, pixels)) / per_channel(self.std, pixels)

    def pixels(self, x: Tensor) -> Tensor:
        """The inverse of `normalised`."""
        if self.mean is None or self.std is None:
            return x
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # half a pixel's digits are no scale
        return x * per_channel(self.std, x) + per_channel(self.mean, x)

    def shaped(self, flat: Tensor, like: Tensor) -> Tensor:
        """Flat float64 points (n, d) in the shape of inputs (m, ...) that training receives.

        They keep their digits where the way to the module goes on through `normalised`.
        """
        inner = like.shape[1:]
        points = flat if flat.shape[1:] == inner else flat.reshape(flat.shape[0], *inner)
        return points.to(like) if self.identity else points

    def slope(self, x: Tensor) -> Tensor:
        """1 / std of every feature of points x (n, C, ...): ∂x' / ∂x, flat (d,), float64."""
        flat = x[:1].reshape(1, -1).double()
        std = 1.0 if self.std is None else per_feature(self.std, flat)
        return torch.ones_like(flat[0]) / std
