"""How the curvature of the points is kept: as a matrix, or as rows; by what each takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lightning_muter.curvature.class_blocks import block_bytes
from lightning_muter.errors import ConfigurationError
from lightning_muter.models import LinearHead, ModelView
from lightning_muter.spec import Settings
from lightning_muter.unlearning.cost import free_bytes, memory_bytes, request_bytes, said_size
from lightning_muter.unlearning.methods import METHODS

__all__ = ["Footprint", "Representation", "footprint_of", "represented", "with_probes"]

_SMALL = 10_000  # parameters whose matrix is factorised in seconds: a request is fastest then
_FACTS = 8 * 3 + 1  # bytes a point: its weight, index, active share and whether it is stationary
#: probes a point of sketch="auto" at the most: Stage I takes longer with each, while the noise
#: falls with the root of their number; and the bytes that rows with them may take
_PROBES, _PROBE_BYTES = 16, 2**30
_WORKING = 0.25  # of the rows, that a request holds beside them while it works


@dataclass(frozen=True)
class Footprint:
    """What rows of a linear head keep.

    Attributes:
        classes: outputs C.
        width: features F̃, the bias among them.
        factors: vectors a point of the inner response.
        diagonal: whether the response has a diagonal besides.
        size: bytes of a number.
        sides: inputs that a point's loss sees: with TRADES the clean one too.
    """

    classes: int
    width: int
    factors: int
    diagonal: bool
    size: int
    sides: int = 1

    @property
    def point_bytes(self) -> int:
        """Bytes a point."""
        numbers = self.width * (self.sides + self.factors + self.diagonal)
        numbers += self.classes * self.sides * (self.sides + 1 + self.factors) + self.factors
        return self.size * numbers + _FACTS

    def rows_bytes(self, points: int) -> int:
        """Rows of some points, and one block of the preconditioner."""
        return points * self.point_bytes + block_bytes(1, self.width, torch.float64)


@dataclass(frozen=True)
class Representation:
    """What was chosen, and what it takes.

    Attributes:
        settings: with "dense" or "rows".
        memory: bytes of the memory.
        working: bytes more while a request works.
        why: both estimates, and the choice, for a person.
        footprint: of rows, where the head has them.
    """

    settings: Settings
    memory: int
    working: int
    why: str
    footprint: Footprint | None


def footprint_of(settings: Settings, view: ModelView, inputs: int) -> Footprint | str:
    """What rows would keep a point, or why there are none.

    Args:
        settings: of the memory.
        view: of the module.
        inputs: numbers of an input.
    """
    if not isinstance(view, LinearHead):
        return "rows need a linear head (head=...)"
    fisher = METHODS[settings.method].curvature == "fisher"
    if settings.objective is not None and fisher:
        return "Fisher information of TRADES is of two inputs a point at once"
    if settings.threat.temperature is not None:
        return "rows serve no threat with a temperature"
    layer, total = view.layer, METHODS[settings.method].curvature == "total"
    closed = layer.in_features == inputs or settings.space == "features"
    if total and not closed and not settings.probes:
        return "rows need sketch=1 or more: a network's exact inner response is no few vectors"
    factors = 0
    if total:
        factors = layer.out_features + 1 if closed else settings.probes
    if total and settings.response == "unconstrained" and not closed:
        factors *= 2
    return Footprint(
        classes=layer.out_features,
        width=layer.in_features + (layer.bias is not None),
        factors=factors,
        diagonal=total and closed,
        sides=1 if settings.objective is None else 2,
        size=settings.rows_options(torch.device("cpu")).dtype.itemsize,
    )


def with_probes(settings: Settings, view: ModelView, inputs: int, points: int) -> Settings:
    """The settings with a number of probes where it is "auto".

    As many as keep the rows of all points within 1 GiB, one to sixteen: a function
    of the sizes alone, so that every machine builds the same memory.

    Args:
        settings: of the memory.
        view: of the module.
        inputs: numbers of an input.
        points: of all processes.
    """
    if settings.sketch != "auto":
        return settings
    for probes in range(_PROBES, 1, -1):
        asked = replace(settings, sketch=probes)
        rows = footprint_of(asked, view, inputs)
        if isinstance(rows, str) or rows.rows_bytes(points) <= _PROBE_BYTES:
            return asked
    return replace(settings, sketch=1)


def represented(
    settings: Settings,
    view: ModelView,
    inputs: int,
    points: int,
    device: torch.device,
    processes: int = 1,
    world: int = 1,
) -> Representation:
    """The settings with a representation that fits, chosen by what each takes where it is "auto".

    Args:
        settings: of the memory.
        view: of the module.
        inputs: numbers of an input.
        points: of this process.
        device: where the memory will lie.
        processes: that share the device's memory, each with a memory of its own.
        world: processes in all, over which a sharded matrix is spread.

    Raises:
        ConfigurationError: what was asked for does not exist for this head, or nothing fits.
    """
    rows = footprint_of(settings, view, inputs)
    shards = world if settings.representation == "sharded" else 1
    dense_bytes = processes * memory_bytes(view.p) // shards
    dense_more = processes * request_bytes(view.p) // shards**2  # a block of its own and its factor
    estimates = f"{said_size(dense_bytes)} as a matrix"
    rows_bytes = None
    if isinstance(rows, Footprint):
        rows_bytes = processes * rows.rows_bytes(points)
        estimates += f", {said_size(rows_bytes)} as rows"
    wanted, free = settings.representation, free_bytes(device)
    if wanted == "rows" and isinstance(rows, str):
        raise ConfigurationError(f"representation='rows': {rows}")
    fits = free is None or dense_bytes + dense_more <= free
    if wanted == "auto":
        small = view.p <= _SMALL or rows_bytes is None or dense_bytes <= rows_bytes
        wanted = "dense" if fits and small or rows_bytes is None else "rows"
    needed = dense_bytes + dense_more
    if wanted == "rows" and rows_bytes is not None:
        needed = int((1 + _WORKING) * rows_bytes)
        fits = free is None or needed <= free
    if not fits:
        raise ConfigurationError(
            f"p = {view.p:,} trained parameters and {points:,} points take {estimates}; "
            f"representation={wanted!r} needs {said_size(needed)} with what a request holds "
            f"beside it, and {said_size(free or 0)} are free on {device}: choose "
            f"{_smaller(settings, wanted, rows)}"
        )
    memory = rows_bytes if wanted == "rows" and rows_bytes is not None else dense_bytes
    return Representation(
        settings=replace(settings, representation=wanted),
        memory=memory,
        working=needed - memory,
        why=f"the memory is kept as {wanted}: it takes {estimates}",
        footprint=rows if isinstance(rows, Footprint) else None,
    )


def _smaller(settings: Settings, wanted: str, rows: Footprint | str) -> str:
    """What takes less room than what was wanted, for a person."""
    others = "a smaller head or fewer parameters, or a machine with more memory"
    if isinstance(rows, str):
        return f"{others} ({rows})"
    if wanted != "rows":
        return f"representation='rows', {others}"
    return others if settings.row_dtype == "float32" else f"row_dtype='float32', {others}"
