"""What crashes and replaced memories leave in a folder: finished or removed, never an error."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from lightning_muter.errors import MuterError
from lightning_muter.memory import (
    base_file,
    connections,
    database,
    files,
    model_file,
    older_format,
    schema,
)
from lightning_muter.memory.faults import DAMAGE
from lightning_muter.memory.records import Meta

__all__ = ["discard_base", "forget_older", "tidy"]

_UNFINISHED = [
    base_file.UNFINISHED,
    model_file.UNFINISHED,
    schema.UNFINISHED,
    *(schema.UNFINISHED + one for one in schema.COMPANIONS),
]


def tidy(folder: Path) -> None:
    """Remove, or finish, what a crash left; what cannot be is left to the next writer.

    Where the database cannot be read, the bases stay: they may be all that is left of a memory.
    """
    for name in _UNFINISHED:
        files.remove(folder / name)
    path = folder / schema.NAME
    with suppress(MuterError, *DAMAGE):
        names = set(os.listdir(folder))
        if model_file.ready_files(names) or len(base_file.bases(names)) > 1:
            with connections.reading(path) as connection:
                meta = database.read_meta(connection)
            _keep_only(folder, meta)
    if connections.has_log(path):
        connections.empty_log(path)


def forget_older(folder: Path, meta: Meta) -> None:
    """Leave only what the newest row names; what cannot be removed is left to the next writer."""
    with suppress(MuterError, *DAMAGE):
        _keep_only(folder, meta)
        older_format.remove(folder)
    connections.compact(folder / schema.NAME)


def discard_base(folder: Path, base: base_file.BaseFile) -> None:
    """Remove a base that a failed write left, unless the database names it already."""
    if not os.path.lexists(folder / schema.NAME):
        files.remove(folder / base.name)
    tidy(folder)


def _keep_only(folder: Path, meta: Meta) -> None:
    base_file.discard_others(folder, meta.base)
    for name in model_file.ready_files(os.listdir(folder)):
        if model_file.is_of(name, meta.memory_id, meta.generation):
            model_file.finish(folder / name)
        else:
            files.remove(folder / name)
