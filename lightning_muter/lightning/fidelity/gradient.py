"""Training's own gradients of chosen batches, beside those that a memory differentiates."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_muter.lightning.fidelity.backward import BackwardSum
from lightning_muter.lightning.fidelity.difference import Comparison
from lightning_muter.lightning.fidelity.outputs import head_outputs
from lightning_muter.lightning.kept_state import untouched
from lightning_muter.models import NOTHING, Beside, Logits, evaluating
from lightning_muter.models.base import Seen
from lightning_muter.objectives.base import Objective

__all__ = ["GradientWatch"]


@dataclass(frozen=True)
class _Batch:
    """What the objective sees of a step's points, and the random states before it."""

    seen: Seen
    targets: Tensor
    beside: Beside
    states: tuple[Tensor, ...]


class GradientWatch:
    """Compares the gradients of chosen batches with the package's own, at the same weights.

    The package's own is what Stage I differentiates: the mean over the batch of the objective at
    the module's outputs, in eval mode. Training's is `BackwardSum`'s, of this process alone.

    Args:
        logits: what makes logits of the module.
        parameters: the trained ones.
        objective: the objective a point.
        head: the linear layer that is trained, or None where parameters are named.
        context: the precision that training's forward runs in.
        slack: the relative difference that rounding may make.
        vanished: a gradient below this share of the longest one seen is rounding, as where a
            mean over points that pull in all directions ends.
    """

    def __init__(
        self,
        logits: Logits,
        parameters: list[nn.Parameter],
        objective: Objective,
        head: nn.Module | None,
        context: Callable[[], AbstractContextManager[None]],
        slack: float,
        vanished: float,
    ) -> None:
        self._logits, self._parameters, self._head = logits, parameters, head
        self._objective = objective
        self._context, self._slack, self._vanished = context, slack, vanished
        self._batch: _Batch | None = None
        self._longest = 0.0
        self.sum = BackwardSum(parameters)

    @property
    def armed(self) -> bool:
        """Whether a batch waits for its gradient."""
        return self._batch is not None

    def arm(self, seen: Seen, targets: Tensor, beside: Beside = NOTHING) -> None:
        """Compare the gradient of the step that follows, on these points as they are now."""
        states, device = [torch.get_rng_state()], seen[-1].device
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        kept = tuple(x.detach().clone() for x in seen)
        self._batch = _Batch(kept, targets.detach().clone(), beside.copied(), tuple(states))

    def drop(self) -> None:
        """Compare nothing until the next batch that is chosen."""
        self._batch = None

    def compare(self, scale: float) -> Comparison | None:
        """``scale`` times the gradient that was heard, beside the package's own.

        None where no finite gradient was heard.

        Raises:
            ConfigurationError: the outputs are not the head's own.
        """
        batch = self._batch
        self.drop()
        if batch is None or not self.sum.heard:
            return None
        found = scale * self.sum.batch
        if not bool(torch.isfinite(found).all()):
            return None
        module, fast = self._logits, torch.backends.mha.get_fastpath_enabled()
        with self.sum.paused(), untouched(module), evaluating(module), self._context():
            torch.backends.mha.set_fastpath_enabled(fast)  # training's own, of a frozen encoder
            own = self._own(batch)
        self._longest = max(
            self._longest,
            float(torch.linalg.vector_norm(own)),
            float(torch.linalg.vector_norm(found)),
        )
        comparison = Comparison(
            found,
            own,
            tuple(p.detach().reshape(-1).double() for p in self._parameters),
            len(batch.targets),
            self._slack,
            self._vanished * self._longest,
            asked=self._objective.asked,
        )
        if comparison.agrees():
            return comparison
        return self._beside_train_mode(comparison, batch)

    def _own(self, batch: _Batch) -> Tensor:
        logits = self._logits.form.of(self._logits.module, batch.beside)
        outputs = [head_outputs(logits, self._head, x, self._slack) for x in batch.seen]
        total = self._objective.outer(outputs, batch.targets).mean()
        found = torch.autograd.grad(total, self._parameters, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(found, self._parameters, strict=True)
        ]
        return _flat(parts)

    def _beside_train_mode(self, comparison: Comparison, batch: _Batch) -> Comparison:
        """Whether dropout or batch statistics explain what differs."""
        devices = [batch.seen[-1].device] if len(batch.states) > 1 else []
        buffers = [(b, b.clone()) for b in self._logits.buffers()]
        with self.sum.paused(), torch.random.fork_rng(devices), self._context():
            torch.set_rng_state(batch.states[0])
            if devices:
                torch.cuda.set_rng_state(batch.states[1], devices[0])
            own = self._own(batch)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        random = replace(comparison, own=own).agrees()
        return replace(comparison, random=random)


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1).double() for part in parts])
