"""The loss object that a module carries as an attribute, by the attribute's name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.objectives.losses import LOSSES
from lightning_muter.objectives.refused import way_out_of
from lightning_muter.objectives.resolve import as_value
from lightning_muter.objectives.torch_losses import TorchLoss

__all__ = ["ModuleLoss", "asked_loss", "loss_in"]

#: torch's own functions with their default arguments, which modules carry as well
_FUNCTIONS: dict[Callable[..., Any], TorchLoss] = {
    F.cross_entropy: TorchLoss("CrossEntropyLoss"),
    F.binary_cross_entropy_with_logits: TorchLoss("BCEWithLogitsLoss"),
    F.mse_loss: TorchLoss("MSELoss"),
}


@dataclass(frozen=True)
class ModuleLoss:
    """A loss that is looked up in the module, as soon as there is one.

    Attributes:
        attribute: its name, dotted where it lies in a submodule.

    Example:
        >>> module = nn.Module()
        >>> module.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        >>> ModuleLoss("criterion").of(module)
        TorchLoss(name='CrossEntropyLoss', options=(('label_smoothing', 0.1),))
    """

    attribute: str

    def of(self, module: nn.Module) -> Any:
        """The loss that the module has there.

        Raises:
            ConfigurationError: it has none, or one that is no sum over points.
        """
        try:
            found = operator.attrgetter(self.attribute)(module)
        except AttributeError as error:
            raise ConfigurationError(
                f"loss={self.attribute!r} is neither one of {sorted(LOSSES)} nor an attribute of "
                f"{type(module).__name__}{_losses_of(module)}"
            ) from error
        if not isinstance(found, nn.Module):
            if found in _FUNCTIONS:
                return _FUNCTIONS[found]
        elif type(found).__module__.startswith("torch.nn."):
            return self._torch(found)
        raise ConfigurationError(
            f"loss={self.attribute!r} is a {type(found).__name__} of the module's own, and whether "
            "its value is a mean over points cannot be seen: give loss= a function (outputs, "
            "targets) -> per-point losses whose mean it is"
        )

    def _torch(self, found: nn.Module) -> Any:
        try:
            return as_value(found)
        except ConfigurationError as error:
            raise ConfigurationError(f"the module's {self.attribute!r}: {error}") from error


def _losses_of(module: nn.Module) -> str:
    """The attributes that it may have meant, as the end of an error."""
    loss_like = getattr(nn.modules.loss, "_Loss")  # noqa: B009 - no public name
    names = [name for name, one in module.named_modules() if isinstance(one, loss_like)]
    return f": its losses are {names}" if names else ", which has no loss module"


def asked_loss(loss: Any) -> Any:
    """A loss as a user gives it: a text that names none of the package's is an attribute's name."""
    named = isinstance(loss, str) and loss not in LOSSES and not way_out_of(loss)
    return ModuleLoss(loss) if named else as_value(loss)


def loss_in(loss: Any, module: nn.Module) -> Any:
    """The loss that a user gave, looked up in the module where it is an attribute's name."""
    asked = asked_loss(loss)
    return asked.of(module) if isinstance(asked, ModuleLoss) else asked
