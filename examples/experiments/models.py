"""Modules of the experiments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import Tensor, nn

#: where pretrained weights are kept, unless this environment variable says another folder
WEIGHTS = "MUTER_WEIGHTS"


def weights_file(name: str) -> Path:
    """Where the weights of a pretrained network are, or go."""
    folder = os.environ.get(WEIGHTS, "~/.cache/lightning-muter")
    return Path(folder).expanduser() / f"{name}.safetensors"


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


class _Block(nn.Module):
    """A pre-activation residual block of two 3×3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), activation())
        self.rest = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            activation(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.first(x)
        return self.rest(active) + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(pl.LightningModule):
    """WRN-depth-width (Zagoruyko and Komodakis, 2016) with a linear head named ``head``.

    SiLU instead of ReLU: maximisers of a ReLU network sit on its kinks (docs/limits.md). With
    ``pretrained`` the backbone comes from `weights_file` and the head starts anew.
    """

    def __init__(
        self,
        depth: int = 10,
        width: int = 1,
        outputs: int = 5,
        activation: str = "SiLU",
        lr: float = 0.1,
        weight_decay: float = 5e-4,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        kind = getattr(nn, activation)
        sizes = [16, 16 * width, 32 * width, 64 * width]
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
        for group in range(3):
            for k in range((depth - 4) // 6):
                inputs = sizes[group] if k == 0 else sizes[group + 1]
                stride = 2 if group > 0 and k == 0 else 1
                layers.append(_Block(inputs, sizes[group + 1], stride, kind))
        layers += [nn.BatchNorm2d(sizes[3]), kind(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.backbone = nn.Sequential(*layers)
        if pretrained is not None:
            load_model(self.backbone, weights_file(pretrained))
        self.head = nn.Linear(sizes[3], outputs, bias=False)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracies are logged by the callback."""

    def configure_optimizers(self) -> Any:
        wanted = [p for p in self.parameters() if p.requires_grad]
        sgd = torch.optim.SGD(wanted, self.lr, momentum=0.9, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        return [sgd], [
            {
                "scheduler": torch.optim.lr_scheduler.OneCycleLR(sgd, self.lr, steps),
                "interval": "step",
            }
        ]
