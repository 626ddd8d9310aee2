"""Fits and unlearns on ``devices`` processes and saves the memory: run by test_ddp.py."""

from __future__ import annotations

import sys
import warnings

import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from test_unlearning import QUIET, Data, Net

from lightning_muter import L2Ball, MUterCallback, RemovalDataModule, Trainer

if __name__ == "__main__":
    devices, path = int(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("ignore")
    pl.seed_everything(0)
    model, data = Net(), Data(41)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=1e-2)
    model.configure_optimizers = lambda: sgd  # type: ignore[method-assign]
    callback = MUterCallback(threat=L2Ball(0.5), head="classifier")
    strategy = "ddp" if devices > 1 else "auto"
    trainer = Trainer(
        max_epochs=1, callbacks=[callback], devices=devices, strategy=strategy, **QUIET
    )
    trainer.fit(model, data)
    trainer.unlearn(RemovalDataModule(data, [3, 17, 40]))
    memory = callback.memory
    assert memory is not None and memory.summary["n"] == 41
    if trainer.is_global_zero:
        save_file({"matrix": memory.matrix, "omega": memory.omega}, path)
