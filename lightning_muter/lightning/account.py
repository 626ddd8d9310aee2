"""What a call of `unlearn` tells once its requests are served: the ledger, its caller, loggers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_muter.lightning.extras import Extras
from lightning_muter.lightning.flavour import pl
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.unlearning.bound import Bound
from lightning_muter.unlearning.certificate import Publication
from lightning_muter.unlearning.objective import Evaluation
from lightning_muter.unlearning.points import Sums
from lightning_muter.unlearning.request import Outcome
from lightning_muter.unlearning.result import UnlearningResult
from lightning_muter.unlearning.serving import Server, worst_status

__all__ = ["Found", "ledger_entry", "log_result", "result_of"]


@dataclass(frozen=True)
class Found:
    """The memory to commit, and what the passes over the remaining points say."""

    memory: UnlearningMemory
    evaluation: Evaluation | None  # at the memory's ω^u
    warnings: tuple[str, ...]
    bound: Bound = Bound(None, "no certificate")
    publication: Publication | None = None


def ledger_entry(server: Server, found: Found, extras: Extras) -> dict[str, Any]:
    """What the ledger says of a call's requests beside their own numbers."""
    outcomes, sums = server.outcomes, _sums(server.outcomes)
    return {
        "stationary": sums.share(sums.stationary),
        "active": sums.share(sums.active),
        "noise_std": extras.noise_std,
        "corrector_steps": extras.corrector_steps,
        "bound": found.bound.value,
        "certificate": found.bound.certificate,
        "warnings": list(found.warnings),
        "note": extras.note,
        **_published(found, len(outcomes)),
    }


def _published(found: Found, requests: int) -> dict[str, Any]:
    """What the ledger says of a certified publication, the same on each of its requests."""
    if found.publication is None:
        return {}
    return {"publication": found.publication.entry(len(found.memory.ledger) - requests + 1)}


def result_of(
    server: Server, found: Found, update: float, seconds: dict[str, float]
) -> UnlearningResult:
    """What the caller gets.

    Args:
        server: that served the requests, at least one.
        found: what they and the passes after them came to.
        update: ‖ω^u - ω‖ of the whole call.
        seconds: of its parts.
    """
    outcomes, sums = server.outcomes, _sums(server.outcomes)
    noises = [o.sketch_noise for o in outcomes if o.sketch_noise is not None]
    return UnlearningResult(
        method=found.memory.settings.method,
        indices=tuple(server.served),
        requests=len(outcomes),
        update_norm=update,
        residual=max(o.solution.residual for o in outcomes),
        iterations=sum(o.solution.iterations for o in outcomes),
        status=worst_status(outcomes, found.warnings),
        stationary=sums.share(sums.stationary),
        active=sums.share(sums.active),
        seconds=seconds,
        bound=found.bound.value,
        certificate=found.bound.certificate,
        warnings=found.warnings,
        already=tuple(server.already),
        residual_asked=outcomes[0].solution.tol,
        sketch_noise=max(noises, default=None),
        publication=found.publication,
    )


def _sums(outcomes: Sequence[Outcome]) -> Sums:
    """Over the points of all requests."""
    return sum((one.sums for one in outcomes[1:]), outcomes[0].sums)


def log_result(trainer: pl.Trainer, result: UnlearningResult, step: int) -> None:
    """Tell the loggers; the request is done by then, so that their failure is none of its own."""
    metrics = {
        "unlearn/points": float(len(result.indices)),
        "unlearn/update_norm": result.update_norm,
        "unlearn/residual": result.residual,
        "unlearn/stationary": result.stationary,
        "unlearn/active": result.active,
        "unlearn/seconds": result.seconds["total"],
    }
    if result.bound is not None:
        metrics["unlearn/bound"] = result.bound
    for logger in trainer.loggers:
        try:
            logger.log_metrics(metrics, step=step)
            logger.save()
        except Exception as error:  # any logger's own
            warnings.warn(
                f"the request was served and is committed, but {type(logger).__name__} could not "
                f"log it: {error}",
                stacklevel=3,
            )
