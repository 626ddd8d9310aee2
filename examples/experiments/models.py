"""Modules of the experiments."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearModel(pl.LightningModule):
    """A linear map of the flattened input: logistic, ridge or softmax regression, by its loss."""

    def __init__(
        self,
        features: int,
        outputs: int = 1,
        loss: str = "logistic",
        lr: float = 0.01,
        weight_decay: float = 1e-3,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.head = nn.Linear(features, outputs, bias=bias)
        self.loss, self.lr, self.weight_decay = loss, lr, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        outputs, y = self(batch[0]), batch[1]
        if self.loss == "cross_entropy":
            return F.cross_entropy(outputs, y)
        if self.loss == "squared":
            return 0.5 * (outputs.squeeze(1) - y).square().mean()
        return F.binary_cross_entropy_with_logits(outputs.squeeze(1), y.to(outputs))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
