"""Folders of the formats before memory.sqlite: told apart, never read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightning_muter.errors import MemoryFormatError
from lightning_muter.memory import files

__all__ = ["found", "refuse", "remove"]

_MANIFEST = "manifest.json"
_OTHERS = re.compile(r"ledger\.jsonl|state-\d{6}-[0-9a-f]{8}\.safetensors")


def found(folder: Path) -> bool:
    """Whether a folder holds a memory of an older format."""
    return (folder / _MANIFEST).is_file()


def refuse(folder: Path, database: Path) -> None:
    """Name the way out where a folder holds a memory of an older format and no other.

    Raises:
        MemoryFormatError: it does.
    """
    if found(folder) and not os.path.lexists(database):
        raise MemoryFormatError(
            f"{folder} holds a memory of format 2 or older ({_MANIFEST}), {database.name} is "
            "expected: read it with lightning-muter 0.1, which wrote it, or rebuild the memory"
        )


def remove(folder: Path) -> None:
    """Remove the files of an older memory: what took its place is complete."""
    others = [name for name in os.listdir(folder) if _OTHERS.fullmatch(name)]
    if others and found(folder):  # a manifest alone may be somebody else's
        for name in (*others, _MANIFEST):
            files.remove(folder / name)
