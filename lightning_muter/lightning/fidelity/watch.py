"""The checks of one training run, as the callback's hooks feed them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muter.errors import ConfigurationError, MuterError
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.fidelity.difference import Comparison, tolerances
from lightning_muter.lightning.fidelity.flow import StepWatch, holds, pace_of
from lightning_muter.lightning.fidelity.frozen import FrozenPart
from lightning_muter.lightning.fidelity.gradient import GradientWatch
from lightning_muter.lightning.fidelity.outputs import head_outputs
from lightning_muter.lightning.fidelity.points import PointCount, sampling_of
from lightning_muter.lightning.fidelity.pushed import PushedWeights, moved_between
from lightning_muter.lightning.flavour import pl, rank_zero_info
from lightning_muter.lightning.kept_state import untouched
from lightning_muter.lightning.progress import bar_of, blocks
from lightning_muter.linalg.lanczos import TimeAverage
from lightning_muter.memory.blocks import BLOCK, block_digest, count
from lightning_muter.memory.points import digests_of
from lightning_muter.memory.start import TrainingFlow
from lightning_muter.models import Beside, ModelView, evaluating
from lightning_muter.models.base import Seen
from lightning_muter.objectives.targets import check_targets

__all__ = ["TrainingWatch"]

#: so many points are read again when training ends
_PROBES = 8


class TrainingWatch:
    """Compares what training does with what a memory assumes: points, loss, steps, frozen part.

    Args:
        trainer: a trainer whose training starts.
        module: its module.
        view: the trained parameters, and the loss a point.
        head: name of the linear layer that is trained, or None where parameters are named.
        points: the training data set.
        penalty: an L2 coefficient that the loss is declared to have of its own.
        flow: what a checkpoint says of the steps before, or None where no step needs to follow a
            gradient flow.
        averaging: the callback that puts averaged weights into the module when training ends.
        reduce: sums a tensor over processes.
        refuse: is given what is found.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        view: ModelView,
        head: str | None,
        points: TrainingPoints,
        penalty: float,
        flow: Mapping[str, Any] | None,
        averaging: pl.Callback | None,
        reduce: Callable[[Tensor], Tensor],
        refuse: Callable[[MuterError], None],
    ) -> None:
        self._trainer, self._module, self._points = trainer, module, points
        self._logits = view.logits
        self._loss, self._parameters, self._penalty = view.loss, view.parameters, penalty
        layer: nn.Module | None = None if head is None else module.get_submodule(head)
        self._head = layer
        self._reduce, self._refuse = reduce, refuse
        self._said: set[str] = set()
        self._slack, vanished = tolerances(str(trainer.precision))
        self._context = trainer.precision_plugin.train_step_context
        self.key: bytes = trainer.strategy.broadcast(os.urandom(16))
        self.digests, self.blocks, received = self._read()
        sampling = sampling_of(trainer.train_dataloader, len(points))  # type: ignore[arg-type]
        self._count = PointCount(received, sampling, trainer.world_size, reduce)
        self._frozen = FrozenPart(module, view.names)
        self._averaging = averaging
        self._steps = None
        if flow is not None:
            self._steps = StepWatch.of(trainer, self._parameters, averaging, flow)
        #: how long training went, Σ lr, once it ended
        self.flow: TrainingFlow | None = None
        self._gradient = GradientWatch(
            view.logits,
            self._parameters,
            view.objective,
            layer,
            self._context,
            self._slack,
            vanished,
        )
        self._due, self._compared = True, False
        self._window, self._points_of_batch, self._points_in_window = 0, 0, 0
        self._divisor: int | None = None
        self._epochs, self._open = 0, False
        self._pushed = PushedWeights(self._parameters, moved_between(trainer, module))

    @contextmanager
    def _topic(self, topic: str) -> Iterator[None]:
        """Report what is found, once a topic."""
        try:
            yield
        except ConfigurationError as error:
            if topic not in self._said:
                self._said.add(topic)
                self._refuse(error)

    # --- before training ----------------------------------------------------------------------

    def _read(self) -> tuple[Tensor, Tensor, list[bytes]]:
        """Digests of all points as the data set holds them (n, 16), of blocks of them (k, 16).

        Then those of the points as training gets them.
        """
        trainer, n = self._trainer, len(self._points)
        held, received, together = torch.zeros(n, 16), torch.zeros(n, 16), torch.zeros(count(n), 16)
        everyone = list(blocks(range(n), BLOCK))
        mine = everyone[trainer.global_rank :: trainer.world_size]
        looked_at = mine or everyone[:1]  # so that no process waits where another one refuses
        width, total = None, sum(map(len, looked_at))
        for block in bar_of(trainer)(looked_at, "reading the points", total, len):
            x, targets, beside = self._points.finite(block)
            some = slice(block.start, block.stop)
            x_given, y_given, rows = trainer.precision_plugin.convert_input(
                [x, targets, beside.rows]
            )
            as_given = replace(beside, rows=rows)
            width = width or self._width(x_given[:2], as_given.part(slice(2)))
            with self._topic("targets"):
                check_targets(self._loss, targets, width)
            held[some] = _rows(digests_of(self.key, x, targets, beside))
            together[block.start // BLOCK] = _rows([block_digest(self.key, x, targets, beside)])[0]
            received[some] = held[some]
            before = (x, targets, *beside.tensors().values())
            after = (x_given, y_given, *as_given.tensors().values())
            if any(_narrower(b, a) for a, b in zip(before, after, strict=True)):
                received[some] = _rows(digests_of(self.key, x_given, y_given, as_given))
        if not mine:
            held, received, together = (torch.zeros_like(t) for t in (held, received, together))
        device = trainer.strategy.root_device
        held, received, together = (
            self._reduce(t.to(device)).cpu().to(torch.uint8) for t in (held, received, together)
        )
        return held, together, [bytes(row) for row in received.tolist()]

    def _width(self, x: Tensor, beside: Beside) -> int:
        """Outputs a point, which are the head's own."""
        module, device = self._module, self._parameters[0].device
        logits = self._logits.form.of(module, beside.to(device))
        with untouched(module), evaluating(module), torch.no_grad(), self._context():
            x = x.to(device)
            with self._topic("outputs"):
                return head_outputs(logits, self._head, x, self._slack).numel() // len(x)
            return int(logits(x).numel()) // len(x)

    # --- a batch ------------------------------------------------------------------------------

    def received(self, batch: Any, batch_idx: int) -> None:
        """A training batch as the module receives it, before the perturbation."""
        with self._topic("pushed"):
            self._pushed.check()
        with self._topic("flags"):
            self._frozen.check_flags()
        position = batch_idx + 1
        self._due |= position & (position - 1) == 0 or self._trainer.is_last_batch
        points = self._points.form.read(batch)
        self._window += 1
        self._points_of_batch = len(points[0])
        self._points_in_window += len(points[0])
        self._open = True
        with self._topic("content"):
            self._count.see(digests_of(self.key, *points))

    def perturbed(self, seen: Seen, targets: Tensor, beside: Beside) -> None:
        """The batch as the attack left it: what training_step is about to see of its inputs."""
        self._gradient.drop()
        self._gradient.sum.begin_batch()
        if self._due:
            self._gradient.arm(seen, targets, beside)
            self._pushed.begin()

    def before_backward(self) -> None:
        """Automatic optimization's one backward pass begins."""
        if self._module.automatic_optimization:
            self._gradient.sum.restart_batch()

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step with the gradients that are there, before clipping."""
        share = 0.0
        if holds(optimizer, self._parameters):
            with self._topic("gradient"):
                self._pushed.backward_passed(optimizer)
                self._compare()
            with self._topic("gradient"):
                share = self._share()
            with self._topic("changed"):
                self._check_unchanged()
            self._gradient.sum.stepped()
            self._window, self._points_in_window = 0, 0
        if self._steps is not None:
            with self._topic("steps"):
                self._steps.before_step(optimizer, share)

    def _share(self) -> float:
        """The step's gradient as a multiple of its points' mean gradient."""
        each = self._points_in_window / max(self._window, 1) if self._loss.summed else 1.0
        if self._module.automatic_optimization:
            return each * self._window / self._trainer.accumulate_grad_batches
        batches, divisor = max(self._window, 1), self._divisor or 1
        ends_early = batches < divisor and not self._trainer.is_last_batch
        if divisor > 1 and (ends_early or batches > divisor):
            self._divisor = None
            raise ConfigurationError(
                f"training_step divides its loss by {divisor}, and a step was taken after "
                f"{batches} batches: divide by the number of batches that a step sums, or not at "
                "all"
            )
        return each * batches / divisor

    def ended(self) -> None:
        """A training batch has ended."""
        if self._gradient.sum.heard:
            self._count.trained()
        if self._gradient.armed:
            with self._topic("gradient"):
                self._compare_unstepped()
        if self._steps is not None:
            with self._topic("steps"):
                self._steps.settle()

    def _check_unchanged(self) -> None:
        """Refuse gradients that are not backward's own where that leads elsewhere.

        Clipping and noise lead to the same optimum by another path; a penalty to another optimum.

        Raises:
            ConfigurationError: something between backward and the step changed them.
        """
        heard = self._gradient.sum
        sums = [heard.since_step]
        if not self._module.automatic_optimization:
            sums.append(heard.batch)  # the module may have dropped what came before
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        shares = self._trainer.world_size * (scaler.get_scale() if scaler else 1.0)
        found = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters])
        omega = tuple(p.detach().reshape(-1).double() for p in self._parameters)
        pairs = [
            Comparison(found, self._reduce(s) / shares, omega, 1, self._slack, 0.0) for s in sums
        ]
        finite = all(bool(torch.isfinite(c.found + c.own).all()) for c in pairs)
        if not finite or any(c.agrees() for c in pairs):
            return
        if self._steps is not None:
            raise ConfigurationError(
                "horizon='training', but the gradients were changed between backward and the step "
                f"(ratio of lengths {pairs[0].ratio:.4g}, cosine {pairs[0].cosine:.4f}), as by "
                "clipping in a hook of the module: leave it out, or give newton_steps=..., or a "
                "number for horizon="
            )
        if pairs[0].penalty is not None:
            raise ConfigurationError(
                f"{pairs[0].penalty:.4g} times the weights is added to their gradients between "
                "backward and the step: leave it to the optimizer's weight_decay"
            )

    def _compare_unstepped(self) -> None:
        if self._pushed.moved():
            self._gradient.drop()
            raise ConfigurationError(
                "the trained parameters moved in training_step without a step that Lightning "
                "knows of: their gradient cannot be compared; step by self.optimizers() of the "
                "module, and let automatic_optimization=False modules call manual_backward"
            )
        self._compare()

    def _compare(self) -> None:
        """Training's gradient of the batch against the package's own.

        Raises:
            ConfigurationError: they differ.
        """
        automatic = self._module.automatic_optimization
        scale = float(self._trainer.accumulate_grad_batches) if automatic else 1.0
        scale /= self._points_of_batch if self._loss.summed else 1
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        comparison = self._gradient.compare(scale / (scaler.get_scale() if scaler else 1.0))
        if comparison is None:
            return
        self._due, self._compared = False, True
        if comparison.random:
            raise ConfigurationError(comparison.explain())
        if comparison.agrees():
            if self._penalty and not comparison.agrees(self._penalty):
                raise ConfigurationError(
                    f"the declared weight_decay is {self._penalty:.4g} more than the optimizer's, "
                    "and training_step's loss has no such L2 penalty: leave weight_decay= out, "
                    "give it to the optimizer, or use newton_steps=..., which end at its optimum"
                )
            return
        if self._penalty and comparison.agrees(self._penalty):
            return
        divisor = round(1 / comparison.ratio) if comparison.ratio > 0 else 0
        may_divide = not automatic and self._divisor in (None, divisor)
        if may_divide and divisor > 1 and comparison.agrees_times(1 / divisor):
            self._divisor = divisor  # the user's own accumulation: the step tells how many
            return
        raise ConfigurationError(comparison.explain())

    # --- an epoch, and the end ----------------------------------------------------------------

    def epoch_ended(self) -> None:
        """An epoch's steps are over; the frozen part is compared after the first, or each."""
        if self._steps is not None:
            with self._topic("steps"):
                self._steps.settle()
        if self._epochs == 0 or self._averaging is not None:
            with self._topic("frozen"):
                self._frozen.check_values()
        self._counted()

    def _counted(self) -> None:
        """The counts of an epoch are complete."""
        self._open = False
        with self._topic("counts"):
            self._count.end_epoch()
        if self._epochs == 0:
            with self._topic("gradient"):
                self._check_compared()
        self._epochs += 1

    def _check_compared(self) -> None:
        if not self._compared:
            raise ConfigurationError(
                "no backward pass of the first epoch reached the trained parameters with finite "
                "gradients: training_step must return a loss that depends on them"
            )

    def finish(self) -> None:
        """Training has ended, and Stage I is about to begin."""
        self._gradient.sum.close()
        if self._open:
            self._counted()
        if self._steps is not None:
            with self._topic("steps"):
                end, pace = TimeAverage.end(self._steps.time), pace_of(self._trainer, self._loss)
                self.flow = TrainingFlow(end, pace)  # where a refusal is a warning
                self.flow = TrainingFlow(self._steps.finish(), pace)
        if self._averaging is None:  # an average of equal values is rounded, so is the frozen part
            with self._topic("pushed"):
                self._pushed.check()
            with self._topic("frozen"):
                self._frozen.check_values()
        with self._topic("content"):
            self._check_data()
        missed = int((self._count.weights() == 0).sum())
        if missed:
            rank_zero_info(
                f"{missed} of {len(self._points)} points of the training data set were never "
                "trained on: they are no part of the memory, and there is nothing to forget of them"
            )

    def _check_data(self) -> None:
        n = len(self._points)
        probes = sorted({k * (n - 1) // max(_PROBES - 1, 1) for k in range(_PROBES)})
        found = _rows(digests_of(self.key, *self._points.batch(probes))).to(torch.uint8)
        changed = [i for i, a in zip(probes, found, strict=True) if not a.equal(self.digests[i])]
        if changed:
            raise ConfigurationError(
                f"training points {changed} are not what they were when training began: the data "
                "set changed, or transforms at random; give it fixed points"
            )

    def close(self) -> None:
        """Leave the module as it was."""
        self._gradient.sum.close()

    @property
    def point_weights(self) -> Tensor:
        """How much each point weighs in training's objective (n,)."""
        return self._count.weights()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know of the points."""
        return self._count.state_dict()

    def flow_state(self) -> dict[str, Any]:
        """What a resumed run needs to know of the steps."""
        pace = pace_of(self._trainer, self._loss)
        return {} if self._steps is None else {"pace": pace, **self._steps.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where a checkpoint was."""
        self._count.load_state_dict(state)


def _rows(digests: list[bytes]) -> Tensor:
    return torch.tensor([list(one) for one in digests], dtype=torch.float32)


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.detach().reshape(-1).double() for part in parts])


def _narrower(given: Tensor, held: Tensor) -> bool:
    """Whether the precision that training runs in loses digits of the data set's."""
    floating = given.is_floating_point() and held.is_floating_point()
    return floating and torch.finfo(given.dtype).bits < torch.finfo(held.dtype).bits
