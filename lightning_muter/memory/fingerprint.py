"""What tells one network from another: names, shapes, dtypes and the values that are frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["fingerprint"]

_BLOCK = 1024
_known: WeakKeyDictionary[nn.Module, tuple[bytes, str]] = WeakKeyDictionary()


def fingerprint(module: nn.Module, trained: Sequence[str]) -> str:
    """A digest of the module's names, shapes and frozen values; the trained ones' values left out.

    State of metrics and of other callbacks is no part of a ``state_dict`` and so none of this.
    The full digest is taken once for a module; it is taken anew when a frozen tensor's version
    counter moved, or when sums over its bits say that it was written to behind the counter's back
    (through ``tensor.data``).
    """
    state = {
        name.replace("_orig_mod.", ""): value
        for name, value in sorted(module.state_dict(keep_vars=True).items())
        if isinstance(value, Tensor)
    }
    seen = _signature(state, trained)
    known = _known.get(module)
    if known is None or known[0] != seen:
        known = (seen, _digest(state, trained))
        _known[module] = known
    return known[1]


def _digest(state: dict[str, Tensor], trained: Sequence[str]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name, value in state.items():
        total.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        if name not in trained:
            data = value.detach().cpu().contiguous().reshape(-1)
            total.update(data.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _signature(state: dict[str, Tensor], trained: Sequence[str]) -> bytes:
    """What is cheap to look at: each tensor's place, version, and sums over its bits."""
    total = hashlib.blake2b(digest_size=16)
    for name, value in state.items():
        total.update(f"{name}{value.dtype}{tuple(value.shape)}{name in trained}".encode())
        if name not in trained:
            version = 0 if value.is_inference() else value._version
            total.update(f"{value.data_ptr()} {version}".encode())
            for sums in _bit_sums(value):
                total.update(sums.cpu().numpy().tobytes())
    return total.digest()


def _bit_sums(value: Tensor) -> list[Tensor]:
    """Sums of the bits, read as 64-bit integers, within blocks and across them."""
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = len(flat) // (8 * _BLOCK) * (8 * _BLOCK)
    blocks = flat[:whole].view(torch.int64).reshape(-1, _BLOCK)
    return [blocks.sum(dim=1), blocks.sum(dim=0), flat[whole:]]
