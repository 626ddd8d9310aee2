"""Inner responses: how a maximiser moves with the parameters."""

from lightning_muter.arguments import whole
from lightning_muter.errors import ConfigurationError
from lightning_muter.responses.base import InputCurvature, Response
from lightning_muter.responses.constrained import Constrained
from lightning_muter.responses.matrices import Dense, DiagonalLowRank, restored
from lightning_muter.responses.unconstrained import Unconstrained

__all__ = [
    "Constrained",
    "Dense",
    "DiagonalLowRank",
    "InputCurvature",
    "Response",
    "Unconstrained",
    "resolve_response",
    "restored",
]

#: far below the noise of any number of probes
_PROBE_TOL = 1e-3


def resolve_response(
    response: str | Response, inverse: str = "neumann", order: int = 3, sketch: int = 0
) -> Response:
    """The `Response` for "constrained" or "unconstrained", or the object itself."""
    whole("neumann_order", order)
    whole("sketch", sketch)
    if response == "constrained":
        return Constrained(tol=_PROBE_TOL, rank=sketch) if sketch else Constrained()
    if response == "unconstrained":
        return Unconstrained(inverse, order, rank=sketch)  # type: ignore[arg-type]
    if isinstance(response, str):
        raise ConfigurationError(
            f"response={response!r} is unknown; expected 'constrained' or 'unconstrained'"
        )
    return response
