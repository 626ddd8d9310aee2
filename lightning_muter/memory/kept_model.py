"""What a memory's folder says without its settings: the current model, and whether all is whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_muter.memory import model_file, points
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.tensors import TensorSpec

__all__ = ["BASE", "CURRENT", "bring_model_up_to_date", "named", "verified"]

_VECTOR = TensorSpec(torch.float64, ("p",))
_OPTIONAL = replace(_VECTOR, optional=True)
#: what no request changes
BASE = {
    "omega_star": _VECTOR,
    "matrix": TensorSpec(torch.float64, ("p", "p"), optional=True),
    "rows.*": TensorSpec(torch.float64, (), optional=True),
    "residual_gradient": _VECTOR,
    "digests": TensorSpec(torch.uint8, ("n", str(points.DIGEST_BYTES))),
    "weights": TensorSpec(torch.float64, ("n",)),
    "blocks": TensorSpec(torch.uint8, ("k", str(points.DIGEST_BYTES)), optional=True),
    "ids": TensorSpec(torch.uint8, ("n", str(points.DIGEST_BYTES)), optional=True),
    "initial": _OPTIONAL,
    "retraced": _OPTIONAL,
}
#: what every request replaces
CURRENT = {"omega": _VECTOR, "gradient": _VECTOR}


def bring_model_up_to_date(store: MemoryStore) -> bool:
    """Put the memory's current ω^u into its folder's model.ckpt, where a crash kept it from there.

    Returns:
        Whether the file was behind.

    Raises:
        MemoryFormatError: memory or model.ckpt are damaged.
    """
    if store.model_generation() in (None, store.newest()[1]):
        return False
    content = store.read(BASE, CURRENT)
    return store.repair_model(named(content.current["omega"], content.facts["parameters"]))


def verified(store: MemoryStore) -> str:
    """Read all of a folder, whatever classes its settings name; what it holds, for a person.

    Raises:
        MemoryFormatError: anything of it was altered, or model.ckpt is of another memory.
    """
    content = store.read(BASE, CURRENT)
    of = store.model_generation()
    if of is not None:
        stamped = model_file.generation_of(
            model_file.read(store.folder), content.memory_id, content.generation
        )
        of = max(of, stamped)
    behind = "" if of in (None, content.generation) else ", model.ckpt is behind: it is mended"
    forgotten = sum(int(one.entry.get("m", 0)) for one in content.requests)
    return (
        f"{store.folder}: memory {content.memory_id}, generation {content.generation}, "
        f"{len(content.requests)} requests, {forgotten} points forgotten: whole{behind}"
        f"{' when it is opened next' if behind else ''}"
    )


def named(omega: Tensor, parameters: Iterable[Sequence[Any]]) -> dict[str, Tensor]:
    """ω (p,) in the named parts that it is made of, given as (name, shape)."""
    found, first = {}, 0
    for name, shape in parameters:
        size = math.prod(shape)
        found[name] = omega[first : first + size].reshape(tuple(shape))
        first += size
    return found
