"""What a request answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_muter.linalg.solution import Status

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
        status: the worst `Status` of the requests: "converged", "minimum_norm", "doubtful", ...
        stationary: share of the removed points whose δ* was stationary.
        active: share of the removed points whose constraint was active.
        seconds: wall time of each stage: "maximise_and_solve", "write".
        bound: an upper bound of the distance to a Retrain at its optimum, or None.
        certificate: "no certificate", or what ``bound`` rests on.
        warnings: what is in doubt, one sentence each with its remedy: of the memory, then of the
            requests. With any, ``status`` is "doubtful" or worse.
    """

    method: str
    indices: tuple[int, ...]
    requests: int
    update_norm: float
    residual: float
    iterations: int
    status: Status
    stationary: float
    active: float
    seconds: dict[str, float]
    bound: float | None = None
    certificate: str = "no certificate"
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data = asdict(self)
        data |= {"indices": list(self.indices), "warnings": list(self.warnings)}
        data["status"] = str(self.status)
        return data
