"""Numbers that a user gives, checked and as Python's own: JSON and sqlite know no others."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

from lightning_muter.errors import ConfigurationError

__all__ = ["integer", "number", "optional", "whole"]


def integer(value: Any) -> int | None:
    """The value as an int where it is a whole number by type, else None; True is no number.

    Example:
        >>> import torch
        >>> integer(torch.tensor(3)), integer(3.0), integer(True)
        (3, None, None)
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def whole(name: str, value: Any, least: int = 0) -> int:
    """An argument that counts, as an int.

    Args:
        name: of the argument, for the error.
        value: as the user gave it.
        least: the smallest that it may be.

    Raises:
        ConfigurationError: it is no whole number, or too small.

    Example:
        >>> whole("batch_size", 512, 1)
        512
    """
    found = integer(value)
    if found is None or found < least:
        raise ConfigurationError(f"{name}={value!r} must be a whole number >= {least}")
    return found


def number(name: str, value: Any, positive: bool = False) -> float:
    """An argument that measures, as a float.

    Args:
        name: of the argument, for the error.
        value: as the user gave it.
        positive: whether zero is too small as well.

    Raises:
        ConfigurationError: it is no finite number, negative, or zero where that is too small.

    Example:
        >>> number("noise_std", 0)
        0.0
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        found = float(value) if real else math.nan
    except OverflowError:  # an integer beyond every float
        found = math.inf
    if not 0 <= found < math.inf or (positive and not found > 0):
        raise ConfigurationError(
            f"{name}={value!r} must be a finite number {'> 0' if positive else '>= 0'}"
        )
    return found


def optional(name: str, value: Any, positive: bool = False) -> float | None:
    """`number`, or None where None was given."""
    return None if value is None else number(name, value, positive)
