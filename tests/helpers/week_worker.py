"""Run by test_week.py: one thing that one person does in one process with a memory's folder.

Arguments: the folder, the rows of today's data set (JSON), what to do, and to which row.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from typing import Any

import torch
from cases import QUIET, Data, Net
from torch.utils.data import Subset

from lightning_muter import MuterError, RemovalDataModule, Trainer
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.kept_model import bring_model_up_to_date

N = 120


def killed(*_: Any) -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


if __name__ == "__main__":
    folder, rows, what = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    warnings.simplefilter("ignore")
    today = Subset(Data(N).dataset, rows)
    bring_model_up_to_date(MemoryStore(folder))
    model = Net().double()
    model.load_state_dict(torch.load(f"{folder}/model.ckpt", weights_only=True)["state_dict"])
    if what == "rebase":
        Trainer(**QUIET).rebase(today, model=model, memory=folder)
    else:
        if what == "crash":  # between the memory's commit and the model's file
            MemoryStore.repair_model = killed  # type: ignore[method-assign]
        removals = RemovalDataModule(today, [rows.index(int(sys.argv[4]))])
        already = "skip" if what == "skip" else "error"
        try:
            result = Trainer(**QUIET).unlearn(
                removals, model=model, memory=folder, already=already, note=what
            )
        except MuterError as error:
            print(json.dumps({"refused": str(error)}))
        else:
            print(json.dumps({"indices": result.indices, "already": result.already}))
