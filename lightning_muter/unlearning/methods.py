"""The unlearning methods of the comparison, as data: a method has no code of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_muter.errors import ConfigurationError

__all__ = ["METHODS", "Method", "resolve_method"]


@dataclass(frozen=True)
class Method:
    """Which points a method looks at, which curvature it keeps, and when it is downdated."""

    points: Literal["adversarial", "clean", "none"]
    curvature: Literal["total", "hessian", "fisher", "none"]
    downdate: bool

    @property
    def has_memory(self) -> bool:
        """Whether Stage I builds a matrix for it."""
        return self.curvature != "none"


METHODS: dict[str, Method] = {
    "muter": Method("adversarial", "total", True),
    "newton": Method("clean", "hessian", True),
    "newton_delta": Method("adversarial", "hessian", True),
    "fisher": Method("clean", "fisher", True),
    "fisher_delta": Method("adversarial", "fisher", True),
    "influence": Method("clean", "hessian", False),
    "influence_delta": Method("adversarial", "hessian", False),
    "retrain": Method("none", "none", False),
    "none": Method("none", "none", False),
}
"""The methods of the comparison: name -> which points, which curvature, downdated or not.

A row of one's own can be added before a `MUterCallback` names it. Source: the paper, and the
baselines that it compares with (docs/methods.md).
"""


def resolve_method(name: str) -> Method:
    """The row of ``METHODS`` for a name.

    Raises:
        ConfigurationError: there is no such row.
    """
    if name not in METHODS:
        raise ConfigurationError(f"method={name!r} is unknown; expected one of {list(METHODS)}")
    return METHODS[name]
