"""The processes of a trainer as a `Group`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.flavour import pl
from lightning_muter.parallel import Group

__all__ = ["process_group"]


def process_group(trainer: pl.Trainer) -> Group:
    """The group of a trainer's processes, as its strategy started them, on its own device.

    Raises:
        ConfigurationError: the trainer is made for several processes that are not running.
    """
    device = trainer.strategy.root_device
    if device.type == "mps":  # it has no float64, in which every memory is kept
        device = torch.device("cpu")
    if trainer.world_size == 1:
        return Group(device=device)
    if not torch.distributed.is_initialized():
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if environment is None or not environment.creates_processes_externally:
            raise ConfigurationError(
                f"the trainer is made for {trainer.world_size} processes, and they are not "
                "running: a request is served by the processes that ran fit with strategy='ddp', "
                "by those that torchrun started, or by one: Trainer(devices=1)"
            )
        trainer.strategy.setup_environment()

    def total(tensor: Tensor) -> Tensor:
        summed: Tensor = trainer.strategy.reduce(tensor, reduce_op="sum")
        return summed

    def gather(value: Any) -> list[Any]:
        found: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, value)
        return found

    return Group(
        rank=trainer.global_rank,
        size=trainer.world_size,
        device=device,
        sum=total,
        broadcast=trainer.strategy.broadcast,
        gather=gather,
    )
