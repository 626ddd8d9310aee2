"""Run by test_ddp.py: certified requests on some devices; each process writes what it has."""

from __future__ import annotations

import sys
import warnings

import pytorch_lightning as pl
import torch
from cases import QUIET, leave_group
from linear_cases import L2, Linear, LinearData
from safetensors.torch import save_file

from lightning_muter import Certificate, MUterCallback, RemovalDataModule, Trainer

if __name__ == "__main__":
    devices, path = int(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("ignore")
    pl.seed_everything(0)
    model, data = Linear("cross_entropy"), LinearData("cross_entropy", n=41)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=model.weight_decay)
    model.configure_optimizers = lambda: sgd  # type: ignore[method-assign]
    callback = MUterCallback(L2, head="head", newton_steps=12, representation="rows")
    strategy = "ddp" if devices > 1 else "auto"
    trainer = Trainer(
        max_epochs=1, callbacks=[callback], devices=devices, strategy=strategy, **QUIET
    )
    trainer.fit(model, data)
    certificate = Certificate(1.0, 1e-5, 1e-8)
    for gone in ([3, 17, 40], [5]):
        result = trainer.unlearn(RemovalDataModule(data, gone), certificate=certificate)
        assert result.publication is not None and result.bound is not None
        assert result.bound <= 1e-8
    memory = callback.memory
    assert memory is not None and memory.private is not None
    weights = callback.settings.view(model).get()
    found = {"private": memory.private, "omega": memory.omega, "model": weights}
    save_file({k: v.clone() for k, v in found.items()}, f"{path}.{trainer.global_rank}")
    leave_group()
