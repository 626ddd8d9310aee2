"""A checkpoint as torch's restricted unpickler reads it, which runs nothing that a file names."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["plain"]


def plain(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A checkpoint without what would not be read back, and the names of that.

    Of a dictionary within it the entries that are read stay.

    Example:
        >>> plain({"state_dict": {}, "hyper_parameters": {"rate": 0.1, "model": object()}})
        ({'state_dict': {}, 'hyper_parameters': {'rate': 0.1}}, ('hyper_parameters.model',))
    """
    kept: dict[str, Any] = {}
    left: list[str] = []
    for name, value in checkpoint.items():
        if _is_read(value):
            kept[name] = value
        elif isinstance(value, Mapping):
            kept[name] = {key: one for key, one in value.items() if _is_read(one)}
            left += [f"{name}.{key}" for key in value if key not in kept[name]]
        else:
            left.append(name)
    return kept, tuple(left)


def _is_read(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if type(value) in (dict, OrderedDict) and all(isinstance(v, Tensor) for v in value.values()):
        return True  # a network's weights are not written twice to see that
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception:  # whatever an object's own pickling raises
        return False
    return True
