"""`unlearn`: the verb, for any trainer."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_muter.arguments import number, whole
from lightning_muter.errors import ConfigurationError, StateError
from lightning_muter.lightning.borrowed import RandomState, borrowed, random_state_unless_done
from lightning_muter.lightning.commit import Destination
from lightning_muter.lightning.data import RemovalDataModule
from lightning_muter.lightning.flavour import pl, rank_zero_info, refuse_other
from lightning_muter.lightning.half_precision import check_provable, rounding_of
from lightning_muter.lightning.keeper import MemoryKeeper, keeper_of
from lightning_muter.lightning.module import UnlearningModule
from lightning_muter.lightning.process_group import process_group
from lightning_muter.lightning.progress import Bar, bar_of
from lightning_muter.lightning.publication import Publisher
from lightning_muter.lightning.remaining import RemainingPoints, places_of
from lightning_muter.lightning.removals import (
    Asked,
    check_listed,
    check_removals,
    check_served,
    listed_indices,
    removal_batches,
)
from lightning_muter.lightning.retrain import serve_without_memory
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import measuring
from lightning_muter.unlearning.bound import Bound, strong_convexity_bound
from lightning_muter.unlearning.certificate import Certificate, Publication
from lightning_muter.unlearning.corrector import correct
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.objective import Evaluation
from lightning_muter.unlearning.result import UnlearningResult
from lightning_muter.unlearning.serving import Server, request_warnings, worst_status

__all__ = ["current_memory", "module_of", "unlearn"]


def unlearn(
    trainer: pl.Trainer,
    removals: pl.LightningDataModule | DataLoader[Any] | Sequence[int],
    model: pl.LightningModule | None = None,
    memory: UnlearningMemory | str | os.PathLike[str] | None = None,
    noise_std: float = 0.0,
    corrector_steps: int = 0,
    bound: bool = False,
    already: Literal["error", "skip"] = "error",
    note: str = "",
    certificate: Certificate | None = None,
    inner_gap: float | None = None,
) -> UnlearningResult:
    """`Trainer.unlearn` for any trainer; a trainer with a `MUterCallback` has it as a method.

    Everything is checked before anything moves, the whole call is served in hand, and what it
    found is committed at its end, in one write: a call that fails changes nothing.
    """
    extras = _Extras.of(noise_std, corrector_steps, bound, already, note)
    extras = extras.proving(certificate, inner_gap)
    keeper = keeper_of(trainer)
    module = module_of(trainer, model)
    destination = Destination.of(memory, keeper, process_group(trainer))
    with destination.writing():
        result = _serve(trainer, module, keeper, destination, removals, extras)
    rank_zero_info(str(result))
    return result


def _serve(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    keeper: MemoryKeeper | None,
    destination: Destination,
    removals: Any,
    extras: _Extras,
) -> UnlearningResult:
    start, group, bar = time.perf_counter(), destination.group, bar_of(trainer)
    random_state = RandomState.now(group.device)
    with random_state.kept(), group.together():
        state = current_memory(destination, keeper, module)
        view = state.settings.view(module)
        destination.check_model(state, view)
        asked = _check(state, removals, extras, bar)
        check_provable(view, extras.bound or extras.certificate is not None)
    if not METHODS[state.settings.method].has_memory:
        return serve_without_memory(trainer, keeper, asked, view, state, destination)
    with random_state_unless_done(), borrowed(view, group.device):
        here, publisher = state.to(group.device).shared(group), None
        if extras.certificate is not None:
            publisher = Publisher.prepare(extras.certificate, here, view, asked, group, bar)
        server = Server(here, view, group, extras.passed_over(state))
        with random_state.kept():
            if asked.by_index:
                server.serve_indices(asked.indices, asked.already)
            else:
                total = len(asked.indices) or None
                with removal_batches(asked.removals, trainer) as batches:
                    for batch in bar(batches, "points to forget", total, lambda one: len(one[0])):
                        server.serve(batch)
            with group.together():
                check_served(asked, server.served, server.already)
            if not server.outcomes:  # a request that was committed before: the model may lack it
                destination.adopt(state, view)
                spent = time.perf_counter() - start
                return UnlearningResult.unchanged(
                    state.settings.method, server.already, state.warnings, spent
                )
            found = _correct(server, asked, extras, bar)
        found = _publish(server, found, asked, extras, publisher, bar)
        update = torch.linalg.vector_norm(found.memory.omega - view.get())
        found = replace(
            found, warnings=(*found.warnings, *rounding_of(found.memory.omega, view, float(update)))
        )
        for message in found.warnings:
            warnings.warn(message, stacklevel=3)
    entry = _entry(server, found, extras)
    after = found.memory.annotated(entry).to(state.omega_star.device)
    committed = destination.commit(after, view)
    seconds = {
        "maximise_and_solve": sum(o.seconds for o in server.outcomes),
        "write": committed.seconds,
        "total": time.perf_counter() - start,
    }
    due = committed.memory.rebase_policy.due(committed.memory.ledger, datetime.now(timezone.utc))
    result = replace(_result(server, found, float(update), seconds), rebase_due=due)
    _log(trainer, result, len(committed.memory.ledger))
    return result


def _check(memory: UnlearningMemory, removals: Any, extras: _Extras, bar: Bar) -> Asked:
    """Refuse the whole call before its first request; what it asks for, as far as it is known."""
    extras.check(memory, removals)
    if named := listed_indices(removals):
        return check_listed(memory, named, extras.passed_over(memory))
    if not isinstance(removals, RemovalDataModule):
        return Asked(removals)
    asked = check_removals(memory, removals, extras.passed_over(memory))
    looked_for = extras.corrector_steps > 0 or extras.bound or memory.settings.method == "retrain"
    if asked.points is None or extras.certificate is not None or not looked_for:
        return asked  # a certificate finds the rows as it reads them
    places = places_of(memory.without(list(asked.indices)), asked.points, bar)
    return replace(asked, places=places)


# --- arguments ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Extras:
    """What the call does beyond its requests."""

    noise_std: float
    corrector_steps: int
    bound: bool
    skips: bool
    note: str
    certificate: Certificate | None = None
    inner_gap: float | None = None

    @classmethod
    def of(
        cls, noise_std: Any, corrector_steps: Any, bound: Any, already: Any, note: Any
    ) -> _Extras:
        steps = whole("corrector_steps", corrector_steps)
        if not isinstance(bound, bool):
            raise ConfigurationError(f"bound={bound!r} must be True or False")
        if already not in ("error", "skip"):
            raise ConfigurationError(f"already={already!r} must be 'error' or 'skip'")
        if not isinstance(note, str):
            raise ConfigurationError(f"note={note!r} must be a text for the ledger")
        return cls(number("noise_std", noise_std), steps, bound, already == "skip", note)

    def proving(self, certificate: Any, inner_gap: Any) -> _Extras:
        """The same with what is to be proved of the model."""
        if certificate is not None:
            if not isinstance(certificate, Certificate):
                raise ConfigurationError(
                    f"certificate={certificate!r} must be a Certificate(epsilon, delta, radius)"
                )
            if self.noise_std or self.corrector_steps:
                raise ConfigurationError(
                    f"certificate with noise_std={self.noise_std} and corrector_steps="
                    f"{self.corrector_steps}: it takes the passes that it needs and draws its own "
                    "noise; leave them out"
                )
        if inner_gap is not None:
            gap = number("inner_gap", inner_gap)
            if not self.bound:
                raise ConfigurationError(f"inner_gap={gap} is of the bound: give bound=True")
            return replace(self, certificate=certificate, inner_gap=gap)
        return replace(self, certificate=certificate)

    def passed_over(self, memory: UnlearningMemory) -> Tensor | None:
        """The points (n,) that are left out of the call, since an earlier one forgot them."""
        return memory.removed if self.skips else None

    @property
    def reads_the_rest(self) -> bool:
        return self.corrector_steps > 0 or self.bound or self.certificate is not None

    def check(self, memory: UnlearningMemory, removals: Any) -> None:
        """Refuse what the memory's method or the kind of request cannot give."""
        settings = memory.settings
        if self.reads_the_rest and not isinstance(removals, RemovalDataModule):
            raise ConfigurationError(
                "corrector_steps, bound and certificate need a RemovalDataModule"
            )
        if self.corrector_steps and settings.horizon is not None:
            raise ConfigurationError(
                f"corrector_steps={self.corrector_steps} with horizon={settings.horizon}: they "
                "lead to the optimum, where a Retrain that stops early does not go; give one of "
                "the two"
            )
        if self.certificate is not None and not METHODS[settings.method].has_memory:
            raise ConfigurationError(
                f"method={settings.method!r} keeps no curvature: no certificate can be given; use "
                "method='muter'"
            )
        asked = self.noise_std > 0 or self.corrector_steps > 0
        if asked and not METHODS[settings.method].has_memory:
            raise ConfigurationError(
                f"method={settings.method!r} takes no noise_std={self.noise_std} and no "
                f"corrector_steps={self.corrector_steps}: leave them out"
            )


