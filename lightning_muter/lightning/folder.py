"""The folder that a callback keeps its memory in, from before training to its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.flavour import rank_zero_only
from lightning_muter.lightning.rescue import Rescue
from lightning_muter.memory import model_file
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.kept_model import bring_model_up_to_date
from lightning_muter.memory.memory import UnlearningMemory

__all__ = ["check_free", "create", "model_path", "rewritten"]


def check_free(folder: str | None, overwrite: bool) -> None:
    """Refuse a folder that holds a memory, before its training is paid for.

    Raises:
        ConfigurationError: with the folder.
    """
    if folder is not None and MemoryStore(folder).exists() and not overwrite:
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
