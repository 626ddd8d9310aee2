"""Published modules as they are, and what judges them: the gradient of their own loss.

    python tests/helpers/published.py                 # what is of pytorch_lightning, or of neither
    LIGHTNING_MUTER_PACKAGE=lightning python tests/helpers/published.py

prints the gradient on the points left, before a request of three points and after it. It is of the
module's own loss at its own adversary, by code that shares nothing with lightning-muter.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from lightning_muter import L2Ball, MUterCallback, RemovalDataModule, Trainer

FLAVOUR = os.environ.get("LIGHTNING_MUTER_PACKAGE", "pytorch_lightning")
pl: Any = importlib.import_module(FLAVOUR)
N, CLASSES, EPS, GONE = 40, 3, 0.2, [3, 7, 11]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "precision": "64-true",
}
#: the module's loss of a batch in its own shape
Loss = Callable[[Any, Any], Tensor]


class Points(Dataset[Any]):
    """Noisy patterns, one a class."""

    def __init__(self, make: Callable[[Tensor, Tensor, int], Any], n: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.y, self.make = torch.arange(n) % CLASSES, make
        patterns = torch.randn(CLASSES, 3, size, size, generator=generator, dtype=torch.float64)
        noise = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
        self.x = 0.5 * patterns[self.y] + 0.5 * noise

    def __len__(self) -> int:
        return len(self.y)

    @property
    def left(self) -> list[int]:
        return [i for i in range(len(self)) if i not in GONE]

    def __getitem__(self, index: int) -> Any:
        return self.make(self.x[index], self.y[index], index)

    def batch(self, indices: list[int]) -> Any:
        return torch.utils.data.default_collate([self[i] for i in indices])


@dataclass
class Case:
    """A module, the least change that it needs, and its own loss.

    ``refused`` are the arguments of a first attempt and what its refusal says; ``share`` is what
    may be left of the gradient; ``smooth`` is a radius within which two points meet no kink.
    """

    model: Any
    head: str
    own: Loss
    callback: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.02
    eps: float = EPS
    smooth: float = 0.1
    size: int = 8
    n: int = N
    validates: bool = False
    make: Callable[[Tensor, Tensor, int], Any] = lambda x, y, i: (x, y)
    refused: tuple[dict[str, Any], str] | None = None
    share: float = 0.1

    def points(self) -> Points:
        return Points(self.make, self.n, self.size)

    def fit(self, data: Points, arguments: Mapping[str, Any]) -> tuple[Any, MUterCallback]:
        """Two epochs, Newton's steps and Stage I."""
        given = {"head": self.head, "newton_steps": 10, "batch_size": 64, **arguments}
        callback = MUterCallback(L2Ball(self.eps), **given)
        trainer = Trainer(max_epochs=2, callbacks=[callback], **QUIET)
        loader = DataLoader(data, batch_size=8)
        trainer.fit(self.model, loader, loader if self.validates else None)
        return trainer, callback

    def gradient(self, data: Points, left: list[int]) -> float:
        """‖∇F‖ at the head over points, δ = ε g/‖g‖ found by iterating it."""
        model = copy.deepcopy(self.model).double().eval()
        head = [one.requires_grad_(True) for one in model.get_submodule(self.head).parameters()]
        found = slope(self, model, head, data, left)
        rest = zip(found, head, strict=True)
        parts = [(g + len(left) * self.weight_decay * p).flatten() for g, p in rest]
        return float(torch.cat(parts).detach().norm())