def module_of(trainer: pl.Trainer, model: pl.LightningModule | None) -> pl.LightningModule:
    """The user's own module, without what a compiler or a predict loop wrapped around it."""
    refuse_other(model=model)
    module = model if model is not None else trainer.lightning_module
    if module is None:
        raise StateError("there is no model to unlearn in: fit first, or give model=...")
    module = getattr(module, "_orig_mod", module)  # a compiled module shares its parameters
    return module.model if isinstance(module, UnlearningModule) else module


def current_memory(
    destination: Destination, keeper: MemoryKeeper | None, module: pl.LightningModule
) -> UnlearningMemory:
    """The memory to serve from, of this very moment where a folder is kept."""
    found = destination.newest(keeper, module)
    if keeper is not None and destination.held is None:
        _check_keeper(keeper, found)
    return found


def _check_keeper(keeper: MemoryKeeper, memory: UnlearningMemory) -> None:
    """Refuse a callback that names another λ or horizon, which its settings cannot tell."""
    settings = memory.settings
    if keeper.weight_decay not in (None, settings.weight_decay):
        raise ConfigurationError(
            f"the callback has weight_decay={keeper.weight_decay}, the memory was built with "
            f"{settings.weight_decay}: give the same, or None for the memory's"
        )
    if (keeper.horizon is None) != (settings.horizon is None):
        raise ConfigurationError(
            f"the callback has horizon={keeper.horizon!r}, the memory was built with "
            f"{settings.horizon}: give the same, or 'training' for the memory's"
        )


