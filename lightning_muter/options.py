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

    A value for ``MUterCallback(attack=...)``, which checks it.

    Attributes:
        steps: how many steps, at least 1.
        step_size: their length, above 0, in the units of ``eps``; None for 2.5 · eps / steps.
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
    """How a maximiser moves with the parameters, the constraint differentiated.

    A value for ``MUterCallback(response=...)``, which checks it. Source: ours (docs/theory.md).

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

    A value for ``MUterCallback(response=...)``, which checks it.

    Attributes:
        inverse: of ∂δδ l: "neumann" for its series, "exact" for the pseudo-inverse.
        order: k, at least 0: the series has the terms (I - ∂δδ l)^j of j = 0 to k.
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
    """Systems by a factorisation of the matrix that is made once and kept.

    What requests took out since is left to conjugate gradients with that factor as their
    preconditioner, to a relative residual of 1e-12. Rows have no matrix and are solved by products.
    A value for ``MUterCallback(solver=...)``; the default takes it up to 20,000 parameters. Source:
    ours (docs/theory.md).

    Attributes:
        damping: at least 0, added to the diagonal of M, a sum over points, before the solve.

    Example:
        >>> DirectSolver(damping=1e-6).keywords()
        {'solver': 'direct', 'damping': 1e-06}
    """

    damping: float = 0.0

    def keywords(self) -> dict[str, Any]:
        return {"solver": "direct", "damping": self.damping}


@dataclass(frozen=True, kw_only=True)
class BlockSolver(Options):
    """Theorem 2's block system, by products only.

    To a relative residual of 1e-10 where the model is of float64, else 1e-6, in at most 1,000
    iterations of conjugate gradients and as many of minimum residuals. Not with a horizon. A value
    for ``MUterCallback(solver=...)``. Source: the paper, Theorem 2.

    Attributes:
        damping: at least 0, added to the diagonal of M, a sum over points, before the solve.

    Example:
        >>> BlockSolver().keywords()
        {'solver': 'schur', 'damping': 0.0}
    """

    damping: float = 0.0

    def keywords(self) -> dict[str, Any]:
        return {"solver": "schur", "damping": self.damping}


@dataclass(frozen=True, kw_only=True)
class Rows(Options):
    """The curvature of a linear head as a few vectors a point, for heads of any size.

    A value for ``MUterCallback(representation=...)``, which checks it. Source: ours
    (docs/theory.md, Rows).

    Attributes:
        dtype: of the rows: "float64", or "float32" for half the memory; systems are refined in
            float64 in either case.
        tol: relative residual between 0 and 1 at which a solve stops; None for 1e-8, or 1e-5 in
            float32.

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
