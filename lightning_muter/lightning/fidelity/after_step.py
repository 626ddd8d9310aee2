"""Something that is done after an optimizer's next step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["AfterStep"]


class AfterStep:
    """Calls a function once, after the step that an optimizer takes next.

    Its hook is taken away later and not from within itself: an optimizer goes through its hooks
    then, those of others among them.
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None

    def arm(self, optimizer: Optimizer, action: Callable[[], None]) -> None:
        """Wait for the next step, and for none that was waited for before."""
        self.disarm()
        due = [action]

        def stepped(*_: Any) -> None:
            while due:
                due.pop()()

        self._handle = optimizer.register_step_post_hook(stepped)

    def disarm(self) -> None:
        """Wait no longer, and leave the optimizer as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
