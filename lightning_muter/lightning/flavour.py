"""Which of Lightning's two packages this process uses: ``pytorch_lightning`` or ``lightning``.

Both hold the same classes, and an object of one is none of the other's. The package is chosen once,
when this module is imported: the one that the environment variable LIGHTNING_MUTER_PACKAGE names,
else the one that was imported first, else the one that is installed.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_muter.errors import ConfigurationError

__all__ = ["NAME", "VARIABLE", "pl", "rank_zero_info", "rank_zero_only", "refuse_other"]

#: the environment variable that names the package
VARIABLE = "LIGHTNING_MUTER_PACKAGE"
#: a package by its name for people -> the module that holds its classes
_MODULES = {"pytorch_lightning": "pytorch_lightning", "lightning": "lightning.pytorch"}


def _chosen() -> str:
    asked = os.environ.get(VARIABLE)
    if asked is not None:
        if asked not in _MODULES:
            raise ConfigurationError(f"{VARIABLE}={asked!r} must be one of {sorted(_MODULES)}")
        return asked
    imported = [name for name in sys.modules if name in _MODULES.values()]  # in their order
    if imported:
        return next(name for name, module in _MODULES.items() if module == imported[0])
    return next((name for name in _MODULES if find_spec(name) is not None), next(iter(_MODULES)))


#: "pytorch_lightning" or "lightning"
NAME = _chosen()

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
else:
    pl = importlib.import_module(_MODULES[NAME])
    rank_zero_info = pl.utilities.rank_zero_info
    rank_zero_only = pl.utilities.rank_zero_only


def refuse_other(**things: Any) -> None:
    """Refuse objects of the other one of Lightning's packages, by what they are given as.

    Raises:
        ConfigurationError: with the object and both packages.
    """
    (other,) = (module for name, module in _MODULES.items() if name != NAME)
    for what, thing in things.items():
        if any(f"{one.__module__}.".startswith(f"{other}.") for one in type(thing).__mro__):
            name = next(name for name, module in _MODULES.items() if module == other)
            raise ConfigurationError(
                f"the {what} {type(thing).__name__} is of the package {name!r}, lightning_muter "
                f"was loaded with {NAME!r}: import both from one package; import {name} before "
                f"lightning_muter, or set {VARIABLE}={name}, to use that one"
            )
