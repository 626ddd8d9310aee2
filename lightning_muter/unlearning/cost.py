"""What Stage I and a request take: bytes and seconds, and the memory that is free for them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = [
    "Cost",
    "free_bytes",
    "matrix_product_seconds",
    "memory_bytes",
    "product_seconds",
    "request_bytes",
    "said_size",
    "size_estimate",
    "solve_seconds",
]

_PROBE = 400
_UNCACHED = 2000
#: (p, p) matrices that a request holds beside the memory: the points' sum, its factor, a vector's
_WORKING = 2.2


def memory_bytes(p: int) -> int:
    """A dense memory of p parameters.

    Example:
        >>> memory_bytes(6410)
        328704800
    """
    return 8 * p * p


def size_estimate(p: int) -> str:
    """How large a dense memory of p parameters is, for a person.

    Example:
        >>> size_estimate(6410)
        'p = 6,410: 329 MB'
    """
    return f"p = {p:,}: {8 * p * p / 1e6:,.0f} MB"


def request_bytes(p: int) -> int:
    """What a request holds beside the memory while it works."""
    return int(_WORKING * memory_bytes(p))


@dataclass(frozen=True)
class Cost:
    """What Stage I over ``points`` points (of this process) and one request take: seconds, bytes.

    ``newton_steps`` may end early: with them the time is an upper estimate.
    """

    points: int
    p: int
    newton_steps: int
    stage_one_seconds: float
    request_seconds: float
    memory: int
    working: int

    def __str__(self) -> str:
        newton = f" after up to {self.newton_steps} Newton steps" if self.newton_steps else ""
        return (
            f"Stage I{newton} will take about {_duration(self.stage_one_seconds)} for "
            f"{self.points:,} points and {self.kept} (p = {self.p:,}); a request will take "
            f"{self.request}"
        )

    @property
    def kept(self) -> str:
        """What the memory takes, for a person."""
        return said_size(self.memory)

    @property
    def request(self) -> str:
        """What a request of one point takes beside the memory, for a person."""
        seconds, size = _duration(self.request_seconds), said_size(self.working)
        return f"about {seconds} and {size} more"


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 5400.0), ("minutes", 90.0)):
        if seconds >= length:
            return f"{seconds / (3600 if unit == 'hours' else 60):.1f} {unit}"
    return f"{max(seconds, 0.01):.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def said_size(number: int) -> str:
    """Bytes for a person.

    Example:
        >>> said_size(328_704_800)
        '329 MB'
    """
    if number >= 1e10:
        return f"{number / 1e9:,.0f} GB"
    return f"{number / 1e6:,.1f} MB" if number < 1e7 else f"{number / 1e6:,.0f} MB"


def solve_seconds(p: int, device: torch.device) -> float:
    """A Cholesky factorisation of p x p, from that of a small matrix: p³/3 operations."""
    size = min(p, _PROBE)
    matrix = torch.eye(size, dtype=torch.float64, device=device)
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        factor, _ = torch.linalg.cholesky_ex(matrix)
        float(factor[0, 0])  # waits for an accelerator
        best = min(best, time.perf_counter() - start)
    return best * float(p / size) ** 3


def matrix_product_seconds(p: int, device: torch.device) -> float:
    """A product of a (p, p) matrix with a vector, from that of one that no cache holds."""
    size = min(p, _UNCACHED)
    matrix = torch.ones(size, size, dtype=torch.float64, device=device)
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        float((matrix @ matrix[0])[0])
        best = min(best, time.perf_counter() - start)
    return best * float(p / size) ** 2


def product_seconds(
    points: int, width: int, classes: int, factors: int, dtype: torch.dtype
) -> float:
    """A product with rows of some points, from that of a few: 4(1 + K) n C F̃ operations."""
    some = min(points, _PROBE)
    features, matrix = torch.ones(some, width, dtype=dtype), torch.ones(width, classes, dtype=dtype)
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        float((features @ matrix)[0, 0])
        best = min(best, time.perf_counter() - start)
    return best * 2 * (1 + factors) * points / some


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a device, or None where that is not known."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    if device.type != "cpu":
        return None
    known = [n for n in (_available(), _control_group()) if n is not None]
    return min(known) if known else None


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
    value = fields.get("MemAvailable")
    return int(value[0]) * 1024 if value else None


def _control_group() -> int | None:
    """What a container's limit leaves: the smallest along this process's control groups."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    left: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = Path(os.path.normpath(f"{root}/{path}"))
        while folder == root or root in folder.parents:
            room = _room(folder, *names)
            left += [] if room is None else [room]
            folder = folder.parent
    return min(left) if left else None


def _room(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Limit less usage of one control group; the page cache that it would give back is free."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    if not most.isdigit():  # "max"
        return None
    statistics = {key: int(value) for key, _, value in (line.partition(" ") for line in lines)}
    cache = statistics.get(reclaimable, 0)
    return max(0, int(most) - used + cache)
