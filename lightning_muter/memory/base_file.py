"""The base of a memory: one immutable safetensors file, written once and named by its content."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_muter.errors import MemoryFormatError
from lightning_muter.memory import files
from lightning_muter.memory.tensors import check_dtypes, own_storage

__all__ = ["UNFINISHED", "BaseFile", "bases", "discard_others", "load", "write"]

UNFINISHED = "base.new"  # the folder in which a base is written
_NAME = re.compile(r"base-[0-9a-f]{32}\.safetensors")


@dataclass(frozen=True)
class BaseFile:
    """The name of a base in its folder, its size in bytes and the digest of them."""

    name: str
    size: int
    blake2b: bytes

    def check(self) -> None:
        """Refuse a name that leads out of the folder, or to a file of another kind.

        Raises:
            MemoryFormatError: with the name.
        """
        if _NAME.fullmatch(self.name) is None:
            raise MemoryFormatError(
                f"memory.sqlite names the base {self.name!r}, which is none that a memory writes "
                "into its own folder: restore a backup"
            )


def write(folder: Path, tensors: Mapping[str, Tensor]) -> BaseFile:
    """Write a new base, on the disk with its name when this returns.

    Args:
        folder: the memory's.
        tensors: of any shapes, of the dtypes that a memory keeps.
    """
    unfinished = folder / UNFINISHED
    files.remove(unfinished)
    unfinished.mkdir(mode=0o700)
    try:
        temporary = unfinished / "tensors"
        save_file(own_storage(tensors), temporary)
        temporary.chmod(0o600)
        files.sync(temporary)
        base = BaseFile(
            name=f"base-{os.urandom(16).hex()}.safetensors",
            size=temporary.stat().st_size,
            blake2b=_blake2b(temporary),
        )
        os.replace(temporary, folder / base.name)
        files.sync_folder(folder)
    finally:
        files.remove(unfinished)
    return base


def load(folder: Path, base: BaseFile) -> dict[str, Tensor]:
    """Read a base and check every byte of it.

    Raises:
        FileNotFoundError: it is gone; a newer one may have taken its place.
        MemoryFormatError: truncated, altered, or no file.
    """
    path = folder / base.name
    size = files.check_regular(path).st_size
    if size != base.size or _blake2b(path) != base.blake2b:
        raise MemoryFormatError(
            f"{path} was truncated or altered ({size:,} bytes, {base.size:,} were written): "
            "restore a backup"
        )
    try:
        tensors = load_file(path)
    except RuntimeError:  # a file that went meanwhile, in some versions of safetensors
        files.check_regular(path)
        raise
    check_dtypes(tensors)
    return dict(tensors)


def bases(names: Iterable[str]) -> set[str]:
    """Those of the names that are a base's."""
    return {name for name in names if _NAME.fullmatch(name)}


def discard_others(folder: Path, keep: str) -> None:
    """Remove the bases that are not ``keep``; a reader that has one open keeps its content."""
    for name in bases(os.listdir(folder)) - {keep}:
        files.remove(folder / name)


def _blake2b(path: Path) -> bytes:
    total = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            total.update(chunk)
    return total.digest()
