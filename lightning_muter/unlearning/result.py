"""What a request answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["UnlearningResult"]


@dataclass(frozen=True)
class UnlearningResult:
    """The numbers of one call of ``trainer.unlearn``.

    Attributes:
        method: the row of METHODS.
        indices: the training points forgotten, in the order of the requests.
        requests: how many requests (removal batches) were served.
        update_norm: ‖ω^u - ω before‖ over the whole call.
        residual: largest ‖M Δω - rhs‖ / ‖rhs‖ of the requests' systems; with a horizon that of the
            flow, ‖M Δ - (I - exp(-hM)) b‖ / ‖b‖.
        iterations: solver iterations, summed, Lanczos steps among them; 0 for a direct solve.
        status: the worst solver status: "converged", "indefinite", "minimum_norm", ...; "doubtful"
            where all systems were solved and ``warnings`` say why the numbers may still be wrong.
        stationary: share of the removed points whose δ* was stationary.
        active: share of the removed points whose constraint was active.
        seconds: wall time of each stage: "maximise_and_solve", "write".
        bound: an upper bound of the distance to a Retrain at its optimum, or None.
        certificate: "no certificate", or what ``bound`` rests on.
        warnings: what was found wrong when the memory was built, and in this call.
    """

    method: str
    indices: tuple[int, ...]
    requests: int
    update_norm: float
    residual: float
    iterations: int
    status: str
    stationary: float
    active: float
    seconds: dict[str, float]
    bound: float | None = None
    certificate: str = "no certificate"
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data = asdict(self)
        data["indices"], data["warnings"] = list(self.indices), list(self.warnings)
        return data
