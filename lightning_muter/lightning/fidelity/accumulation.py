"""The batches whose gradients one step sums, and what each batch's loss is divided by."""

from __future__ import annotations

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.fidelity.difference import Comparison
from lightning_muter.lightning.flavour import pl

__all__ = ["Accumulation"]


class Accumulation:
    """Counts the batches since the last step: Lightning divides each by their number, or a module.

    Args:
        trainer: that says how many batches make a step, and which one is an epoch's last.
        module: that may step by hand, and then divides its losses itself.
        summed: whether a batch's loss is a sum over its points.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, summed: bool) -> None:
        self._trainer, self._module, self._summed = trainer, module, summed
        self._batches, self._points, self._latest = 0, 0, 0
        self._divisor: int | None = None

    def begin(self, points: int) -> None:
        """A batch of so many points begins."""
        self._batches += 1
        self._points += points
        self._latest = points

    def stepped(self) -> None:
        """A step has used the gradients of all batches so far."""
        self._batches, self._points = 0, 0

    @property
    def scale(self) -> float:
        """What makes the gradient that the latest batch left that of its points' mean loss."""
        automatic = self._module.automatic_optimization
        scale = float(self._trainer.accumulate_grad_batches) if automatic else 1.0
        return scale / (self._latest if self._summed else 1)

    def divides(self, comparison: Comparison) -> bool:
        """Whether a module that steps by hand divides its loss, each time by the same number."""
        divisor = round(1 / comparison.ratio) if comparison.ratio > 0 else 0
        may = not self._module.automatic_optimization and self._divisor in (None, divisor)
        if may and divisor > 1 and comparison.agrees_times(1 / divisor):
            self._divisor = divisor  # the step tells whether it sums as many
            return True
        return False

    def share(self) -> float:
        """The step's gradient as a multiple of its points' mean gradient.

        Raises:
            ConfigurationError: the module divides by another number than the step sums.
        """
        each = self._points / max(self._batches, 1) if self._summed else 1.0
        if self._module.automatic_optimization:
            return each * self._batches / self._trainer.accumulate_grad_batches
        batches, divisor = max(self._batches, 1), self._divisor or 1
        ends_early = batches < divisor and not self._trainer.is_last_batch
        if divisor > 1 and (ends_early or batches > divisor):
            self._divisor = None
            raise ConfigurationError(
                f"training_step divides its loss by {divisor}, and a step was taken after "
                f"{batches} batches: divide by the number of batches that a step sums, or not at "
                "all"
            )
        return each * batches / divisor