# --- after the requests -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The memory to commit, and what the passes over the remaining points say."""

    memory: UnlearningMemory
    evaluation: Evaluation | None  # at the memory's ω^u
    warnings: tuple[str, ...]
    bound: Bound = Bound(None, "no certificate")
    publication: Publication | None = None


def _correct(server: Server, asked: Asked, extras: _Extras, bar: Bar) -> _Found:
    """The memory after the requests and the corrector steps, the module where it was."""
    memory, view = server.memory, server.view
    said = [*memory.warnings, *request_warnings(server.outcomes)]
    if not extras.corrector_steps or asked.points is None or asked.places is None:
        return _Found(memory, None, tuple(said))
    rest = RemainingPoints(memory, asked.points, asked.places, server.group, bar)
    objective = rest.objective(view)
    with measuring(view.module), view.at(memory.omega):
        correction = correct(memory, objective, extras.corrector_steps)
    if not correction.helped:
        said.append(
            "no corrector step lowered the gradient of the remaining points, "
            f"{correction.before.residual:.3g}: ω^u is where the request left it"
        )
    return _Found(correction.memory, correction.after, tuple(said))


def _publish(
    server: Server,
    found: _Found,
    asked: Asked,
    extras: _Extras,
    publisher: Publisher | None,
    bar: Bar,
) -> _Found:
    """The noise, from the global generator as a seed promises, and the bound of what goes out."""
    memory, evaluation, group = found.memory, found.evaluation, server.group
    if publisher is not None:
        memory, publication = publisher.publish(memory)
        bound = Bound(publication.bound, str(publication))
        return replace(found, memory=memory, bound=bound, publication=publication)
    if extras.noise_std > 0:
        noise = group.broadcast(torch.randn(memory.p, dtype=torch.float64))
        memory = memory.at(memory.omega + extras.noise_std * noise.to(memory.omega))
        evaluation = None
    if not extras.bound or asked.points is None or asked.places is None:
        return replace(found, memory=memory)
    if evaluation is None:
        remaining = RemainingPoints(memory, asked.points, asked.places, group, bar)
        with RandomState.now(group.device).kept(), server.view.at(memory.omega):
            evaluation = remaining.objective(server.view).gradient()
    bound = strong_convexity_bound(memory, evaluation, extras.inner_gap)
    return replace(found, memory=memory, bound=bound)


def _entry(server: Server, found: _Found, extras: _Extras) -> dict[str, Any]:
    """What the ledger says of a call's requests beside their own numbers."""
    outcomes = server.outcomes
    sums = sum((o.sums for o in outcomes[1:]), outcomes[0].sums)
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


def _published(found: _Found, requests: int) -> dict[str, Any]:
    """What the ledger says of a certified publication, the same on each of its requests."""
    if found.publication is None:
        return {}
    return {"publication": found.publication.entry(len(found.memory.ledger) - requests + 1)}


def _result(
    server: Server, found: _Found, update: float, seconds: dict[str, float]
) -> UnlearningResult:
    outcomes = server.outcomes
    sums = sum((o.sums for o in outcomes[1:]), outcomes[0].sums)
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


def _log(trainer: pl.Trainer, result: UnlearningResult, step: int) -> None:
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
