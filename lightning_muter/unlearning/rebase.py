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
    settings = memory.settings
    robust = settings.robust()
    objective = RobustObjective(view, robust.problem(), remaining.batches, group, robust.empty_sum)
    view.set(memory.omega if memory.private is None else memory.private)
    before = objective.gradient()
    adversarial = METHODS[settings.method].points == "adversarial"
    level = float(memory.summary["residual_gradient"]) if adversarial else 0.0
    history: list[float] = []
    proved = memory.private is not None  # within its certificate's radius of the optimum
    if settings.horizon is None and before.residual > level and not proved:
        tol = level / max(1.0, abs(before.value))
        history = newton(objective, steps, settings.damping, tol)
    initial = None if memory.start is None else memory.start.initial
    flow = None
    if memory.start is not None:
        left = float(remaining.weights.sum()) / float(memory.weights.sum())
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
    residual = float(built.summary["residual_gradient"])
    ledger, openings = committed(memory.ledger)
    entry = {
        "request": len(ledger) + 1,
        "kind": "rebase",
        "points": built.n,
        "gradient_before": before.residual,
        "gradient": residual,
        "gradient_of_training": level,
        "newton_steps": len(history),
    }
    gradient = built.residual_gradient
    if initial is None:  # nothing reads it, and Newton's last step leans to who is forgotten
        gradient = torch.zeros_like(gradient)
    after = replace(
        built,
        ledger=(*ledger, entry),
        residual_gradient=gradient,
        ids=remaining.ids,
        blocks=remaining.blocks,
        ids_key=memory.ids_key,
        rebase_policy=memory.rebase_policy,
        warnings=tuple(dict.fromkeys((*memory.warnings, *built.warnings))),
        memory_id=memory.memory_id,
        generation=memory.generation,
    )
    if memory.private is not None:  # what was published stays the model
        after = after.published(memory.omega)
    return Rebased(after, before, residual, level, len(history), openings)


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
