"""A memory's evidence as one page without outside references, and as JSON."""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

__all__ = ["html", "write_report"]


def html(evidence: dict[str, Any]) -> str:
    """The page, self-contained: styles within, no script, nothing loaded from elsewhere."""
    environment = Environment(
        loader=PackageLoader("lightning_muter.memory"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent}
    kinds = [entry.get("kind", "request") for entry in evidence["requests"]]
    rebases = kinds.count("rebase")
    return environment.get_template("report.html").render(
        e=evidence,
        rebases=rebases,
        forgets=len(kinds) - rebases,
        now=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=version("lightning-muter"),
    )


def write_report(evidence: dict[str, Any], output: Path) -> list[Path]:
    """Write the page, and the same as JSON beside it; both paths.

    Args:
        evidence: what `lightning_muter.memory.evidence` gives.
        output: the page's path; the JSON file has its name and the suffix .json.
    """
    data = output.with_suffix(".json")
    output.write_text(html(evidence), encoding="utf-8")
    text = json.dumps(_plain(evidence), indent=2, allow_nan=False)
    data.write_text(text + "\n", encoding="utf-8")
    return [output, data]


def _plain(value: Any) -> Any:
    """The value as every reader of JSON takes it: numbers that are not finite as their names."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> str:
    return "unknown" if not isinstance(value, (int, float)) else f"{value:.3g}"


def _percent(value: Any) -> str:
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return f"{value:.1%}" if known else "unknown"
