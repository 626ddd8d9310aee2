"""The folder that a callback keeps its memory in, from before training to its end."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.flavour import rank_zero_only
from lightning_muter.lightning.rescue import Rescue
from lightning_muter.memory import model_file
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.kept_model import bring_model_up_to_date
from lightning_muter.memory.memory import UnlearningMemory

__all__ = ["check_free", "create", "folder_name", "model_path", "rewritten"]


def folder_name(given: str | os.PathLike[str] | None) -> str | None:
    """A folder as a text; None where there is none.

    Raises:
        ConfigurationError: no path was given.
    """
    if given is None:
        return None
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigurationError(f"memory_dir={given!r} must be the path of a folder, or None")
    return os.fspath(given)


def check_free(folder: str | None, overwrite: bool) -> None:
    """Refuse a folder that cannot be written or holds a memory, before training is paid for.

    Raises:
        ConfigurationError: with the folder.
    """
    if folder is None:
        return
    there = next(one for one in (Path(folder), *Path(folder).resolve().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"memory_dir={folder!r} cannot be written: {there} is "
            f"{'no folder' if not there.is_dir() else 'not writable'}; give another one"
        )
    if MemoryStore(folder).exists() and not overwrite:
        raise ConfigurationError(
            f"memory_dir={folder!r} holds a memory already, with its ledger of what was "
            "forgotten: give another folder, or overwrite=True to lose that memory when the "
            "new one is complete"
        )


def model_path(folder: str | None) -> Path | None:
    """Where the model lies beside the memory."""
    return None if folder is None else Path(folder) / model_file.NAME


def create(memory: UnlearningMemory, folder: str | None, rescue: Rescue, overwrite: bool) -> None:
    """Write a new memory and the trained model to its folder, where there is one.

    Every process has to call it; the first one writes.
    """
    if folder is not None:
        _save(memory.whole(), folder, rescue, overwrite)


@rank_zero_only
def _save(memory: UnlearningMemory, folder: str, rescue: Rescue, overwrite: bool) -> None:
    memory.save(folder, rescue.checkpoint(), overwrite)


def rewritten(memory: UnlearningMemory, folder: str | None, first: bool) -> UnlearningMemory:
    """The memory with what was found of it since it was written, in its folder too.

    Args:
        memory: as it is now.
        folder: where it was written; None where it was not.
        first: whether this process writes.
    """
    if folder is None:
        return memory
    whole = memory.whole()
    if first:
        store = MemoryStore(folder, memory.memory_id)
        whole.replace_in(store)
        bring_model_up_to_date(store)
    return replace(memory, generation=memory.generation + 1)
