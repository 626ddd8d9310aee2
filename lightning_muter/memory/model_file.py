"""model.ckpt beside a memory: the current model, stamped with the generation that it is of."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_muter.errors import MemoryFormatError
from lightning_muter.memory import files

__all__ = [
    "NAME",
    "STAMP",
    "UNFINISHED",
    "finish",
    "generation_of",
    "is_of",
    "prepare",
    "put_parameters",
    "read",
    "ready_files",
]

NAME = "model.ckpt"
UNFINISHED = "model.ckpt.new"  # a checkpoint that is being written
STAMP = "lightning_muter"  # the key of a checkpoint under which it says whose it is
_READY = re.compile(r"model-[0-9a-f]{8,64}-\d{1,19}\.ckpt")
_WAY_OUT = (
    "restore a backup of it, or write the memory's current parameters into a checkpoint of the "
    "model's other weights (UnlearningMemory.restore)"
)


def prepare(folder: Path, memory_id: str, generation: int, checkpoint: Mapping[str, Any]) -> Path:
    """Write a complete checkpoint aside, on the disk under a name that says whose it is.

    Args:
        folder: the memory's.
        memory_id: the memory that the model belongs to.
        generation: the generation of the memory whose parameters it has.
        checkpoint: what torch.save keeps; the stamp is added to a copy.
    """
    unfinished, ready = folder / UNFINISHED, folder / _ready_name(memory_id, generation)
    stamp = {"memory": memory_id, "generation": generation}
    try:
        with files.private(unfinished) as file:
            torch.save({**checkpoint, STAMP: stamp}, file)
        os.replace(unfinished, ready)
    finally:
        files.remove(unfinished)
    files.sync_folder(folder)
    return ready


def finish(ready: Path) -> None:
    """Put a prepared checkpoint into the place of the model."""
    os.replace(ready, ready.with_name(NAME))
    files.sync_folder(ready.parent)


def ready_files(names: Iterable[str]) -> set[str]:
    """Those of the names that are a prepared checkpoint's."""
    return {name for name in names if _READY.fullmatch(name)}


def is_of(name: str, memory_id: str, generation: int) -> bool:
    """Whether a prepared checkpoint is of a memory at a generation, by its name."""
    return name == _ready_name(memory_id, generation)


def _ready_name(memory_id: str, generation: int) -> str:
    return f"model-{memory_id}-{generation}.ckpt"


def read(folder: Path) -> dict[str, Any]:
    """The checkpoint beside a memory, by torch's restricted unpickler.

    Raises:
        MemoryFormatError: it is missing, damaged, or holds objects that are not loaded unasked.
    """
    path = folder / NAME
    try:
        files.check_regular(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
        EOFError,
        OverflowError,
        MemoryError,
        pickle.UnpicklingError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise MemoryFormatError(
            f"{path} is older than the memory beside it and cannot be brought up to date "
            f"({type(error).__name__}: {reason}): {_WAY_OUT}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise MemoryFormatError(f"{path} is no checkpoint with a state_dict: {_WAY_OUT}")
    return checkpoint


def generation_of(checkpoint: Mapping[str, Any], memory_id: str, newest: int) -> int:
    """The generation that a checkpoint of this memory is of.

    Raises:
        MemoryFormatError: it is of no memory, of another one, or newer than ``newest``.
    """
    stamp = checkpoint.get(STAMP)
    of = stamp.get("generation") if isinstance(stamp, dict) else None
    whose = stamp.get("memory") if isinstance(stamp, dict) else None
    if whose != memory_id or type(of) is not int or not 0 <= of <= newest:
        raise MemoryFormatError(
            f"{NAME} says that it is of memory {whose!r} at generation {of!r}, the memory beside "
            f"it is {memory_id!r} at generation {newest}: {_WAY_OUT}"
        )
    return of


def put_parameters(state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
    """Write parameters into a state_dict, each in the dtype that it has there.

    Raises:
        MemoryFormatError: one is missing there, or of another shape; nothing was changed.
    """
    for name, value in parameters.items():
        old = state.get(name)
        if not isinstance(old, Tensor) or old.shape != value.shape:
            found = tuple(old.shape) if isinstance(old, Tensor) else None
            raise MemoryFormatError(
                f"{NAME} has {name!r} of the shape {found}, the memory's is "
                f"{tuple(value.shape)}: it is of another model; {_WAY_OUT}"
            )
    with torch.no_grad():
        for name, value in parameters.items():
            state[name].copy_(value)  # in place: tied weights stay tied
