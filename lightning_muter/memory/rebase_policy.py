"""When a request should ask for a rebase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from lightning_muter.errors import ConfigurationError

__all__ = ["RebasePolicy"]


@dataclass(frozen=True)
class RebasePolicy:
    """A rebase is due after so many requests, or so many days after the first of them.

    Attributes:
        every: requests, at least 1; None for no limit.
        after: days, more than 0; None for no limit.

    Raises:
        ConfigurationError: a limit is outside what it says here.

    Example:
        >>> now = datetime.fromisoformat("2026-03-01T12:00:00+00:00")
        >>> RebasePolicy(every=2).due([{"request": 1}, {"request": 2}], now)
        'a rebase is due: 2 requests since the memory was built or rebased (every 2)'
        >>> RebasePolicy(every=2).due([{"request": 1}], now)
        ''
    """

    every: int | None = None
    after: float | None = None

    def __post_init__(self) -> None:
        if self.every is not None and not (type(self.every) is int and self.every >= 1):
            raise ConfigurationError(f"rebase_every={self.every!r} must be a number of requests")
        if self.after is not None and not self.after > 0:
            raise ConfigurationError(f"rebase_after={self.after!r} must be a number of days > 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def due(self, ledger: Sequence[Mapping[str, Any]], now: datetime) -> str:
        """Why a rebase is due, for a person; nothing where it is not."""
        since: list[Mapping[str, Any]] = []
        for entry in ledger:
            since = [] if entry.get("kind") == "rebase" else [*since, entry]
        if self.every is not None and len(since) >= self.every:
            return (
                f"a rebase is due: {len(since)} requests since the memory was built or rebased "
                f"(every {self.every})"
            )
        first = next((entry["time"] for entry in since if "time" in entry), None)
        if self.after is None or first is None:
            return ""
        waited = now - datetime.fromisoformat(first)
        if waited < timedelta(days=self.after):
            return ""
        return (
            f"a rebase is due: {waited.days} days since the first request that was not followed by "
            f"one (after {self.after:g})"
        )
