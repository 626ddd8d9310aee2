"""`unlearn`: the verb, for any trainer."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from lightning_muter.errors import ConfigurationError, StateError
from lightning_muter.lightning.account import Found, ledger_entry, log_result, result_of
from lightning_muter.lightning.borrowed import RandomState, borrowed, random_state_unless_done
from lightning_muter.lightning.commit import Destination
from lightning_muter.lightning.data import RemovalDataModule
from lightning_muter.lightning.extras import Extras
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
from lightning_muter.unlearning.certificate import Certificate
from lightning_muter.unlearning.corrector import correct
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.result import UnlearningResult
from lightning_muter.unlearning.serving import Server, request_warnings

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
    extras = Extras.of(noise_std, corrector_steps, bound, already, note)
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
    extras: Extras,
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
    entry = ledger_entry(server, found, extras)
    after = found.memory.annotated(entry).to(state.omega_star.device)
    committed = destination.commit(after, view)
    seconds = {
        "maximise_and_solve": sum(o.seconds for o in server.outcomes),
        "write": committed.seconds,
        "total": time.perf_counter() - start,
    }
    due = committed.memory.rebase_policy.due(committed.memory.ledger, datetime.now(timezone.utc))
    result = replace(result_of(server, found, float(update), seconds), rebase_due=due)
    log_result(trainer, result, len(committed.memory.ledger))
    return result


def _check(memory: UnlearningMemory, removals: Any, extras: Extras, bar: Bar) -> Asked:
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


# --- the model and its memory -------------------------------------------------------------------


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


def _correct(server: Server, asked: Asked, extras: Extras, bar: Bar) -> Found:
    """The memory after the requests and the corrector steps, the module where it was."""
    memory, view = server.memory, server.view
    said = [*memory.warnings, *request_warnings(server.outcomes)]
    if not extras.corrector_steps or asked.points is None or asked.places is None:
        return Found(memory, None, tuple(said))
    rest = RemainingPoints(memory, asked.points, asked.places, server.group, bar)
    objective = rest.objective(view)
    with measuring(view.module), view.at(memory.omega):
        correction = correct(memory, objective, extras.corrector_steps)
    if not correction.helped:
        said.append(
            "no corrector step lowered the gradient of the remaining points, "
            f"{correction.before.residual:.3g}: ω^u is where the request left it"
        )
    return Found(correction.memory, correction.after, tuple(said))


def _publish(
    server: Server,
    found: Found,
    asked: Asked,
    extras: Extras,
    publisher: Publisher | None,
    bar: Bar,
) -> Found:
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
