"""Run by test_ddp.py: fit and unlearn on some devices, write what came out."""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import replace

import pytorch_lightning as pl
import torch
from cases import QUIET, Data, Net, leave_group
from safetensors.torch import save_file
from torch.utils.data import Dataset

from lightning_muter import L2Ball, MUterCallback, RemovalDataModule, Trainer


class Named(Dataset[dict[str, torch.Tensor]]):
    """The same points as dictionaries."""

    def __init__(self, points: Dataset[tuple[torch.Tensor, ...]], n: int) -> None:
        self.points, self.n = points, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x, y = self.points[index]
        return {"image": x, "label": y, "row": torch.tensor(index)}


if __name__ == "__main__":
    devices, path = int(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("ignore")
    pl.seed_everything(0)
    model, data = Net(), Data(41)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=1e-2)
    model.configure_optimizers = lambda: sgd  # type: ignore[method-assign]
    callback = MUterCallback(threat=L2Ball(0.5), head="classifier", overwrite=True)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = Trainer(
        max_epochs=1, callbacks=[callback], devices=devices, strategy=strategy, **QUIET
    )
    trainer.fit(model, data)
    memory, trained = callback.memory, copy.deepcopy(model.state_dict())
    assert memory is not None and memory.summary["n"] == 41
    found = {"stage_one": memory.curvature.matrix}
    removals = RemovalDataModule(data, [3, 17, 40])
    for solver in ("direct", "schur"):
        model.load_state_dict(trained)
        start = replace(memory, settings=replace(memory.settings, solver=solver))
        result = trainer.unlearn(removals, model, start, corrector_steps=1, bound=True)
        found[solver] = model.classifier.weight.detach().double()
        assert result.bound is not None
        found[f"{solver}_bound"] = torch.tensor(result.bound)
    model.load_state_dict(trained)
    trainer.unlearn(removals)
    trainer.unlearn(RemovalDataModule(data, [5]))  # fewer points than processes
    assert callback.memory is not None
    found.update(matrix=callback.memory.curvature.matrix, omega=callback.memory.omega)
    model.load_state_dict(trained)
    built = trainer.build_memory(model, Named(data.dataset, 41))
    assert built.summary["n"] == 41
    found["built"] = built.curvature.matrix
    trainer.unlearn(RemovalDataModule(Named(data.dataset, 41), [3, 17, 40]))
    assert callback.memory is not None
    found["built_omega"] = callback.memory.omega
    if trainer.is_global_zero:
        save_file({k: v.clone() for k, v in found.items()}, path)
    leave_group()
