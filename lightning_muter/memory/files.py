"""Files of a memory's folder: private, on the disk when it is said, refused where none is."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lightning_muter.errors import MemoryFormatError

__all__ = ["check_regular", "make_folder", "private", "remove", "sync", "sync_folder"]


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter; one that is there stays as it is."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)  # whatever the umask took
    sync_folder(folder.parent)


@contextmanager
def private(path: Path) -> Iterator[BinaryIO]:
    """A new file that only its owner can read, on the disk when the block ends."""
    remove(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, 0o600), "w+b") as file:
        path.chmod(0o600)
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Put a file's content on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_regular(path: Path) -> os.stat_result:
    """What the file system says of a file that can be read to its end.

    Raises:
        FileNotFoundError: there is none.
        MemoryFormatError: it is a folder, a pipe, a link or another thing that is no file.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise MemoryFormatError(
            f"{path} is no regular file, and a memory writes nothing else there: restore a backup"
        )
    return found


def remove(path: Path) -> None:
    """Remove a file or folder; one that cannot be removed is left to the next writer."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
