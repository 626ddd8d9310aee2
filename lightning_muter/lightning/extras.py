"""What a call of `unlearn` does beyond its requests: the arguments and what they go with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_muter.arguments import number, whole
from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.data import RemovalDataModule
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.unlearning.certificate import Certificate
from lightning_muter.unlearning.methods import METHODS

__all__ = ["Extras"]


@dataclass(frozen=True)
class Extras:
    """What the call does beyond its requests."""

    noise_std: float
    corrector_steps: int
    bound: bool
    skips: bool
    note: str
    certificate: Certificate | None = None
    inner_gap: float | None = None

    @classmethod
    def of(
        cls, noise_std: Any, corrector_steps: Any, bound: Any, already: Any, note: Any
    ) -> Extras:
        """The arguments of the call, each checked on its own."""
        steps = whole("corrector_steps", corrector_steps)
        if not isinstance(bound, bool):
            raise ConfigurationError(f"bound={bound!r} must be True or False")
        if already not in ("error", "skip"):
            raise ConfigurationError(f"already={already!r} must be 'error' or 'skip'")
        if not isinstance(note, str):
            raise ConfigurationError(f"note={note!r} must be a text for the ledger")
        return cls(number("noise_std", noise_std), steps, bound, already == "skip", note)

    def proving(self, certificate: Any, inner_gap: Any) -> Extras:
        """The same with what is to be proved of the model."""
        if certificate is not None:
            if not isinstance(certificate, Certificate):
                raise ConfigurationError(
                    f"certificate={certificate!r} must be a Certificate(epsilon, delta, radius)"
                )
            if self.noise_std or self.corrector_steps:
                raise ConfigurationError(
                    f"certificate with noise_std={self.noise_std} and corrector_steps="
                    f"{self.corrector_steps}: it takes the passes that it needs and draws its own "
                    "noise; leave them out"
                )
        if inner_gap is not None:
            gap = number("inner_gap", inner_gap)
            if not self.bound:
                raise ConfigurationError(f"inner_gap={gap} is of the bound: give bound=True")
            return replace(self, certificate=certificate, inner_gap=gap)
        return replace(self, certificate=certificate)

    def passed_over(self, memory: UnlearningMemory) -> Tensor | None:
        """The points (n,) that are left out of the call, since an earlier one forgot them."""
        return memory.removed if self.skips else None

    @property
    def reads_the_rest(self) -> bool:
        """Whether the remaining points are needed beside those that go."""
        return self.corrector_steps > 0 or self.bound or self.certificate is not None

    def check(self, memory: UnlearningMemory, removals: Any) -> None:
        """Refuse what the memory's method or the kind of request cannot give."""
        settings = memory.settings
        if self.reads_the_rest and not isinstance(removals, RemovalDataModule):
            raise ConfigurationError(
                "corrector_steps, bound and certificate need a RemovalDataModule"
            )
        if self.corrector_steps and settings.horizon is not None:
            raise ConfigurationError(
                f"corrector_steps={self.corrector_steps} with horizon={settings.horizon}: they "
                "lead to the optimum, where a Retrain that stops early does not go; give one of "
                "the two"
            )
        if self.certificate is not None and not METHODS[settings.method].has_memory:
            raise ConfigurationError(
                f"method={settings.method!r} keeps no curvature: no certificate can be given; use "
                "method='muter'"
            )
        asked = self.noise_std > 0 or self.corrector_steps > 0 or self.bound
        if asked and not METHODS[settings.method].has_memory:
            raise ConfigurationError(
                f"method={settings.method!r} takes no noise_std={self.noise_std}, no "
                f"corrector_steps={self.corrector_steps} and no bound={self.bound}: leave them out"
            )
