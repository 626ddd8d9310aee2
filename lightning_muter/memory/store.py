"""A memory as a folder: manifest.json, ledger.jsonl and one safetensors file of its tensors."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_muter.errors import MemoryFormatError, MuterError

__all__ = ["FORMAT_VERSION", "Content", "TensorSpec", "read", "write"]

FORMAT_VERSION = 3
_STATE_NAME = re.compile(r"state-\d{6}-[0-9a-f]{8}\.safetensors")
_MANIFEST = {
    "format_version": int,
    "p": int,
    "n": int,
    "state": str,
    "state_blake2b": str,
    "ledger_lines": int,
    "ledger_blake2b": str,
    "key": str,
    "model_fingerprint": str,
    "settings": dict,
    "summary": dict,
    "warnings": list,
    "versions": dict,
    "checksum": str,
}
_START = "0" * 32  # what the first line of a ledger follows


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the state file: its dtype, its shape in p, n and numbers, may it be left out."""

    dtype: torch.dtype
    shape: tuple[str, ...]
    optional: bool = False

    def fits(self, tensor: Tensor, sizes: Mapping[str, int]) -> bool:
        """Whether a tensor that was read is one of these."""
        expected = tuple(sizes.get(name) or int(name) for name in self.shape)
        return tensor.dtype == self.dtype and tuple(tensor.shape) == expected


@dataclass(frozen=True)
class Content:
    """What a folder holds."""

    tensors: dict[str, Tensor]
    ledger: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    key: bytes
    fingerprint: str
    summary: dict[str, Any]
    warnings: tuple[str, ...]
    sizes: dict[str, int]  # "p" and "n"


