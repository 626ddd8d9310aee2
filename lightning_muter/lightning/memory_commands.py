"""The commands beside Lightning's verbs: export, report and verify of a memory, and presets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_muter.errors import ConfigurationError, MemoryFormatError
from lightning_muter.lightning.parsing import CommandParser
from lightning_muter.lightning.presets import described, folder
from lightning_muter.memory import model_file
from lightning_muter.memory.evidence import evidence
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.kept_model import bring_model_up_to_date, verified
from lightning_muter.memory.report import write_report

__all__ = ["MEMORY_COMMANDS", "check_openings", "check_target", "write_checkpoint"]


def check_target(target: Path | None, option: str = "--output") -> None:
    """Refuse a place that cannot be written, before anything else is done.

    Args:
        target: the file; None where none is asked for.
        option: what names it.

    Raises:
        ConfigurationError: with the place.
    """
    if target is None:
        return
    folder = target.parent
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigurationError(
            f"nothing can be saved as {target}: say {option} with a file in a folder that "
            "exists and can be written"
        )


def check_openings(target: Path | None, folder: str) -> None:
    """Refuse a place where openings would be lost, or found by whoever reads the memory.

    Args:
        target: the file; None where none is asked for.
        folder: the memory's.

    Raises:
        ConfigurationError: with the place.
    """
    if target is None:
        return
    check_target(target, "--openings")
    if target.exists():
        raise ConfigurationError(
            f"{target} exists, and the openings of an earlier rebase cannot be computed again: say "
            "--openings with a new file"
        )
    if target.resolve().is_relative_to(Path(folder).resolve()):
        raise ConfigurationError(
            f"{target} lies in the folder whose commitments it opens: say --openings with a file "
            "outside the memory's folder"
        )


def write_checkpoint(checkpoint: Mapping[str, Any], target: Path) -> None:
    """Write a checkpoint in one step."""
    partial = target.with_suffix(target.suffix + ".new")
    try:
        torch.save(dict(checkpoint), partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    print(f"saved: {target}")


def export(args: Sequence[str]) -> None:
    """Write the current model of a memory as a checkpoint of its own."""
    parser = CommandParser(
        prog="lightning-muter export",
        description="Write a memory's current model, without what was forgotten, as a checkpoint.",
    )
    parser.add_argument("--memory", type=str, required=True, help="the memory's folder")
    parser.add_argument("--output", type=str, required=True, help="the checkpoint to write")
    given: Any = parser.parse_args(list(args))
    store, target = MemoryStore(given.memory), Path(given.output)
    check_target(target)
    if store.model_generation() is None:
        raise MemoryFormatError(
            f"{given.memory} was kept without a model: load the model's own checkpoint and put the "
            "current parameters into it with UnlearningMemory.load(folder).restore(module)"
        )
    bring_model_up_to_date(store)
    write_checkpoint(model_file.read(store.folder), target)


def verify(args: Sequence[str]) -> None:
    """Check every byte of a memory's folder and the chain of its ledger."""
    parser = CommandParser(
        prog="lightning-muter verify",
        description="Check every field of a memory, and that its ledger is as it was written.",
    )
    parser.add_argument("memory", type=str, help="the memory's folder")
    given: Any = parser.parse_args(list(args))
    print(verified(MemoryStore(given.memory)))


def report(args: Sequence[str]) -> None:
    """Write what was forgotten when, with which evidence, as a page and as JSON."""
    parser = CommandParser(
        prog="lightning-muter report",
        description="Write a memory's ledger and evidence as one page, and as JSON beside it.",
    )
    parser.add_argument("memory", type=str, help="the memory's folder")
    parser.add_argument("--output", type=str, default="report.html", help="the page to write")
    given: Any = parser.parse_args(list(args))
    output = Path(given.output)
    check_target(output)
    for path in write_report(evidence(MemoryStore(given.memory)), output):
        print(f"saved: {path}")


def presets(args: Sequence[str]) -> None:
    """List the presets, what each is for, and where they lie."""
    CommandParser(
        prog="lightning-muter presets",
        description="List the presets that -c takes by their names, and their folder.",
    ).parse_args(list(args))
    found = described()
    width = max(len(name) for name in found)
    for name, purpose in found.items():
        print(f"{name:{width}}  {purpose}")
    print(f"folder: {folder()}")


MEMORY_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "export": export,
    "presets": presets,
    "report": report,
    "verify": verify,
}
