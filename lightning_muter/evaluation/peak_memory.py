"""Peak memory of a stretch of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "peak_memory"]

_PROCESS = Path("/proc/self")


@dataclass
class Peak:
    """``bytes`` above what was held at the start; None where the system does not say."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """The peak of a block that works on a device: of a GPU's allocator, else resident memory.

    Resident memory counts pages, not tensors: what an earlier stage freed and the process kept
    is used again without showing. Linux only; elsewhere the result is None.

    Example:
        >>> import torch
        >>> with peak_memory(torch.device("cpu")) as peak:
        ...     large = torch.ones(1 << 24)
        >>> peak.bytes is None or peak.bytes >= 0
        True
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - start
        return
    try:
        (_PROCESS / "clear_refs").write_text("5")  # resets the high-water mark
        start = _status("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.bytes = max(0, _status("VmHWM") - start)


def _status(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
