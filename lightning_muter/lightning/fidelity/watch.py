"""The checks of one training run, as the callback's hooks feed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muter.errors import ConfigurationError, MuterError
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.fidelity.accumulation import Accumulation
from lightning_muter.lightning.fidelity.contents import contents_of
from lightning_muter.lightning.fidelity.difference import tolerances
from lightning_muter.lightning.fidelity.flow import StepWatch, holds, pace_of
from lightning_muter.lightning.fidelity.frozen import FrozenPart
from lightning_muter.lightning.fidelity.gradient import GradientWatch
from lightning_muter.lightning.fidelity.outputs import head_outputs
from lightning_muter.lightning.fidelity.points import PointCount, sampling_of
from lightning_muter.lightning.fidelity.projected import ProjectedWeights
from lightning_muter.lightning.fidelity.pushed import PushedWeights, moved_between
from lightning_muter.lightning.fidelity.stepped import StepGradients
from lightning_muter.lightning.flavour import pl, rank_zero_info
from lightning_muter.lightning.kept_state import untouched
from lightning_muter.linalg.lanczos import TimeAverage
from lightning_muter.memory.points import digests_of
from lightning_muter.memory.start import TrainingFlow
from lightning_muter.models import Beside, ModelView, evaluating
from lightning_muter.models.base import Seen
from lightning_muter.objectives.targets import check_targets

__all__ = ["TrainingWatch"]


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
        newton: whether Newton's steps follow training.
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
        newton: bool,
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
        self._width: int | None = None
        self.contents = contents_of(trainer, points, reduce, self._check_block)
        sampling = sampling_of(trainer.train_dataloader, len(points))  # type: ignore[arg-type]
        self._count = PointCount(self.contents.received, sampling, trainer.world_size, reduce)
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
        self._accumulation = Accumulation(trainer, module, view.loss.summed)
        self._epochs, self._open = 0, False
        self._pushed = PushedWeights(self._parameters, moved_between(trainer, module))
        self._taken = StepGradients(
            trainer,
            module,
            self._parameters,
            self._gradient.sum,
            reduce,
            self._slack,
            self._steps is not None,
        )
        self._projected = ProjectedWeights(self._parameters) if newton else None

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

    def _check_block(self, x: Tensor, targets: Tensor, beside: Beside) -> None:
        """Outputs and targets of some points, the inputs as the module receives them."""
        if self._width is None:
            self._width = self._outputs_a_point(x[:2], beside.part(slice(2)))
        with self._topic("targets"):
            check_targets(self._loss, targets, self._width)

    def _outputs_a_point(self, x: Tensor, beside: Beside) -> int:
        """How many there are, which have to be the head's own."""
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
        self._accumulation.begin(len(points[0]))
        self._open = True
        with self._topic("content"):
            self._count.see(digests_of(self.contents.key, *points))

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
            if self._projected is not None:
                self._projected.before_step(optimizer, self._due)
            with self._topic("gradient"):
                self._pushed.backward_passed(optimizer)
                self._compare()
            with self._topic("gradient"):
                share = self._accumulation.share()
            with self._topic("changed"):
                self._taken.before_step(optimizer)
            self._gradient.sum.stepped()
            self._accumulation.stepped()
        if self._steps is not None:
            with self._topic("steps"):
                self._steps.before_step(optimizer, share)

    def ended(self) -> None:
        """A training batch has ended."""
        if self._gradient.sum.heard:
            self._count.trained()
        with self._topic("changed"):
            self._taken.settle()
        if self._gradient.armed:
            with self._topic("gradient"):
                self._compare_unstepped()
        if self._steps is not None:
            with self._topic("steps"):
                self._steps.settle()

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
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        scale = self._accumulation.scale / (scaler.get_scale() if scaler else 1.0)
        comparison = self._gradient.compare(scale)
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
        if self._accumulation.divides(comparison):
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
        if self._projected is not None:
            with self._topic("projected"):
                self._projected.check()
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
            self.contents.check_unchanged(self._points)
        missed = int((self._count.weights() == 0).sum())
        if missed:
            rank_zero_info(
                f"{missed} of {len(self._points)} points of the training data set were never "
                "trained on: they are no part of the memory, and there is nothing to forget of them"
            )

    def close(self) -> None:
        """Leave module and optimizers as they were."""
        self._gradient.sum.close()
        self._pushed.close()
        self._taken.close()
        if self._projected is not None:
            self._projected.close()

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


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.detach().reshape(-1).double() for part in parts])
