"""The trained model is not lost where what comes after training fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_muter.errors import StateError
from lightning_muter.lightning.flavour import pl, rank_zero_info

__all__ = ["Rescue", "check_not_stopped"]


class Rescue:
    """Saves a trainer's model before, or after a failure of, what follows training.

    With a folder the model is written there beforehand, unless the folder holds one already: that
    one belongs to an older memory. Without a folder it is written to the trainer's
    ``default_root_dir`` where something fails; with several processes beforehand, since a process
    that failed cannot wait for the others to write.

    Args:
        trainer: whose model it is.
        path: where the model will lie beside the memory; None without a folder.
    """

    def __init__(self, trainer: pl.Trainer, path: Path | None) -> None:
        token: str = trainer.strategy.broadcast(os.urandom(4).hex())
        spare = Path(trainer.default_root_dir) / f"muter-trained-{token}.ckpt"
        taken: bool = trainer.strategy.broadcast(path is not None and path.exists())
        self.path = spare if path is None or taken else path
        self._trainer = trainer
        self._ahead = path is not None or trainer.world_size > 1
        self._temporary = self.path is spare
        self._saved = False

    def keep(self) -> None:
        """Write the model as it is now, where it is written beforehand."""
        if self._ahead:
            self._save()

    def checkpoint(self) -> dict[str, Any] | None:
        """The model as `keep` wrote it, where that is one file."""
        if not self._saved or not self.path.is_file():
            return None
        found: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=False)
        return found

    def done(self) -> None:
        """What was written for the case of a failure goes."""
        if self._temporary and self._saved and self._trainer.is_global_zero:
            self.path.unlink(missing_ok=True)

    @contextmanager
    def guarding(self, what: str) -> Iterator[None]:
        """Save the model if ``what`` fails, and say where it is.

        Raises:
            StateError: from the error that ended it.
        """
        try:
            yield
        except BaseException as error:
            where = self._place()
            if not isinstance(error, Exception):  # an interrupt goes on as it is
                rank_zero_info(f"{what} was interrupted. {where}")
                raise
            message = " ".join(str(error).split())
            raise StateError(
                f"training ended, and then {what} failed with {type(error).__name__}: {message}; "
                f"no memory was built. {where}"
            ) from error

    def _save(self) -> None:
        # with its weights alone: whoever loads it needs no state of a training that is over
        self._trainer.save_checkpoint(self.path, weights_only=True)
        self._saved = True

    def _place(self) -> str:
        if not self._saved:
            try:
                self._save()
            except Exception as error:
                return f"The trained model could not be saved either ({error})"
        return f"The trained model is in {self.path}: nothing has to be trained again"


def check_not_stopped(trainer: pl.Trainer, done: int, n: int) -> None:
    """End a pass over the points where the process was asked to end.

    Lightning catches SIGTERM and looks at it between training batches; after training nobody does.

    Raises:
        StateError: SIGTERM has arrived.
    """
    if trainer.received_sigterm:
        raise StateError(
            f"SIGTERM arrived in a pass over the training points ({done:,} of {n:,} done)"
        )
