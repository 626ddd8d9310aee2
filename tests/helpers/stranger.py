"""Run in an empty folder by a Python that has the wheel alone: what a new user does first.

Writes a project of one module and one config there, then fits, forgets and tests from Python and
from the shell, with a preset by its name.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT = """
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=1e-2)


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        x = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
        self.points = TensorDataset(x, (x[:, 0] > x[:, 1]).long())

    def train_dataloader(self):
        return DataLoader(self.points, batch_size=20)

    def test_dataloader(self):
        return DataLoader(self.points, batch_size=20)
"""

CONFIG = """
seed_everything: 0
model: {class_path: my_project.Model}
data: {class_path: my_project.Data}
trainer: {max_epochs: 2, accelerator: cpu, logger: false, enable_checkpointing: false}
"""

FROM_PYTHON = """
from my_project import Data, Model
from lightning_muter import L2Ball, MUterCallback, RemovalDataModule, Trainer

muter = MUterCallback(
    threat=L2Ball(eps=0.1), head="head", loss="cross_entropy", horizon="training"
)
trainer = Trainer(max_epochs=2, callbacks=[muter], accelerator="cpu", logger=False,
                  enable_checkpointing=False)
model, datamodule = Model(), Data()
trainer.fit(model, datamodule)
result = trainer.unlearn(RemovalDataModule(datamodule, indices=[3, 17]))
assert result.indices == (3, 17), result
trainer.test(model, datamodule)
"""

SHELL = ("fit", "-c", "my.yaml", "-c", "muter_l2", "--trainer.callbacks.head=head")
FORGET = ("unlearn", "-c", "my.yaml", "--memory", "runs/memory", "--indices", "[3,17]")


def said(*words: str) -> str:
    """Standard output and error of this Python with some words, which must succeed."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def main() -> None:
    """The steps; each prints what it is."""
    Path("my_project.py").write_text(PROJECT)
    Path("my.yaml").write_text(CONFIG)
    assert "forgot 2 points" in said("-c", FROM_PYTHON)
    print("from Python: forgotten")
    command = ("-m", "lightning_muter")
    assert "muter_l2 " in said(*command, "presets")
    assert "Trust: " in said(*command, *SHELL)
    assert "forgot 2 points (muter): " in said(*command, *FORGET)
    assert "test_robust_acc" in said(*command, "test", "-c", "my.yaml", "--memory", "runs/memory")
    assert "2 points forgotten: whole" in said(*command, "verify", "runs/memory")
    print("from the shell: forgotten, tested, whole")
    where = said("-c", "import lightning_muter; print(lightning_muter.__file__)").split()[-1]
    print(f"with {where}")


if __name__ == "__main__":
    main()
