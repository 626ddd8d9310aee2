"""What damaged files and failing disks raise, as the package's own errors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lightning_muter.errors import MemoryFormatError, MuterError, StateError

__all__ = ["DAMAGE", "damage", "other_memory", "write_errors"]

#: what reading a file that was altered may raise
DAMAGE = (
    sqlite3.Error,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    OverflowError,
    RecursionError,
    MemoryError,
    SafetensorError,
)


@contextmanager
def damage(folder: Path) -> Iterator[None]:
    """Say of a folder what reading it raised.

    Raises:
        MemoryFormatError: it is damaged.
        StateError: another program keeps its database locked.
    """
    try:
        yield
    except MuterError:
        raise
    except DAMAGE as error:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            raise StateError(
                f"the database in {folder} is locked by another program ({error}): close it, and "
                "try again"
            ) from error
        raise MemoryFormatError(
            f"{folder} is damaged or cannot be read ({type(error).__name__}: {error}): restore a "
            "backup, or give this user the right to read it"
        ) from error


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Say of a folder what writing it raised.

    Raises:
        StateError: the disk is full, cannot be written or failed; nothing was changed.
        MemoryFormatError: what is there is damaged.
    """
    try:
        yield
    except MuterError:
        raise
    except (OSError, sqlite3.OperationalError, sqlite3.DataError, SafetensorError) as error:
        raise StateError(
            f"{folder} could not be written ({type(error).__name__}: {error}): what it held "
            "before is unchanged; free space, or give this user the right to write it"
        ) from error
    except sqlite3.Error as error:
        raise MemoryFormatError(
            f"{folder} is damaged ({type(error).__name__}: {error}): restore a backup"
        ) from error


def other_memory(folder: Path) -> StateError:
    """The error of a write to a memory that is not in the folder any more."""
    return StateError(
        f"{folder} holds another memory than the one that was read or is being written: nothing "
        "was changed; load the memory again, or give the folder that this one is in"
    )
