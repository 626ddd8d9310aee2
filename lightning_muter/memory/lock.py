"""The one writer of a folder: an advisory lock that names who holds it."""

from __future__ import annotations

import getpass
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from lightning_muter.errors import StateError

__all__ = ["locked"]

_POLL = 0.02  # seconds between two tries
_SAID = 1 << 16  # bytes of a lock file that are read
_inherited: set[int] = set()  # the handles that a fork would keep locked in its child

if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # beyond the text, which others read
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True

    def _unlock(handle: int) -> None:
        os.lseek(handle, 1 << 30, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)  # for the children that were forked meanwhile, too


def _close_inherited() -> None:
    while _inherited:
        with suppress(OSError):
            os.close(_inherited.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock of a file; a process that dies gives it back.

    Args:
        path: the lock file, made where there is none and left behind.
        timeout: seconds to wait for another holder.

    Raises:
        StateError: another process holds it; with its host, its process and its command.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(path, flags, 0o600)
    _inherited.add(handle)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise StateError(f"{path} is no regular file, so that nobody can lock it: remove it")
        _wait(handle, path, timeout)
        _say(handle)
        try:
            yield
        finally:
            _release(handle)
    finally:
        if handle in _inherited:
            _inherited.discard(handle)
            with suppress(OSError):
                os.close(handle)


def _release(handle: int) -> None:
    if handle in _inherited:  # not so in a child that was forked within the block
        with suppress(OSError):
            os.ftruncate(handle, 0)
        with suppress(OSError):
            _unlock(handle)


def _wait(handle: int, path: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not _try_lock(handle):
        if time.monotonic() >= end:
            raise StateError(
                f"{path.parent} is being written by {_holder(handle)} for more than {timeout:g} "
                "seconds: wait until it has ended, or end it; nothing was changed"
            )
        time.sleep(_POLL)


def _say(handle: int) -> None:
    """Write who holds the lock; a text that cannot be written is no reason not to hold it."""
    said = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "user": _user(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv)[:1000],
    }
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, json.dumps(said).encode())


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may know no name for its user
        return "unknown"


def _holder(handle: int) -> str:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        said = json.loads(os.read(handle, _SAID))
        return (
            f"process {said['pid']} of {said['user']} on {said['host']} "
            f"({said['command']}, since {said['since']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
