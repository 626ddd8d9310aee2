"""When a request asks for a rebase."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest

from lightning_muter import ConfigurationError
from lightning_muter.memory.rebase_policy import RebasePolicy

NOW = datetime(2026, 3, 20, tzinfo=timezone.utc)
REQUEST = {"request": 1, "time": "2026-03-01T00:00:00+00:00"}
REBASE = {"request": 2, "kind": "rebase", "time": "2026-03-02T00:00:00+00:00"}


@pytest.mark.parametrize(
    ("limits", "ledger", "due"),
    [
        ({}, [REQUEST] * 9, ""),
        ({"every": 2}, [REQUEST], ""),
        ({"every": 2}, [REQUEST, REQUEST], "2 requests"),
        ({"every": 2}, [REQUEST, REQUEST, REBASE, REQUEST], ""),
        ({"after": 19.0}, [REQUEST], "19 days"),
        ({"after": 19.5}, [REQUEST], ""),
        ({"after": 1.0}, [REQUEST, REBASE], ""),
        ({"after": 1.0}, [], ""),
    ],
)
def test_limits(limits: dict[str, Any], ledger: list[dict[str, Any]], due: str) -> None:
    said = RebasePolicy(**limits).due(ledger, NOW)
    assert said == due if not due else due in said
    assert RebasePolicy(**RebasePolicy(**limits).to_dict()) == RebasePolicy(**limits)


@pytest.mark.parametrize("limits", [{"every": 0}, {"every": True}, {"after": 0.0}, {"after": -1}])
def test_limits_that_are_none(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="rebase_"):
        RebasePolicy(**limits)
