"""A new expansion point, and everything gone that the old one knew of the forgotten points."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import ModelView
from lightning_muter.parallel import Group
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.objective import Evaluation, RobustObjective, newton
from lightning_muter.unlearning.points import Batch
from lightning_muter.unlearning.result import Opening
from lightning_muter.unlearning.stage_one import build_memories

__all__ = ["Rebased", "Remaining", "committed", "rebase"]


@dataclass(frozen=True)
class Remaining:
    """The remaining points as a new memory numbers them.

    Attributes:
        batches: all of them, this process's share, read anew at each call.
        digests: of their content (n, 16), under ``key``.
        weights: how much each counts (n,).
        key: of the digests.
        ids: digests (n, 16) of the user's own keys, where the memory keeps them.
        blocks: digests (k, 16) of 512 points each, under ``key``.
    """

    batches: Callable[[], Iterable[Batch]]
    digests: Tensor
    weights: Tensor
    key: bytes
    ids: Tensor | None = None
    blocks: Tensor | None = None


@dataclass(frozen=True)
class Rebased:
    """The new memory, and the gradient of the remaining points before and after.

    ``level`` is the ‖∇F‖ that training left, ``steps`` how many Newton steps were taken.
    """

    memory: UnlearningMemory
    before: Evaluation
    residual: float
    level: float
    steps: int
    openings: tuple[Opening, ...]


def rebase(
    memory: UnlearningMemory, view: ModelView, remaining: Remaining, group: Group, steps: int
) -> Rebased:
    """The memory of the remaining points at ω^u or their optimum. Source: ours (docs/theory.md).

    A memory at an optimum takes Newton steps until ‖∇F‖ of the remaining points is at the level
    that training left; one with a horizon keeps ω^u and its horizon. A model that was published
    with noise stays the current one, and the new expansion point is private. The module ends at
    the new expansion point: the caller puts it back where the call fails.

    Args:
        memory: with what was forgotten so far.
        view: of the module.
        remaining: the points that are left.
        group: the processes.
        steps: Newton steps at the most.
    """
    robust = memory.settings.robust()
    objective = RobustObjective(view, robust.problem(), remaining.batches, group, robust.empty_sum)
    view.set(memory.omega if memory.private is None else memory.private)
    before, level = objective.gradient(), _level(memory)
    taken = _settle(memory, objective, before, level, steps)
    built = _built(memory, view, remaining, group)
    residual = float(built.summary["residual_gradient"])
    ledger, openings = committed(memory.ledger)
    entry = {
        "request": len(ledger) + 1,
        "kind": "rebase",
        "points": built.n,
        "gradient_before": before.residual,
        "gradient": residual,
        "gradient_of_training": level,
        "newton_steps": taken,
    }
    after = _in_place_of(memory, replace(built, ledger=(*ledger, entry)), remaining)
    return Rebased(after, before, residual, level, taken, openings)


def _level(memory: UnlearningMemory) -> float:
    """The ‖∇F‖ that training left; 0 where it was not the robust objective's."""
    if METHODS[memory.settings.method].points != "adversarial":
        return 0.0
    return float(memory.summary["residual_gradient"])


def _settle(
    memory: UnlearningMemory,
    objective: RobustObjective,
    before: Evaluation,
    level: float,
    steps: int,
) -> int:
    """Newton's steps to the level that training left, and how many they were.

    There is none where a horizon ends training early, or where a certificate proved that ω^u is
    within its radius of the optimum.
    """
    if memory.settings.horizon is not None or memory.private is not None:
        return 0
    if not before.residual > level:
        return 0
    tol = level / max(1.0, abs(before.value))
    return len(newton(objective, steps, memory.settings.damping, tol))


def _built(
    memory: UnlearningMemory, view: ModelView, remaining: Remaining, group: Group
) -> UnlearningMemory:
    """Stage I of the remaining points where the module is, the horizon as long as a Retrain's."""
    settings, initial, flow = memory.settings, None, None
    if memory.start is not None:
        left = float(remaining.weights.sum()) / float(memory.weights.sum())
        initial = memory.start.initial
        flow = replace(memory.start.flow, average=memory.start.flow.of_remaining(left))
        settings = replace(settings, horizon=flow.average.mean)
    (built,) = build_memories(
        view.module,
        [settings],
        remaining.batches(),
        remaining.digests,
        remaining.key,
        group,
        initial,
        remaining.weights,
        flow,
    )
    return built


def _in_place_of(
    memory: UnlearningMemory, built: UnlearningMemory, remaining: Remaining
) -> UnlearningMemory:
    """What was built, as the next generation of a memory."""
    gradient = built.residual_gradient
    if memory.start is None:  # nothing reads it, and Newton's last step leans to who is forgotten
        gradient = torch.zeros_like(gradient)
    after = replace(
        built,
        residual_gradient=gradient,
        ids=remaining.ids,
        blocks=remaining.blocks,
        ids_key=memory.ids_key,
        rebase_policy=memory.rebase_policy,
        warnings=tuple(dict.fromkeys((*memory.warnings, *built.warnings))),
        memory_id=memory.memory_id,
        generation=memory.generation,
    )
    # what was published stays the model
    return after if memory.private is None else after.published(memory.omega)


def committed(
    ledger: Sequence[dict[str, Any]],
) -> tuple[tuple[dict[str, Any], ...], tuple[Opening, ...]]:
    """A ledger with commitments in the place of indices, and what opens them.

    Example:
        >>> (entry,), (opening,) = committed([{"request": 1, "m": 2, "indices": [7, 3]}])
        >>> sorted(entry), opening.indices, entry["commitment"] == opening.commitment
        (['commitment', 'm', 'request'], (3, 7), True)
    """
    entries, openings = [], []
    for entry in ledger:
        known = {name: value for name, value in entry.items() if name != "indices"}
        if "indices" in entry:
            opening = _opening(entry["request"], entry["indices"])
            openings.append(opening)
            known["commitment"] = opening.commitment
        entries.append(known)
    return tuple(entries), tuple(openings)


def _opening(request: int, indices: Sequence[int]) -> Opening:
    salt, ordered = os.urandom(32), tuple(sorted(indices))
    data = salt + json.dumps(list(ordered)).encode()
    commitment = hashlib.blake2b(data, digest_size=32).hexdigest()
    return Opening(request, ordered, salt.hex(), commitment)
