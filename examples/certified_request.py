"""One demand for deletion, from the request to the filed evidence, with a certificate.

python examples/certified_request.py

scikit-learn's breast cancer data (569 people, 30 measurements), robust logistic regression.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import Certificate, L2Ball, MUterCallback, RemovalDataModule, Trainer

#: chosen before any request is looked at
RADIUS = 5e-4


class Diagnosis(pl.LightningModule):
    """A logistic regression."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(30, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0]).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, batch[1].to(logits))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=1e-2)


def people() -> TensorDataset:
    """Standardised measurements, and 1 for a benign finding."""
    x, y = load_breast_cancer(return_X_y=True)
    values = torch.tensor(x, dtype=torch.float64)
    return TensorDataset((values - values.mean(dim=0)) / values.std(dim=0), torch.tensor(y))


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """The share of people that are classified right."""
    x, y = data.tensors
    with torch.no_grad():
        return float(((model(x).squeeze(1) > 0) == (y > 0)).double().mean())


def main(folder: Path) -> dict[str, Any]:
    """Train, forget two people at their demand, file the evidence."""
    pl.seed_everything(0, verbose=False)
    data, model = people(), Diagnosis()
    keys = [f"patient-{k:03d}" for k in range(len(data))]
    muter = MUterCallback(
        threat=L2Ball(0.5),
        head="head",
        loss="logistic",
        newton_steps=12,
        memory_dir=str(folder / "memory"),
        ids=keys,
    )
    trainer = Trainer(
        max_epochs=2,
        callbacks=[muter],
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    before = accuracy(model, data)
    certificate = Certificate(epsilon=1.0, delta=1e-5, radius=RADIUS)
    demand = RemovalDataModule(data, ids=["patient-017", "patient-203"])
    result = trainer.unlearn(demand, certificate=certificate, note="letter of 3 March")
    print(result.publication)
    print(f"bound: {result.bound:.3g}, radius: {certificate.radius:g}")
    print(f"accuracy before and after: {before:.4f}, {accuracy(model, data):.4f}")
    trainer.rebase(data)
    return result.to_dict()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*many workers.*")
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
