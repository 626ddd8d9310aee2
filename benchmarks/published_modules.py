"""Published modules as they are: the gradient of their own loss on the points left.

    python benchmarks/published_modules.py lightly-linear lightly-finetune transformers timm
    LIGHTNING_MUTER_PACKAGE=lightning python benchmarks/published_modules.py lightning-uq-box

Each needs its package. The gradient is of the module's own loss at its own adversary, by code that
shares nothing with lightning-muter.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_muter import ConfigurationError, L2Ball, MUterCallback, RemovalDataModule, Trainer

pl: Any = importlib.import_module(os.environ.get("LIGHTNING_MUTER_PACKAGE", "pytorch_lightning"))
N, CLASSES, EPS, GONE = 40, 3, 0.2, [3, 11, 19]
LEFT = [i for i in range(N) if i not in GONE]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
Loss = Callable[[Any, Tensor, Tensor], Tensor]


class Points(Dataset[Any]):
    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.y, self.make = torch.arange(N) % CLASSES, make
        patterns = torch.randn(CLASSES, 3, 8, 8, generator=generator)
        self.x = 0.5 * patterns[self.y] + 0.5 * torch.randn(N, 3, 8, 8, generator=generator)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.make(self.x[index], self.y[index])


@dataclass
class Case:
    model: Any
    head: str
    own: Loss
    callback: dict[str, Any]
    weight_decay: float = 0.02
    make: Callable[[Tensor, Tensor], Any] = lambda x, y: (x, y)
    refused: dict[str, Any] = field(default_factory=dict)


def body() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def lightly(name: str) -> Case:
    package = importlib.import_module("lightly.utils.benchmarking.linear_classifier")
    model = getattr(package, name)(body(), 8, 8.0, 16, CLASSES, (1, 2))

    def logits(module: Any, x: Tensor) -> Tensor:
        found: Tensor = module.classification_head(module.model(x).flatten(1))
        return found

    criterion: dict[str, Any] = {"loss": "criterion", "weight_decay": 0.05}
    return Case(
        model,
        "classification_head",
        lambda module, x, y: module.criterion(logits(module, x), y),
        {**criterion, "forward": logits} if name == "LinearClassifier" else criterion,
        0.05,
        lambda x, y: (x, y, "file.png"),
        criterion if name == "LinearClassifier" else {},
    )


def uncertainty() -> Case:
    package = importlib.import_module("lightning_uq_box.uq_methods")
    model = package.DeterministicClassification(
        model=nn.Sequential(body(), nn.Linear(16, CLASSES)),
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        optimizer=partial(torch.optim.Adam, lr=1e-2, weight_decay=0.02),
    )
    return Case(
        model,
        "model.1",
        lambda module, x, y: module.loss_fn(module(x), y),
        {"loss": "loss_fn"},
        make=lambda x, y: {"input": x, "target": y},
        refused={"loss": "cross_entropy"},
    )


class Wrapped(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return own_cross_entropy(self, batch["pixel_values"], batch["labels"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


def own_cross_entropy(module: Any, x: Tensor, y: Tensor) -> Tensor:
    output = module(x)
    return nn.functional.cross_entropy(getattr(output, "logits", output), y)


def wrapped(net: nn.Module, head: str) -> Case:
    make = lambda x, y: {"pixel_values": x, "labels": y}  # noqa: E731
    return Case(Wrapped(net), head, own_cross_entropy, {"weight_decay": 0.02}, make=make)


def hugging() -> Case:
    package = importlib.import_module("transformers")
    config = package.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
    )
    return wrapped(package.ViTForImageClassification(config), "net.classifier")


def timm() -> Case:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    create = importlib.import_module("timm").create_model
    return wrapped(create("vit_tiny_patch16_224", num_classes=CLASSES, **sizes), "net.head")


CASES: dict[str, Callable[[], Case]] = {
    "lightly-linear": lambda: lightly("LinearClassifier"),
    "lightly-finetune": lambda: lightly("FinetuneClassifier"),
    "lightning-uq-box": uncertainty,
    "transformers": hugging,
    "timm": timm,
}


def gradient(case: Case, model: Any, data: Points) -> float:
    """‖∇F‖ over the points left, δ = ε g/‖g‖ found by iterating it."""
    model = copy.deepcopy(model).double().eval()
    head = [one.requires_grad_(True) for one in model.get_submodule(case.head).parameters()]
    x, y = data.x[LEFT].double(), data.y[LEFT]
    delta = torch.zeros_like(x)
    for _ in range(60):
        at = (x + delta).requires_grad_(True)
        (g,) = torch.autograd.grad(case.own(model, at, y), at)
        delta = 0.5 * delta + 0.5 * EPS * g / g.flatten(1).norm(dim=1)[:, None, None, None]
    found = torch.autograd.grad(case.own(model, (x + delta).detach(), y), head)
    parts = [(g + case.weight_decay * p).flatten() for g, p in zip(found, head, strict=True)]
    return len(LEFT) * float(torch.cat(parts).detach().norm())


def fit(case: Case, data: Points, arguments: dict[str, Any]) -> Trainer:
    callback = MUterCallback(L2Ball(EPS), head=case.head, newton_steps=10, **arguments)
    trainer = Trainer(max_epochs=2, callbacks=[callback], **QUIET)
    trainer.fit(case.model, DataLoader(data, batch_size=8))
    return trainer


def main() -> None:
    for name in sys.argv[1:] or list(CASES):
        torch.manual_seed(0)
        case = CASES[name]()
        data = Points(case.make)
        if case.refused:
            try:
                fit(case, data, case.refused)
                raise SystemExit(f"{name}: {case.refused} was not refused")
            except ConfigurationError as error:
                print(f"{name}: with {case.refused} refused: {str(error)[:120]}...")
        trainer = fit(case, data, case.callback)
        before = gradient(case, case.model, data)
        trainer.unlearn(RemovalDataModule(data, GONE))
        after = gradient(case, case.model, data)
        print(f"{name}: own gradient of the points left {before:.3g} -> {after:.3g}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
