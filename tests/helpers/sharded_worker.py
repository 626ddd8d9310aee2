"""Run by test_ddp.py: a matrix over some devices, requests one after the other, what came out."""

from __future__ import annotations

import sys
import warnings

import torch
from cases import leave_group, trained_on
from safetensors.torch import save_file

from lightning_muter import RemovalDataModule
from lightning_muter.curvature.sharded import ShardedDense

if __name__ == "__main__":
    devices, path = int(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("ignore")
    trainer, callback, data = trained_on(
        devices, representation="sharded", memory_dir=path + ".memory"
    )
    found = {}

    def note(name: str) -> None:
        assert callback.memory is not None
        sharded, omega = callback.memory.curvature, callback.memory.omega
        assert isinstance(sharded, ShardedDense)
        eye = torch.eye(sharded.p, dtype=torch.float64)
        found[f"{name}.matrix"] = torch.stack([sharded.matvec(v) for v in eye])
        found[f"{name}.omega"] = omega
        found[f"{name}.share"] = torch.tensor(float(sharded.rows.untyped_storage().nbytes()))

    note("fit")
    trainer.unlearn(RemovalDataModule(data, [17]))  # its factors are made by one of the processes
    note("one")
    trainer.unlearn(RemovalDataModule(data, [3, 40]), corrector_steps=1)
    note("two")
    trainer.rebase(data)
    note("rebase")
    trainer.unlearn(RemovalDataModule(data, [5]))
    note("after")
    if trainer.is_global_zero:
        save_file({k: v.clone() for k, v in found.items()}, path)
    leave_group()