def placed(value: Any, old: Tensor, new: Tensor) -> Any:
    """A batch with one tensor in the place of another."""
    if isinstance(value, dict):
        return {name: placed(one, old, new) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(placed(one, old, new) for one in value)
    return new if value is old else value


def first_image(batch: Any) -> Tensor:
    """The input of a batch: what is four-dimensional."""
    values = batch.values() if isinstance(batch, dict) else batch
    return next(one for one in values if isinstance(one, Tensor) and one.ndim == 4)


def slope(
    case: Case, model: Any, wanted: list[Tensor], data: Points, indices: list[int], steps: int = 60
) -> list[Tensor]:
    """Σ ∇l at each point's own maximiser, found by a damped iteration of δ = ε g/‖g‖."""
    batch = data.batch(indices)
    x = first_image(batch)
    delta = torch.zeros_like(x)
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(steps):
            at = (x + delta).requires_grad_(True)
            (g,) = torch.autograd.grad(case.own(model, placed(batch, x, at)), at)
            step = case.eps * g / g.flatten(1).norm(dim=1)[:, None, None, None]
            delta = 0.4 * delta + 0.6 * step
            delta = case.eps * delta / delta.flatten(1).norm(dim=1)[:, None, None, None]
        at = (x + delta).detach()
        loss = len(indices) * case.own(model, placed(batch, x, at))
        return list(torch.autograd.grad(loss, wanted))


# --- the modules -----------------------------------------------------------------------------


def body() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def lightly(name: str) -> Case:
    package = importlib.import_module("lightly.utils.benchmarking.linear_classifier")
    model = getattr(package, name)(body(), 8, 8.0, 16, CLASSES, (1, 2))

    def logits(module: Any, x: Tensor) -> Tensor:
        found: Tensor = module.classification_head(module.model(x).flatten(1))
        return found

    criterion: dict[str, Any] = {"loss": "criterion", "weight_decay": 0.05}
    linear = name == "LinearClassifier"
    return Case(
        model,
        "classification_head",
        lambda module, batch: module.criterion(logits(module, batch[0]), batch[1]),
        {**criterion, "forward": logits} if linear else criterion,
        0.05,
        make=lambda x, y, i: (x, y, f"{i}.png"),
        refused=(criterion, "no gradient of the loss reaches the input") if linear else None,
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
        lambda module, batch: module.loss_fn(module(batch["input"]), batch["target"]),
        {"loss": "loss_fn"},
        make=lambda x, y, i: {"input": x, "target": y},
        refused=({"loss": "cross_entropy"}, "label smoothing|not that of the callback's loss"),
    )


def remote_sensing() -> Case:
    trainers = importlib.import_module("torchgeo.trainers")
    model = trainers.ClassificationTask(
        model="test_resnet",
        in_channels=3,
        task="multiclass",
        num_classes=CLASSES,
        freeze_backbone=True,
    )
    return Case(
        model,
        "model.fc",
        lambda module, batch: module.criterion(module(batch["image"]), batch["label"]),
        {"loss": "criterion", "weight_decay": 0.02, "newton_steps": 6},
        eps=0.05,
        smooth=0.005,
        size=16,
        n=12,
        validates=True,  # its schedule looks at val_loss
        make=lambda x, y, i: {"image": x, "label": y, "crs": "EPSG:4326"},
        share=0.1,
    )


class Wrapped(pl.LightningModule):  # type: ignore[misc]
    """A network of another package in a module of one's own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return own_cross_entropy(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


class MaskedPatches(Wrapped):
    """Some patches of each image are masked."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, bool_masked_pos: Tensor) -> Any:  # type: ignore[override]
        return self.head(self.net(x, bool_masked_pos=bool_masked_pos).pooler_output)


def own_cross_entropy(module: Any, batch: Any) -> Tensor:
    rest = {name: one for name, one in batch.items() if name not in ("pixel_values", "labels")}
    output = module(batch["pixel_values"], **rest)
    return nn.functional.cross_entropy(getattr(output, "logits", output), batch["labels"])


def wrapped(net: nn.Module, head: str, **more: Any) -> Case:
    options: dict[str, Any] = {"make": lambda x, y, i: {"pixel_values": x, "labels": y}, **more}
    return Case(Wrapped(net), head, own_cross_entropy, {"weight_decay": 0.02}, **options)


def vit_config() -> Any:
    return importlib.import_module("transformers").ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
    )


def hugging() -> Case:
    package = importlib.import_module("transformers")
    return wrapped(package.ViTForImageClassification(vit_config()), "net.classifier")


def hugging_masked() -> Case:
    package = importlib.import_module("transformers")
    net = package.ViTModel(vit_config(), use_mask_token=True)
    net.embeddings.mask_token.data.normal_()
    return Case(
        MaskedPatches(net),
        "head",
        own_cross_entropy,
        {"weight_decay": 0.02},
        make=lambda x, y, i: {
            "pixel_values": x,
            "labels": y,
            "bool_masked_pos": torch.arange(4) == i % 5,
        },
    )


def timm(name: str, **sizes: Any) -> nn.Module:
    net: nn.Module = importlib.import_module("timm").create_model(
        name, num_classes=CLASSES, **sizes
    )
    return net


def vision_transformer() -> Case:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return wrapped(timm("vit_tiny_patch16_224", **sizes), "net.head")


def convnext() -> Case:
    net = timm("convnext_atto", dims=(4, 8, 12, 16), depths=(1, 1, 1, 1))
    return wrapped(net, "net.head.fc", eps=0.01, smooth=0.005, size=32)


def resnet() -> Case:
    net = importlib.import_module("torchvision.models").resnet18(num_classes=CLASSES)
    case = wrapped(net, "net.fc", eps=0.05, smooth=0.005, n=12, share=0.5)
    case.callback |= {"sketch": 1, "newton_steps": 3}
    return case


CASES: dict[str, Callable[[], Case]] = {
    "lightly LinearClassifier": lambda: lightly("LinearClassifier"),
    "lightly FinetuneClassifier": lambda: lightly("FinetuneClassifier"),
    "transformers ViTForImageClassification": hugging,
    "transformers ViTModel, masked patches": hugging_masked,
    "timm vit_tiny_patch16_224": vision_transformer,
    "timm convnext_atto": convnext,
    "torchvision resnet18": resnet,
}
OF_LIGHTNING: dict[str, Callable[[], Case]] = {
    "lightning-uq-box DeterministicClassification": uncertainty,
    "torchgeo ClassificationTask": remote_sensing,
}


def cases() -> dict[str, Callable[[], Case]]:
    """Those of the Lightning that this process uses."""
    return OF_LIGHTNING if FLAVOUR == "lightning" else CASES


def main() -> None:
    for name in sys.argv[1:] or list(cases()):
        torch.manual_seed(0)
        case = cases()[name]()
        data = case.points()
        trainer, _ = case.fit(data, case.callback)
        before = case.gradient(data, data.left)
        trainer.unlearn(RemovalDataModule(data, GONE))
        after = case.gradient(data, data.left)
        print(f"{name}: own gradient of the points left {before:.3g} -> {after:.3g}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
