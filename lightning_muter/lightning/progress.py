"""Progress bars of the passes that the package makes itself, in the manner of the trainer's own."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

from lightning_muter.lightning.flavour import pl

__all__ = ["Bar", "bar_of", "blocks", "no_bar"]

#: notebook widgets where they are installed, else text: tqdm.auto warns in a notebook without them
tqdm: Any = importlib.import_module("tqdm.auto" if find_spec("ipywidgets") else "tqdm").tqdm

T = TypeVar("T")
Advance = Callable[[int], None]

#: seconds before a pass shows itself
DELAY = 1.0


class Bar(Protocol):
    """Goes through blocks of points and shows how far it is, and when it will be done."""

    def __call__(
        self, found: Iterable[T], what: str, total: int | None, size: Callable[[T], int] = ...
    ) -> Iterator[T]:
        """The blocks as they are; ``size`` says how many points one has."""


def no_bar(
    found: Iterable[T], what: str, total: int | None, size: Callable[[T], int] = lambda one: 1
) -> Iterator[T]:
    """A `Bar` that shows nothing.

    Example:
        >>> list(no_bar([range(2), range(3)], "reading", 5, len))
        [range(0, 2), range(0, 3)]
    """
    yield from found


def bar_of(trainer: pl.Trainer) -> Bar:
    """The bar that fits a trainer: rich's where it has Lightning's rich bar, tqdm's beside tqdm's.

    None is shown where the trainer shows none, on other processes than the first, and for a pass
    that ends within a second.
    """
    own = trainer.progress_bar_callback
    if own is None or getattr(own, "is_disabled", False) or not trainer.is_global_zero:
        return no_bar
    shown = _rich if isinstance(own, pl.callbacks.RichProgressBar) else _tqdm

    def bar(
        found: Iterable[T], what: str, total: int | None, size: Callable[[T], int] = lambda one: 1
    ) -> Iterator[T]:
        with shown(what, total) as advance:
            for one in found:
                yield one
                advance(size(one))

    return bar


def blocks(points: range, size: int) -> Iterator[range]:
    """Consecutive parts of a range.

    Example:
        >>> list(blocks(range(5), 2))
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    return (points[first : first + size] for first in range(0, len(points), size))


@contextmanager
def _tqdm(what: str, total: int | None) -> Iterator[Advance]:
    with tqdm(desc=what, total=total, unit="point", leave=False, delay=DELAY) as bar:
        yield lambda count: bar.update(count) and None


@contextmanager
def _rich(what: str, total: int | None) -> Iterator[Advance]:
    """On a console of its own: Lightning's may still be live."""
    rich: Any = importlib.import_module("rich.progress")
    console: Any = importlib.import_module("rich.console").Console()
    columns = [
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    ]
    progress = rich.Progress(*columns, console=console, transient=True)
    task, start = progress.add_task(what, total=total), time.monotonic()

    def advance(count: int) -> None:
        progress.advance(task, count)
        if not progress.live.is_started and time.monotonic() - start >= DELAY:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()
