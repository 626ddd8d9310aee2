"""How values show themselves: counted nouns, and a card for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

__all__ = ["card", "counted", "short"]

_SHOWN = 6


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "point"), counted(1437, "point")
        ('1 point', '1,437 points')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(value: Any) -> str:
    """A value of a summary for a person: floats to four digits, the beginning of a long list.

    Example:
        >>> short(0.123456), short(1437), short("dense"), short(list(range(20)))
        ('0.1235', '1,437', 'dense', '0, 1, 2, 3, 4, 5, … (20)')
    """
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:_SHOWN]))
        return shown if len(value) <= _SHOWN else f"{shown}, … ({len(value)})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def card(title: str, rows: Mapping[str, Any], warnings: Sequence[str]) -> str:
    """A small table as HTML, self-contained: for ``_repr_html_``.

    Args:
        title: its first line.
        rows: name -> value, in their order.
        warnings: sentences below the table.

    Example:
        >>> "&lt;b&gt;" in card("<b>", {"points": 2}, [])
        True
    """
    environment = Environment(
        loader=PackageLoader("lightning_muter"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = {name: short(value) for name, value in rows.items()}
    return environment.get_template("card.html").render(title=title, rows=shown, warnings=warnings)
