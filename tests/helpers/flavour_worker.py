"""Run by test_flavour.py: the same scenario under one of Lightning's two packages.

Arguments: the package, a folder for the memory, "new" or "go on", and a file for what came out.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    """The scenario; the package has to be imported before lightning_muter is."""
    package, folder, what, output = sys.argv[1:5]
    if package == "lightning":
        L = importlib.import_module("lightning")
    else:
        L = importlib.import_module("pytorch_lightning")

    from lightning_muter import L2Ball, MUterCallback, RemovalDataModule, Trainer
    from lightning_muter.lightning.flavour import NAME

    warnings.simplefilter("ignore")

    class Net(L.LightningModule):  # type: ignore[misc, name-defined]
        """A linear classifier."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-2)

    class Data(L.LightningDataModule):  # type: ignore[misc, name-defined]
        """Fifty points of three classes."""

        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(50, 5, generator=generator, dtype=torch.float64)
            self.dataset = TensorDataset(x, x[:, :3].argmax(dim=1))

        def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
            return DataLoader(self.dataset, batch_size=10)

        def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
            return DataLoader(self.dataset, batch_size=10)

    QUIET = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    torch.manual_seed(0)
    model, data = Net().double(), Data()
    if what == "new":
        callback = MUterCallback(L2Ball(0.3), head="head", newton_steps=15, memory_dir=folder)
        own = L.Trainer(max_epochs=1, callbacks=[callback], **QUIET)  # Lightning's own, not ours
        own.fit(model, data)
        own.unlearn(RemovalDataModule(data, [3]))
    fresh = Net().double()
    fresh.load_state_dict(torch.load(f"{folder}/model.ckpt", weights_only=True)["state_dict"])
    trainer = Trainer(**QUIET)
    trainer.unlearn(
        RemovalDataModule(data, [4 if what == "new" else 9]), model=fresh, memory=folder
    )
    (metrics,) = trainer.test(fresh, data, verbose=False)
    found = {
        "package": NAME,
        "omega": fresh.head.weight.flatten().tolist(),
        "loss": metrics["loss"],
    }
    with open(output, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
