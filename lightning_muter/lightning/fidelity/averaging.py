"""Callbacks that change the weights when training ends, as averaging does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.flavour import pl
from lightning_muter.linalg.lanczos import TimeAverage
from lightning_muter.models import ModelView

__all__ = ["AverageWatch", "Updates", "averaging_of", "check_order", "check_unmoved"]

#: WeightAveraging and its subclasses came with Lightning 2.6
_AVERAGING: tuple[type[pl.Callback], ...] = tuple(
    getattr(pl.callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(pl.callbacks, name)
)

#: of an average that a memory keeps: with h their span, groups of them are off by (h a / 2048)² / 6
_TIMES = 1024


def check_order(callbacks: Sequence[pl.Callback], own: pl.Callback) -> None:
    """Refuse weight averaging that would change the model after its memory was built.

    Raises:
        ConfigurationError: with the callback to list before ``own``.
    """
    after = [c for c in callbacks[list(callbacks).index(own) :] if isinstance(c, _AVERAGING)]
    if after:
        name = type(after[0]).__name__
        raise ConfigurationError(
            f"{name} is listed after MUterCallback: it would put averaged weights into the model "
            f"after the memory of the last ones was built; list {name} before MUterCallback"
        )


def averaging_of(trainer: pl.Trainer, own: pl.Callback) -> pl.Callback | None:
    """The callback listed before ``own`` whose averaged weights training ends with."""
    callbacks: list[pl.Callback] = list(getattr(trainer, "callbacks", []))
    before = callbacks[: callbacks.index(own)]
    return next((one for one in reversed(before) if isinstance(one, _AVERAGING)), None)


@dataclass
class Updates:
    """The updates ω̄ ← ω̄ + c (ω - ω̄) of an average so far, repeated on the trained parameters.

    Attributes:
        count: how many there were.
        times: of the flow at each since the average began.
        newest: c of each.
        average: ω̄ (p,); None before the first.
    """

    count: int = 0
    times: list[float] = field(default_factory=list)
    newest: list[float] = field(default_factory=list)
    average: Tensor | None = None

    def add(self, count: int, share: float, time: float, omega: Tensor) -> None:
        """Take the update of this number, by c = ``share``, at ω (p,) and a time of the flow."""
        if self.average is None or share == 1.0:
            self.times, self.newest, self.average = [], [], omega.clone()
        else:
            self.average = self.average + share * (omega - self.average)
        self.count = count
        self.times.append(time)
        self.newest.append(share)

    def averaged(self, omega: Tensor, slack: float, name: str) -> TimeAverage:
        """The average that ends at ω (p,).

        Raises:
            ConfigurationError: ω is no such average.
        """
        if self.average is None:
            raise ConfigurationError(
                f"horizon='training', but {name} averaged nothing until training ended: let it "
                "start earlier, or leave it out"
            )
        apart = float(torch.linalg.vector_norm(omega - self.average.to(omega)))
        if not apart <= slack * float(torch.linalg.vector_norm(omega)):
            raise ConfigurationError(
                f"horizon='training', but {name} ended {apart:.3g} away from the average of the "
                "weights at its updates: a rule that depends on more than their number, or two "
                "averages, follow no flow; use Lightning's own rules, or give newton_steps=..."
            )
        shares, rest = [], 1.0
        for newest in reversed(self.newest):
            shares.append(newest * rest)
            rest *= 1.0 - newest
        return _grouped(self.times, shares[::-1])


class AverageWatch:
    """Follows an averaging callback: which times of the flow its average is over, in which shares.

    The rule's c is tried on two numbers, the updates are repeated on the trained parameters alone,
    and where training ends the two must agree.

    Args:
        callback: one of Lightning's that average weights.
        slack: the relative difference that rounding may make.
    """

    def __init__(self, callback: pl.Callback, slack: float) -> None:
        self._callback, self._slack = callback, slack
        self._name = type(callback).__name__
        self._updates = Updates()

    def look(self, time: float, omega: Tensor) -> None:
        """Take an update since the last look, at ω (p,) and this time of the flow."""
        count, share = self._rule()
        if count != self._updates.count:
            self._updates.add(count, share, time, omega)

    def _rule(self) -> tuple[int, float]:
        """How many updates there were, and c of the last one."""
        # no public name of Lightning's says what it averages
        rule: Any
        several: Any = None
        if isinstance(self._callback, pl.callbacks.StochasticWeightAveraging):
            count, rule = self._callback.n_averaged, self._callback._avg_fn
        else:
            average: Any = getattr(self._callback, "_average_model", None)
            count = None if average is None else average.n_averaged
            rule, several = getattr(average, "avg_fn", None), getattr(average, "multi_avg_fn", None)
        done = 0 if count is None else int(count)
        before = torch.tensor(max(done - 1, 0))
        if done <= 1:
            return done, 1.0
        old, new = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        if several is not None:
            several([old], [new], before)
            return done, float(old)
        return done, 1 / done if rule is None else float(rule(old, new, before))

    def times(self, omega: Tensor) -> TimeAverage:
        """The average that training ended with, at the trained parameters (p,).

        Raises:
            ConfigurationError: they are no such average.
        """
        return self._updates.averaged(omega, self._slack, self._name)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run, or a memory of its checkpoint, needs to know."""
        return asdict(self._updates)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on where a checkpoint was.

        Raises:
            ConfigurationError: it is of a training without this callback.
        """
        if state is None:
            raise ConfigurationError(
                f"horizon='training' with {self._name}, but the checkpoint is of a training "
                "without it: what its average is over is not known; resume with the callbacks of "
                "before"
            )
        self._updates = Updates(**state)


def _grouped(times: Sequence[float], shares: Sequence[float]) -> TimeAverage:
    """At most so many times as a memory keeps: neighbours become one at their mean time."""
    size = math.ceil(len(times) / _TIMES)
    found: list[tuple[float, float]] = []
    for k in range(0, len(times), size):
        share = sum(shares[k : k + size])
        if share > 0:
            parts = zip(times[k : k + size], shares[k : k + size], strict=True)
            found.append((sum(s * a for s, a in parts) / share, share))
    return TimeAverage(tuple(s for s, _ in found), tuple(a for _, a in found))


def check_unmoved(omega: Tensor, view: ModelView) -> None:
    """Refuse parameters that moved after their memory was built.

    Args:
        omega: the memory's ω (p,).
        view: of the module.

    Raises:
        ConfigurationError: with how far they moved.
    """
    now = view.get()
    kept = omega.to(now.device).to(view.kept_as).double()
    if not torch.allclose(now, kept, rtol=1e-6, atol=1e-8):
        raise ConfigurationError(
            "a callback listed after MUterCallback changed the trained parameters by "
            f"{float(torch.linalg.vector_norm(now - kept)):.3g} when training ended, after their "
            "memory was built: list it before MUterCallback"
        )
