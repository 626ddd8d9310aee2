"""Whether trained weights are put elsewhere between an optimizer's steps, as by a projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.fidelity.after_step import AfterStep

__all__ = ["ProjectedWeights"]

#: of a step's length: what is moved less than that between steps is left where it is
_SMALL = 1e-3
#: steps in a row that are followed by a move, before it is one of every step
_FEWEST = 2


class ProjectedWeights:
    """Compares the trained weights after a step with those of the next backward pass.

    Weights that are put back into a set after each step are trained for the optimum in that set,
    while Newton's method on the objective leaves it. A move now and then, as of a restart, is no
    such set.

    Args:
        parameters: the trained ones.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters, self._after = parameters, AfterStep()
        self._stepped: tuple[Tensor, float] | None = None
        self._moves: list[tuple[float, float]] = []
        self._seen = 0

    def before_step(self, optimizer: Optimizer, due: bool) -> None:
        """The gradients of a batch are there, and ``optimizer`` has not stepped with them.

        Args:
            optimizer: of the trained parameters.
            due: whether to look at what becomes of this step.
        """
        self._compare()
        self._after.disarm()
        if not due:
            return
        before = self._now()

        def stepped() -> None:
            now = self._now()
            self._stepped = now, float(torch.linalg.vector_norm(now - before))

        self._after.arm(optimizer, stepped)

    def _compare(self) -> None:
        """Where the weights are now, with where the step before left them, if it was looked at."""
        if self._stepped is None:
            return
        (stepped, length), self._stepped = self._stepped, None
        off = float(torch.linalg.vector_norm(self._now() - stepped))
        rounding = 8 * torch.finfo(stepped.dtype).eps * float(torch.linalg.vector_norm(stepped))
        self._seen += 1
        if off > max(_SMALL * length, rounding):
            self._moves.append((off, length))

    def check(self) -> None:
        """An epoch is over.

        Raises:
            ConfigurationError: every step that was looked at was followed by a move.
        """
        seen, moves = self._seen, self._moves
        if seen < _FEWEST:
            return
        self._seen, self._moves = 0, []
        if len(moves) == seen:
            off, length = moves[-1]
            raise ConfigurationError(
                f"training moves the trained weights by {off:.3g} between a step (of {length:.3g}) "
                "and the next one, each time, as a projection onto a set or clipped weights do: "
                "newton_steps lead to an optimum outside of that set; leave them out, where the "
                "distance that training left to the optimum is measured and said, or train "
                "without it"
            )

    def close(self) -> None:
        """Leave the optimizer as it was."""
        self._after.disarm()

    def _now(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1).clone() for p in self._parameters])
