"""Run by test_ddp.py: rows on some devices, requests by index and by point, what came out."""

from __future__ import annotations

import sys
import warnings

import torch
from cases import leave_group, trained_on
from safetensors.torch import save_file

from lightning_muter import RemovalDataModule, Rows
from lightning_muter.curvature.rows import RowsCurvature

if __name__ == "__main__":
    devices, path = int(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("ignore")
    trainer, callback, data = trained_on(
        devices, representation=Rows(tol=1e-13), sketch=1, memory_dir=path + ".memory"
    )
    found = {}

    def note(name: str) -> None:
        assert callback.memory is not None
        rows, omega = callback.memory.curvature, callback.memory.omega
        assert isinstance(rows, RowsCurvature)
        eye = torch.eye(rows.p, dtype=torch.float64)
        found[f"{name}.matrix"] = torch.stack([rows.matvec(v) for v in eye])
        found[f"{name}.omega"] = omega
        found[f"{name}.share"] = torch.tensor(float(sum(map(len, rows.blocks))))

    note("fit")
    trainer.unlearn([17])  # its row lives on one of the processes
    note("index")
    trainer.unlearn(RemovalDataModule(data, [3, 40]), corrector_steps=1)
    note("point")
    trainer.rebase(data)
    note("rebase")
    trainer.unlearn([5])
    note("after")
    if trainer.is_global_zero:
        save_file({k: v.clone() for k, v in found.items()}, path)
    leave_group()
