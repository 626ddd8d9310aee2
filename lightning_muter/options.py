"""Arguments of the callback that belong together, as values that YAML builds by class path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_muter.errors import ConfigurationError

__all__ = [
    "FLAT_DEFAULTS",
    "Ascent",
    "BlockSolver",
    "ConstrainedResponse",
    "DirectSolver",
    "Options",
    "Rows",
    "UnconstrainedResponse",
    "flat",
]

#: the flat keywords that option values can stand for, with their defaults
FLAT_DEFAULTS: dict[str, Any] = {
    "response": "constrained",
    "inverse": "neumann",
    "neumann_order": 3,
    "space": "input",
    "damping": 0.0,
    "solver": "auto",
    "sketch": 0,
    "representation": "auto",
    "row_dtype": "float64",
    "solver_tol": None,
    "attack_steps": 10,
    "attack_step_size": None,
    "random_start": True,
}


class Options(ABC):
    """Some of the callback's flat keywords under one name."""

    @abstractmethod
    def keywords(self) -> dict[str, Any]:
        """The flat keywords that this value stands for."""


@dataclass(frozen=True, kw_only=True)
class Ascent(Options):
    """The threat's own projected gradient ascent as the training attack.

    Attributes:
        steps: how many steps.
        step_size: their length, in the units of ``eps``; None for 2.5 · eps / steps.
        random_start: start at a random allowed perturbation, else at the point itself.

    Example:
        >>> Ascent(steps=7).keywords()["attack_steps"]
        7
    """

    steps: int = 10
    step_size: float | None = None
    random_start: bool = True

    def keywords(self) -> dict[str, Any]:
        return {
            "attack_steps": self.steps,
            "attack_step_size": self.step_size,
            "random_start": self.random_start,
        }


@dataclass(frozen=True, kw_only=True)
class ConstrainedResponse(Options):
    """How a maximiser moves with the parameters, the constraint differentiated. Source: ours.

    Attributes:
        sketch: seeded probes a point where all of ∂φ/∂x is too dear; "auto" for a number by the
            sizes; 0 for the exact response.

    Example:
        >>> ConstrainedResponse(sketch=1).keywords()["response"]
        'constrained'
    """

    sketch: int | Literal["auto"] = 0

    def keywords(self) -> dict[str, Any]:
        return {"response": "constrained", "sketch": self.sketch}


@dataclass(frozen=True, kw_only=True)
class UnconstrainedResponse(Options):
    """How a maximiser moves where no constraint is active: the paper's eq. (4), (15) and (16).

    Attributes:
        inverse: "neumann" for the series, "exact" for the pseudo-inverse.
        order: where the series is clipped.
        space: "input", or "features" for perturbations of the head's input.
        sketch: as in `ConstrainedResponse`.

    Example:
        >>> UnconstrainedResponse(order=100, space="features").keywords()["neumann_order"]
        100
    """

    inverse: Literal["neumann", "exact"] = "neumann"
    order: int = 3
    space: Literal["input", "features"] = "input"
    sketch: int | Literal["auto"] = 0

    def keywords(self) -> dict[str, Any]:
        return {
            "response": "unconstrained",
            "inverse": self.inverse,
            "neumann_order": self.order,
            "space": self.space,
            "sketch": self.sketch,
        }


@dataclass(frozen=True, kw_only=True)
class DirectSolver(Options):
    """A factorisation of the downdated matrix at each request.

    Attributes:
        damping: added to its diagonal before the solve.
    """

    damping: float = 0.0

    def keywords(self) -> dict[str, Any]:
        return {"solver": "direct", "damping": self.damping}


@dataclass(frozen=True, kw_only=True)
class BlockSolver(Options):
    """Theorem 2's block system, by products only; at most 1,000 iterations of each solver.

    Attributes:
        damping: added to M's diagonal before the solve.
    """

    damping: float = 0.0

    def keywords(self) -> dict[str, Any]:
        return {"solver": "schur", "damping": self.damping}


@dataclass(frozen=True, kw_only=True)
class Rows(Options):
    """The curvature of a linear head as a few vectors a point, for heads of any size.

    Attributes:
        dtype: of the rows: "float64", or "float32" for half the memory.
        tol: relative residual at which a solve stops; None for 1e-8, or 1e-5 in float32.

    Example:
        >>> Rows(dtype="float32").keywords()["row_dtype"]
        'float32'
    """

    dtype: Literal["float64", "float32"] = "float64"
    tol: float | None = None

    def keywords(self) -> dict[str, Any]:
        return {"representation": "rows", "row_dtype": self.dtype, "solver_tol": self.tol}


def flat(
    given: Mapping[str, Any], defaults: Mapping[str, Any], options: Mapping[str, object]
) -> dict[str, Any]:
    """The flat keywords with those that option values stand for.

    Args:
        given: the flat keywords as the user gave them.
        defaults: their default values.
        options: argument name -> an `Options` value, or anything else, which stays flat.

    Raises:
        ConfigurationError: a keyword is given flat and by a value at once.

    Example:
        >>> flat({"sketch": 0}, {"sketch": 0}, {"response": ConstrainedResponse(sketch=2)})
        {'sketch': 2, 'response': 'constrained'}
    """
    result = dict(given)
    for argument, value in options.items():
        if not isinstance(value, Options):
            continue
        meant = value.keywords()
        twice = [k for k in meant if k != argument and given.get(k) != defaults.get(k)]
        if twice:
            raise ConfigurationError(
                f"{argument}={value!r} and {', '.join(f'{k}={given[k]!r}' for k in twice)} say the "
                f"same thing twice: put it into {type(value).__name__}(...) alone"
            )
        result.update(meant)
    return result
