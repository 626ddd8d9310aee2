"""`MemoryKeeper`: where a trainer's callback keeps the memory of its last training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.flavour import pl
from lightning_muter.lightning.point_ids import Ids
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.rebase_policy import RebasePolicy
from lightning_muter.spec import Settings

__all__ = ["MemoryKeeper", "check_resumed", "forgotten", "keeper_of", "refuse_relearning"]


class MemoryKeeper(pl.Callback):
    """What a request needs of the callback that built the memory.

    Attributes:
        settings: how the memory was asked for.
        weight_decay: the λ that was named, or None for training's own.
        horizon: the horizon that was named.
        memory: the current memory, None before the end of a fit.
        memory_dir: the folder that was asked for.
        folder: the folder that is kept current, None where nothing is written.
        initial: the ω (p,) that training started from.
        batch_size: points a pass reads at once.
        ids: the user's keys of the training points, or the data set's attribute that holds them.
        newton_steps: how many are taken before Stage I.
        overwrite: whether a memory in the folder may be replaced.
        rebase_policy: when a rebase is due.
    """

    settings: Settings
    weight_decay: float | None
    horizon: float | Literal["training"] | None
    memory: UnlearningMemory | None
    memory_dir: str | None
    folder: str | None
    initial: Tensor | None
    batch_size: int
    ids: Ids | None
    newton_steps: int
    overwrite: bool
    rebase_policy: RebasePolicy


def forgotten(memory: UnlearningMemory | None) -> int:
    """How many points a memory has forgotten; none where there is no memory."""
    return 0 if memory is None else int(memory.removed.sum())


def refuse_relearning(gone: int, overwrite: bool) -> None:
    """Refuse a new memory in the place of one that has forgotten points.

    Raises:
        ConfigurationError: with their number.
    """
    if gone and not overwrite:
        raise ConfigurationError(
            f"the memory of this model has forgotten {gone} points, which a new one would hold "
            "again where the data does, and its ledger would be lost: go on with the remaining "
            "points (RemovalDataModule(data, indices=[...]).remaining()) and a new MUterCallback, "
            "or give overwrite=True"
        )


def check_resumed(keeper: MemoryKeeper, state: Mapping[str, Any], ckpt_path: Any) -> None:
    """Refuse a checkpoint that was unlearned, or says nothing of when training started.

    Args:
        keeper: the callback.
        state: what the checkpoint says of that callback, empty where it says nothing.
        ckpt_path: of the checkpoint, None where training starts anew.

    Raises:
        ConfigurationError: with what the memory lacks.
    """
    refuse_relearning(state.get("forgotten", 0), keeper.overwrite)
    if keeper.horizon is None or ckpt_path is None or "flow_time" in state:
        return
    raise ConfigurationError(
        f"horizon={keeper.horizon!r} with a fit that is resumed from a checkpoint without this "
        "callback's state: neither where training started nor how long it took is known; give "
        "newton_steps=..., or train with the callback from the start"
    )


def keeper_of(trainer: pl.Trainer) -> MemoryKeeper | None:
    """The first of a trainer's callbacks that keeps a memory."""
    callbacks: list[pl.Callback] = list(getattr(trainer, "callbacks", []))
    return next((one for one in callbacks if isinstance(one, MemoryKeeper)), None)
