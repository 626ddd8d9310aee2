"""`Server`: removal batches to requests, one after the other, on a memory in hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError, RemovalError
from lightning_muter.linalg.solution import Status
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.points import (
    check_batch,
    check_free,
    check_named,
    digests_of,
    passed_over,
    training_indices,
)
from lightning_muter.models import BatchForm, Beside, ModelView
from lightning_muter.models.beside import Name
from lightning_muter.parallel import Group
from lightning_muter.unlearning.request import Outcome, forget, forget_rows

__all__ = ["RemovalBatch", "Server", "request_warnings", "worst_status"]


class RemovalBatch(NamedTuple):
    """Points to forget: inputs (m, ...), targets (m, ...), and indices where they are known.

    ``beside`` are the entries, by position or by name, that forward takes of them beside x;
    ``digests`` those of these very tensors, where they were computed already.
    """

    x: Any
    target: Any
    index: Any
    beside: Mapping[Name, Any] = {}
    digests: Sequence[bytes] = ()


class Server:
    """Serves removal batches (input, target[, index]); a batch is a request.

    Only ``memory``, ``outcomes`` and ``already`` of this object move: the module, the memory that
    it started from and the disk are as they were, until the caller commits ``memory``.

    Args:
        memory: the memory to start from, on the module's device.
        view: of the module in the user's hands.
        group: the processes that serve the same batches.
        over: points (n,) that are passed over in every batch; none by default.
    """

    def __init__(
        self,
        memory: UnlearningMemory,
        view: ModelView,
        group: Group | None = None,
        over: Tensor | None = None,
    ) -> None:
        self.memory = memory
        self.view = view
        self.group = group or Group()
        self.outcomes: list[Outcome] = []
        self.already: list[int] = []
        self._passed_over = over

    @property
    def served(self) -> list[int]:
        """The training indices so far, in the order of the requests."""
        entries = self.memory.ledger[len(self.memory.ledger) - len(self.outcomes) :]
        return [index for entry in entries for index in entry["indices"]]

    def serve(self, batch: Any) -> None:
        """Stages II and III for the points of one batch, if any of them is not passed over.

        Raises:
            RemovalError: points that cannot be forgotten.
        """
        with torch.inference_mode(False):
            with self.group.together():
                x, targets, beside, indices = self._checked(batch)
            if not self.group.agrees(indices):
                raise RemovalError(
                    "the processes were given different points: each must see the same removal "
                    "batches, in the same order; use a RemovalDataModule, or a loader without a "
                    "sampler that shuffles or splits"
                )
            if not indices:
                return
            parameter = self.view.parameters[0]
            outcome = forget(
                self.memory,
                self.view,
                indices,
                x.to(parameter.device, self.view.dtype, copy=True),
                targets.to(parameter.device, copy=True),
                group=self.group,
                beside=beside.to(parameter.device, self.view.dtype).copied(),
            )
        self.memory = outcome.memory
        self.outcomes.append(outcome)

    def serve_indices(self, indices: Sequence[int], already: Sequence[int] = ()) -> None:
        """One request for training points by the memory's rows alone; none where there is none.

        Args:
            indices: checked by the caller.
            already: those that are passed over.

        Raises:
            StateError: the memory has no row of one.
        """
        self.already += already
        if not self.group.agrees(list(indices)):
            raise RemovalError(
                "the processes were given different indices: each must name the same points, in "
                "the same order"
            )
        if indices:
            outcome = forget_rows(self.memory, list(indices))
            self.memory = outcome.memory
            self.outcomes.append(outcome)

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor, Beside, list[int]]:
        x, targets, beside, named_by = _parts(batch, self.memory.settings.batch)
        positions = None if named_by is None else training_indices(named_by)
        check_batch(x, targets, positions)
        if positions is not None:
            check_named(positions)
        digests = batch.digests if isinstance(batch, RemovalBatch) else ()
        digests = digests or digests_of(self.memory.key, x, targets, beside)
        named = self.memory.known.named(digests, positions or ())
        rows = self._left(named)
        indices = [named[k] for k in rows]
        check_free(indices, self.memory.removed, self.memory.weights)
        if len(rows) == len(x):
            return x, targets, beside, indices
        return x[rows], targets[rows], beside.part(rows), indices

    def _left(self, named: list[int]) -> list[int]:
        """The rows of a batch that are not passed over."""
        over = passed_over(named, self._passed_over)
        self.already += [index for index, out in zip(named, over, strict=True) if out]
        return [k for k, out in enumerate(over) if not out]


def _parts(batch: Any, form: BatchForm) -> tuple[Tensor, Tensor, Beside, Any]:
    """Inputs, targets, what is beside them, and what names the points: a plain triple's third."""
    if isinstance(batch, RemovalBatch):
        x, targets, _ = BatchForm((0, 1)).read(batch)
        return *_points(x, targets), Beside.of(batch.beside, len(x)), batch.index
    try:
        x, targets, beside = form.read(batch)
    except ConfigurationError as error:
        raise RemovalError(
            f"a removal batch cannot be read: {error}; give a RemovalDataModule(data, "
            "indices=[...]), or a loader of the points themselves, as training received them"
        ) from error
    has_names = form.is_pair(batch) and len(batch) > 2 and not _is_text(batch[2])
    return *_points(x, targets), beside, batch[2] if has_names else None


def _is_text(value: Any) -> bool:
    """Whether an entry of a batch is its points' file names and the like."""
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)


def _points(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim == 0 or targets.ndim == 0 or len(x) == 0:
        raise RemovalError(
            f"a removal batch has inputs of shape {tuple(x.shape)} and targets of shape "
            f"{tuple(targets.shape)}; expected are one or more points, (m, ...) and (m, ...)"
        )
    return x, targets


def request_warnings(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """What the requests of a call say against their own numbers, each sentence once."""
    return tuple(dict.fromkeys(sentence for o in outcomes for sentence in o.warnings))


def worst_status(outcomes: Sequence[Outcome], warnings: Sequence[str]) -> Status:
    """The worst status of the requests; nothing good where warnings speak against it."""
    doubt = [Status.DOUBTFUL] if warnings else []
    return Status.worst([*(o.solution.status for o in outcomes), *doubt])
