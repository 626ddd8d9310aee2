"""Whether what forward returns is what the head puts out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.models.base import heard

__all__ = ["head_outputs"]


def head_outputs(module: nn.Module, head: nn.Module | None, x: Tensor, slack: float) -> Tensor:
    """The module's outputs at x, refused where they are not W h + b of the head's inputs h.

    Args:
        module: maps x (n, ...) to outputs.
        head: its linear layer, or None where no layer is to be looked at.
        x: inputs.
        slack: the relative difference that rounding may make.

    Raises:
        ConfigurationError: forward returns something else, as probabilities or scaled outputs.
    """
    seen: list[Tensor] = []
    handle = None
    if head is not None:
        handle = heard(head, seen)
    try:
        outputs = module(x)
    finally:
        if handle is not None:
            handle.remove()
    if not isinstance(outputs, Tensor):
        raise ConfigurationError(
            f"forward returns a {type(outputs).__name__}; the head's outputs as one tensor are "
            "needed: return them from forward"
        )
    if head is not None and len(seen) == 1:
        with torch.no_grad():
            expected = F.linear(seen[0], head.weight, head.bias)  # type: ignore[arg-type]
        _compare(outputs.detach(), expected, slack)
    return outputs


def _compare(outputs: Tensor, expected: Tensor, slack: float) -> None:
    if outputs.numel() != expected.numel():
        raise ConfigurationError(
            f"forward returns shape {tuple(outputs.shape)}, the head puts out "
            f"{tuple(expected.shape)}: forward must return the head's own outputs"
        )
    found, expected = outputs.reshape(-1).double(), expected.reshape(-1).double()
    apart, size = float((found - expected).abs().max()), float(expected.abs().max())
    if not apart <= slack * max(size, float(found.abs().max())):
        raise ConfigurationError(
            f"forward does not return the head's outputs: they differ by up to {apart:.3g} (the "
            f"head's reach {size:.3g}), as after softmax, a temperature or another scaling; return "
            "the head's own outputs (logits), and put what follows into the loss: "
            "loss=(outputs, targets) -> one value a point"
        )
