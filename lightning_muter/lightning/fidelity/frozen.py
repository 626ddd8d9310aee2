"""Whether what should not be trained stays as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.flavour import pl

__all__ = ["FrozenPart", "check_finetuning"]

_SHOWN = 5


def _digest(value: Tensor) -> bytes:
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=16).digest()


def _names(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN))


def check_finetuning(callbacks: Sequence[pl.Callback]) -> None:
    """Refuse a callback whose purpose it is to unfreeze something later on.

    Raises:
        ConfigurationError: with its class.
    """
    found = [
        type(one).__name__ for one in callbacks if isinstance(one, pl.callbacks.BaseFinetuning)
    ]
    if found:
        raise ConfigurationError(
            f"{found[0]} freezes and unfreezes parts of the module while it trains, and the memory "
            "covers the head alone: leave it out (MUterCallback freezes everything but the head by "
            "itself), or unlearn after a last training of the head alone"
        )


class FrozenPart:
    """The parameters that are not trained, and the buffers of floating point, by value.

    Buffers of integers are counters: no output depends on them smoothly.

    Args:
        module: the module.
        trained: the names of the parameters that are trained.
    """

    def __init__(self, module: nn.Module, trained: Iterable[str]) -> None:
        self._module, self._trained = module, set(trained)
        self._before = {name: _digest(value) for name, value in self._values()}
        self._said: set[str] = set()

    def _values(self) -> Iterable[tuple[str, Tensor]]:
        for name, parameter in self._module.named_parameters():
            if name not in self._trained:
                yield name, parameter
        for name, buffer in self._module.named_buffers():
            if buffer.is_floating_point():
                yield name, buffer

    def check_flags(self) -> None:
        """Refuse a frozen parameter that is trained, and a trained one that is frozen.

        Raises:
            ConfigurationError: with their names.
        """
        flags = {name: p.requires_grad for name, p in self._module.named_parameters()}
        thawed = [n for n, f in flags.items() if f and n not in self._trained]
        if thawed and not self._said.issuperset(thawed):
            self._said.update(thawed)
            raise ConfigurationError(
                f"{len(thawed)} parameters outside the head were unfrozen while training: "
                f"{_names(thawed)}; the memory covers the head alone: leave out callbacks that "
                "unfreeze (BaseFinetuning and the like), or name all trained parameters by "
                "parameters=[...]"
            )
        stopped = [n for n, f in flags.items() if not f and n in self._trained]
        if stopped and not self._said.issuperset(stopped):
            self._said.update(stopped)
            raise ConfigurationError(
                f"{_names(stopped)} should be trained, but requires_grad is False at the start of "
                "a batch: leave out what freezes them while training"
            )

    def check_values(self) -> None:
        """Refuse a frozen part that is not what it was when training started.

        Raises:
            ConfigurationError: with the names of what changed.
        """
        now = dict(self._values())
        changed = [n for n, d in self._before.items() if n not in now or _digest(now[n]) != d]
        if changed and not self._said.issuperset(changed):
            self._said.update(changed)
            raise ConfigurationError(
                f"{len(changed)} tensors outside the head changed while training: "
                f"{_names(changed)}; the memory takes them as fixed: leave out what trains or "
                "updates them, or name all trained parameters by parameters=[...]"
            )
