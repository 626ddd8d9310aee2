"""Names of submodules and parameters: what a wrong one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from torch import nn

from lightning_muter.errors import ConfigurationError

__all__ = ["linear_layers", "listed", "suggest"]

_SHOWN = 8


def listed(parameters: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names as a tuple.

    Raises:
        ConfigurationError: one name was given where a list of names is expected, or no names.

    Example:
        >>> listed(["fc.weight", "fc.bias"])
        ('fc.weight', 'fc.bias')
    """
    if isinstance(parameters, str):
        raise ConfigurationError(
            f"parameters={parameters!r} is one string, a list of names is expected: give "
            f"parameters=[{parameters!r}], or head={parameters!r} if it is a linear layer"
        )
    names = None if parameters is None else tuple(parameters)
    if any(not isinstance(name, str) for name in names or ()):
        raise ConfigurationError(
            "parameters= holds others than names: give the names that named_parameters() has, as "
            "parameters=['head.weight', 'head.bias']"
        )
    return names


def linear_layers(module: nn.Module) -> list[str]:
    """The names of the linear layers of a module: what can be a head."""
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


def suggest(wrong: Sequence[str], known: Iterable[str]) -> str:
    """What to write instead of names that do not exist, as the end of an error's first clause.

    A known name that ends or begins with a wrong one is nearest ("net.fc" for "fc", "fc.weight"
    for "fc"), then one that is spelt alike; without any the known names are listed.

    Example:
        >>> suggest(["fc"], ["net.fc", "net.conv"])
        ": did you mean 'net.fc'?"
    """
    names = [name for name in known if name]
    found: list[str] = []
    for one in wrong:
        found += [name for name in names if _within(one, name) and name not in found]
    if not found:
        for one in wrong:
            near = difflib.get_close_matches(one, names, n=3, cutoff=0.6)
            found += [name for name in near if name not in found]
    if found:
        return f": did you mean {_joined(found, ' or ')}?"
    return f"; expected one of {_joined(names, ', ')}" if names else "; there is none to choose"


def _within(one: str, name: str) -> bool:
    """Whether a name is another one with a prefix, with a suffix, or without one of its own."""
    if not one:
        return False
    parts, whole = one.split("."), name.split(".")
    shorter, longer = sorted((parts, whole), key=len)
    starts = longer[: len(shorter)] == shorter and parts is shorter
    return starts or longer[len(longer) - len(shorter) :] == shorter


def _joined(names: Sequence[str], glue: str) -> str:
    shown = glue.join(repr(name) for name in names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
