"""Which view of a module serves: a linear head's, or any named parameters'."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.models.autodiff import Autodiff
from lightning_muter.models.base import ModelView
from lightning_muter.models.linear_head import FeatureHead, LinearHead
from lightning_muter.models.logits import CALLED, LogitsForm
from lightning_muter.models.names import listed
from lightning_muter.objectives.losses import PointLoss
from lightning_muter.objectives.resolve import AnyLoss, resolve_objective
from lightning_muter.objectives.trades import TRADES
from lightning_muter.threats.pixels import Scaling

__all__ = ["view_of"]

#: where the perturbation lives: at the module's input, or at the head's (the paper's variant)
_HEADS: dict[str, type[LinearHead]] = {"input": LinearHead, "features": FeatureHead}


def view_of(
    module: nn.Module,
    loss: AnyLoss | PointLoss,
    head: str | None = None,
    parameters: Sequence[str] | None = None,
    space: str = "input",
    scaling: Scaling | None = None,
    objective: TRADES | None = None,
    form: LogitsForm = CALLED,
) -> ModelView:
    """The view of a linear head, or of any named parameters.

    Args:
        module: maps x (n, ...) to outputs (n, C).
        loss: a name, a callable (outputs, targets) -> (n,), or a `PointLoss`.
        head: dotted name of a linear layer; or
        parameters: names of parameters.
        space: "input", or "features" for perturbations of the head's input.
        scaling: of the threat, where that is in pixels and the module's inputs are normalised.
        objective: TRADES, or None for adversarial training.
        form: what makes logits of the module.

    Raises:
        ConfigurationError: not exactly one of head and parameters, or a name that is none.
    """
    if (head is None) == (parameters is None):
        raise ConfigurationError(
            f"head={head!r} and parameters={parameters!r}: give exactly one of the two"
        )
    if space not in _HEADS:
        raise ConfigurationError(f"space={space!r} is unknown; expected 'input' or 'features'")
    resolved = resolve_objective(objective, loss)
    if head is not None:
        return _HEADS[space](module, head, resolved, scaling, form)
    if space == "features":
        raise ConfigurationError("space='features' needs a linear head: give head=...")
    return Autodiff(module, list(listed(parameters) or ()), resolved, scaling, form)
