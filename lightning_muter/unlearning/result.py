"""What a request answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_muter.display import card, counted
from lightning_muter.linalg.solution import Status
from lightning_muter.unlearning.certificate import Publication

__all__ = ["Opening", "RebaseResult", "UnlearningResult"]


@dataclass(frozen=True)
class Opening:
    """What proves of a ledger's commitment which points it is of; the folder does not keep it.

    ``commitment`` is blake2b(salt + the request's sorted indices as JSON), 32 bytes, as hex.
    """

    request: int
    indices: tuple[int, ...]
    salt: str
    commitment: str


@dataclass(frozen=True, repr=False)
class RebaseResult:
    """The numbers of one call of ``trainer.rebase``.

    Attributes:
        points: how many points the memory has now.
        gradient_before: ‖∇F‖ of the remaining points at ω^u.
        gradient: the same at the new expansion point.
        gradient_of_training: what training had left, of all points.
        newton_steps: how many were taken.
        seconds: wall time of the call.
        openings: for each request since the memory was built or last rebased, what proves which
            points its commitment is of; file them where they belong, or lose them: the folder does
            not keep them.
        warnings: what is in doubt of the new memory, one sentence each.
    """

    points: int
    gradient_before: float
    gradient: float
    gradient_of_training: float
    newton_steps: int
    seconds: float
    openings: tuple[Opening, ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a person."""
        said = [
            f"rebased to {counted(self.points, 'point')}",
            f"the gradient of their objective went from {self.gradient_before:.3g} to "
            f"{self.gradient:.3g} (training had left {self.gradient_of_training:.3g})",
            f"{self.seconds:.2g} s",
        ]
        if self.openings:
            said.append(f"{counted(len(self.openings), 'opening')} to file or to lose")
        if self.warnings:
            said.append(counted(len(self.warnings), "warning"))
        return "; ".join(said)

    def __repr__(self) -> str:
        return f"<RebaseResult: {self}>"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; without the openings, which are secrets."""
        data = asdict(self)
        data.pop("openings")
        return data | {"warnings": list(self.warnings)}


@dataclass(frozen=True, repr=False)
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
        active: share of the removed points whose constraint was active; of an L∞ ball the mean
            share of their coordinates.
        seconds: wall time: "maximise_and_solve" of the requests, "write" of the commit, and "total"
            of the call.
        bound: an upper bound of the distance ‖ω^u - ω‖ to a Retrain at its optimum, or None.
        certificate: "no certificate", or what ``bound`` rests on.
        warnings: what is in doubt, one sentence each with its remedy: of the memory, then of the
            requests. With any, ``status`` is "doubtful" or worse.
        already: the points that were asked for and passed over, since an earlier call forgot them.
        residual_asked: the residual at which the iterative solve of rows was to stop, None of other
            solvers.
        sketch_noise: the share of the update by which the probes of a sketch may have it wrong, of
            the worst request; None where nothing is sketched.
        rebase_due: why ``trainer.rebase`` is due by the callback's rebase_every and rebase_after.
        publication: what was certified of the published model, with ``certificate=``; its (ε, δ),
            those of all publications so far, and the noise.
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
    already: tuple[int, ...] = ()
    rebase_due: str = ""
    residual_asked: float | None = None
    sketch_noise: float | None = None
    publication: Publication | None = None

    @classmethod
    def unchanged(
        cls, method: str, already: Sequence[int], warnings: tuple[str, ...], seconds: float
    ) -> UnlearningResult:
        """The answer to a call whose points had all been forgotten before."""
        return cls(
            method=method,
            indices=(),
            requests=0,
            update_norm=0.0,
            residual=0.0,
            iterations=0,
            status=Status.DOUBTFUL if warnings else Status.CONVERGED,
            stationary=1.0,
            active=0.0,
            seconds={"maximise_and_solve": 0.0, "write": 0.0, "total": seconds},
            warnings=warnings,
            already=tuple(already),
        )

    def __str__(self) -> str:
        """One line for a person."""
        verb = "kept the model for" if self.method == "none" else "forgot"
        said = [
            f"{verb} {counted(len(self.indices), 'point')} ({self.method}): {self.status}",
            f"the weights moved by {self.update_norm:.3g}{self._noise()}",
            self._distance(),
            f"{self.seconds['total']:.2g} s",
        ]
        if self.already:
            said.append(f"passed over {list(self.already)}, forgotten already")
        if self.warnings:
            said.append(counted(len(self.warnings), "warning"))
        if self.rebase_due:
            said.append(self.rebase_due)
        return "; ".join(said)

    def _noise(self) -> str:
        """How much of the update is its probes' noise."""
        return "" if self.sketch_noise is None else f" ({self.sketch_noise:.1%} of it noise)"

    def _distance(self) -> str:
        """What is known of the distance to a Retrain."""
        if self.publication is not None or self.bound is None:
            return self.certificate
        return f"at most {self.bound:.3g} from a Retrain, on the conditions of .certificate"

    def __repr__(self) -> str:
        return f"<UnlearningResult: {self}>"

    def _repr_html_(self) -> str:
        numbers = self.to_dict()
        numbers["seconds"] = self.seconds["total"]
        shown = {name: value for name, value in numbers.items() if value not in (None, [], "")}
        shown.pop("warnings", None)
        return card(f"Forgotten: {counted(len(self.indices), 'point')}", shown, self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data = asdict(self)
        data |= {name: list(data[name]) for name in ("indices", "warnings", "already")}
        data["status"] = str(self.status)
        return data