def write(directory: str | os.PathLike[str], content: Content) -> None:
    """Write a memory; the manifest is replaced last, in one step, all of it checksummed.

    A reader sees the state before or the state after, never one in between; so does a machine
    that loses its power, since each file is on the disk before the next one names it.
    """
    folder = Path(directory)
    lines = _chained(content.ledger)
    name = f"state-{len(lines):06d}-{os.urandom(4).hex()}.safetensors"
    manifest = {
        "format_version": FORMAT_VERSION,
        **content.sizes,
        "state": name,
        "ledger_lines": len(lines),
        "ledger_blake2b": _blake2b("".join(lines).encode()),
        "key": content.key.hex(),
        "model_fingerprint": content.fingerprint,
        "settings": content.settings,
        "summary": content.summary,
        "warnings": list(content.warnings),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    _canonical(manifest)  # what JSON cannot keep fails here, before any file is touched
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(content.tensors, folder / name)
        _sync(folder / name)
        manifest["state_blake2b"] = _file_blake2b(folder / name)
        manifest["checksum"] = _blake2b(_canonical(manifest))
        _replace(folder / "ledger.jsonl", "".join(lines))
        _replace(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    except BaseException:
        _discard(folder, name)
        raise
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            with suppress(OSError):  # the write is done: a file too many is no failure of it
                old.unlink()


def _discard(folder: Path, name: str) -> None:
    """Remove what a failed write left, unless the manifest names it already."""
    with suppress(OSError):
        manifest = folder / "manifest.json"
        if not manifest.is_file() or name not in manifest.read_text(encoding="utf-8"):
            (folder / name).unlink(missing_ok=True)
        for left in folder.glob("*.new"):
            left.unlink()


def read(directory: str | os.PathLike[str], specs: Mapping[str, TensorSpec]) -> Content:
    """Read a memory and check every field of it; nothing is unpickled, imported or run.

    Raises:
        MemoryFormatError: missing, truncated, altered or of another format version.
    """
    folder = Path(directory)
    try:
        text = _regular(folder / "manifest.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise MemoryFormatError(
            f"{folder} holds no readable manifest.json ({error}): give the folder that a "
            "MUterCallback(memory_dir=...) wrote"
        ) from error
    try:
        _check_manifest(manifest)
        state = _regular(folder / manifest["state"])
        if _file_blake2b(state) != manifest["state_blake2b"]:
            raise MemoryFormatError(f"{state} was truncated or altered: restore a backup")
        sizes = {"p": manifest["p"], "n": manifest["n"]}
        tensors = load_file(state)
        _check_tensors(tensors, specs, sizes)
        ledger_text = _regular(folder / "ledger.jsonl").read_text(encoding="utf-8")
        return Content(
            tensors=tensors,
            ledger=_ledger(ledger_text, manifest["ledger_lines"], manifest["ledger_blake2b"]),
            settings=manifest["settings"],
            key=bytes.fromhex(manifest["key"]),
            fingerprint=manifest["model_fingerprint"],
            summary=manifest["summary"],
            warnings=tuple(manifest["warnings"]),
            sizes=sizes,
        )
    except MuterError:
        raise
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise MemoryFormatError(
            f"{folder} is damaged ({type(error).__name__}: {error}): restore a backup"
        ) from error


def _check_manifest(manifest: Any) -> None:
    if not isinstance(manifest, dict):
        raise MemoryFormatError(
            f"manifest.json holds a {type(manifest).__name__}, an object is expected: restore a "
            "backup"
        )
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise MemoryFormatError(
            f"format version {version} cannot be read, {FORMAT_VERSION} is expected: use the "
            "lightning-muter release that wrote it, or rebuild the memory"
        )
    if manifest.keys() != _MANIFEST.keys():
        apart = sorted(manifest.keys() ^ _MANIFEST.keys())
        raise MemoryFormatError(
            f"manifest.json lacks or adds the fields {apart}: it was altered; restore a backup"
        )
    wrong = [name for name, kind in _MANIFEST.items() if type(manifest[name]) is not kind]
    if wrong:
        raise MemoryFormatError(
            f"the fields {wrong} of manifest.json are of another type than was written: it was "
            "altered; restore a backup"
        )
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    if _blake2b(_canonical(rest)) != manifest["checksum"]:
        raise MemoryFormatError(
            "manifest.json does not agree with its checksum: it was altered; restore a backup, or "
            "rebuild the memory with the settings that you want"
        )
    if _STATE_NAME.fullmatch(manifest["state"]) is None:
        raise MemoryFormatError(
            f"manifest.json names the state file {manifest['state']!r}, which is none that a "
            "memory writes into its own folder: restore a backup"
        )
    if min(manifest["n"], manifest["p"]) < 1 or not all(
        isinstance(one, str) for one in manifest["warnings"]
    ):
        raise MemoryFormatError(
            f"manifest.json says n = {manifest['n']}, p = {manifest['p']} and warnings "
            f"{manifest['warnings']!r}, which no memory has: restore a backup"
        )


def _check_tensors(
    tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], sizes: Mapping[str, int]
) -> None:
    needed = {name for name, spec in specs.items() if not spec.optional}
    wrong = sorted((tensors.keys() - specs.keys()) | (needed - tensors.keys()))
    wrong += [n for n, s in specs.items() if n in tensors and not s.fits(tensors[n], sizes)]
    if wrong:
        raise MemoryFormatError(
            f"the tensors {wrong} are missing, too many, or of another shape or dtype than a "
            f"memory of {dict(sizes)} has: restore a backup"
        )


# --- the ledger: each line names the one before it ----------------------------------------------


def _chained(ledger: Sequence[Mapping[str, Any]]) -> list[str]:
    lines, before = [], _START
    for entry in ledger:
        before = _link(entry, before)
        lines.append(json.dumps({**entry, "chain": before}) + "\n")
    return lines


def _link(entry: Mapping[str, Any], before: str) -> str:
    return _blake2b(before.encode() + _canonical(entry))


def _ledger(text: str, count: int, checksum: str) -> tuple[dict[str, Any], ...]:
    """The first ``count`` entries; a next one may stand there, of a write that did not end."""
    lines = text.splitlines(keepends=True)
    if len(lines) < count:
        raise MemoryFormatError(
            f"ledger.jsonl has {len(lines)} lines, the manifest says {count}: it was truncated; "
            "restore a backup"
        )
    if _blake2b("".join(lines[:count]).encode()) != checksum:
        raise MemoryFormatError(
            "ledger.jsonl does not agree with the manifest's checksum: lines were altered, "
            "swapped or doubled; restore a backup"
        )
    entries, before = [], _START
    for number, line in enumerate(lines, start=1):
        entry = json.loads(line)
        chain = entry.pop("chain")
        before = _link(entry, before)
        if chain != before or entry["request"] != number:
            raise MemoryFormatError(
                f"line {number} of ledger.jsonl does not follow the one before it: it was "
                "altered; restore a backup"
            )
        entries.append(entry)
    return tuple(entries[:count])


# --- files --------------------------------------------------------------------------------------


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _blake2b(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _file_blake2b(path: Path) -> str:
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def _regular(path: Path) -> Path:
    """The path itself, where it is a file that can be read to its end."""
    if not path.is_file():
        raise MemoryFormatError(
            f"{path} is missing or no regular file: give the folder that a "
            "MUterCallback(memory_dir=...) wrote, or restore a backup"
        )
    return path


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".new")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
