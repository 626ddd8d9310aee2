"""Modules in the shapes in which people publish them, small and with random weights."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

CLASSES, FEATURES = 3, 5


def sgd(module: nn.Module, lr: float = 0.5, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=lr, weight_decay=0.02, **options)


def backbone() -> nn.Sequential:
    """A small convolution on images 1 x 4 x 4, its weights large enough to tell them apart."""
    body = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, FEATURES), nn.Tanh()
    )
    for one in body.parameters():
        one.data.mul_(2.0)
    return body


class Plain(pl.LightningModule):
    """A backbone and a head; batches (x, y)."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone() if body is None else body
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.backbone(x))

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self) -> Any:
        return sgd(self)


class LinearClassifier(pl.LightningModule):
    """As of a library for self-supervised learning: the backbone runs without gradients."""

    def __init__(self, freeze_model: bool = True) -> None:
        super().__init__()
        self.model = backbone()
        self.freeze_model = freeze_model
        self.classification_head = nn.Linear(FEATURES, CLASSES)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, images: Tensor) -> Tensor:
        if self.freeze_model:
            with torch.no_grad():
                features = self.model.forward(images).flatten(start_dim=1)
        else:
            features = self.model.forward(images).flatten(start_dim=1)
        output: Tensor = self.classification_head(features)
        return output

    def shared_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, targets = batch[0], batch[1]
        predictions = self.forward(images)
        loss = self.criterion(predictions, targets)
        _, predicted = predictions.topk(2)
        return loss, (predicted == targets.unsqueeze(1)).any(dim=1).float().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, topk = self.shared_step(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch[1]))
        self.log_dict({"train_top2": topk}, batch_size=len(batch[1]))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            [{"params": self.classification_head.parameters()}], lr=0.5, weight_decay=0.02
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def linear_classifier_logits(module: Any, x: Tensor) -> Tensor:
    """What a user of it writes for forward=."""
    logits: Tensor = module.classification_head(module.model(x).flatten(1))
    return logits


class SSLFineTuner(pl.LightningModule):
    """As of a collection of models: no ``forward``; the logits are made in a shared step."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.linear_layer = nn.Linear(FEATURES, CLASSES)
        self.train_acc = MulticlassAccuracy(CLASSES)

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()

    def shared_step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        with torch.no_grad():
            feats = self.backbone(x)
        feats = feats.view(feats.size(0), -1)
        logits = self.linear_layer(feats)
        return F.cross_entropy(logits, y), logits, y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, logits, y = self.shared_step(batch)
        acc = self.train_acc(logits.softmax(-1), y)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(y))
        self.log("train_acc_step", acc, batch_size=len(y))
        return loss

    def configure_optimizers(self) -> Any:
        return sgd(self.linear_layer, nesterov=True, momentum=0.9)


def ssl_logits(module: Any, x: Tensor) -> Tensor:
    """What a user of it writes for forward=."""
    logits: Tensor = module.linear_layer(module.backbone(x).flatten(1))
    return logits


class LogisticRegression(pl.LightningModule):
    """As of the same collection: the step flattens, ``forward`` does not; the sum over n."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = functools.partial(torch.optim.Adam, weight_decay=0.02)
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        x = x.view(x.size(0), -1)
        loss = F.cross_entropy(self.forward(x), y, reduction="sum")
        loss /= float(x.size(0))
        return {"loss": loss, "log": {"train_ce_loss": loss}}

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.05)


class DeterministicClassification(pl.LightningModule):
    """As of a library for uncertainty: dict batches by keys, the loss as an attribute."""

    input_key, target_key = "input", "target"

    def __init__(self, loss_fn: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(backbone(), nn.Linear(FEATURES, CLASSES))
        self.loss_fn = loss_fn
        self.train_metrics = MulticlassAccuracy(CLASSES)

    def forward(self, X: Tensor) -> Any:
        return self.model(X)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        out = self.forward(batch[self.input_key])
        loss: Tensor = self.loss_fn(out, batch[self.target_key])
        self.log("train_loss", loss, batch_size=batch[self.input_key].shape[0])
        self.train_metrics(out, batch[self.target_key])
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = sgd(self)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}


class ClassificationTask(pl.LightningModule):
    """As of a library for remote sensing: dict batches with other entries, ``criterion``."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["criterion"])
        self.model = nn.Sequential(OrderedDict(body=backbone(), fc=nn.Linear(FEATURES, CLASSES)))
        self.criterion = criterion

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x, y = batch["image"], batch["label"]
        y_hat = self(x).squeeze(1)
        loss: Tensor = self.criterion(y_hat, y)
        self.log("train_loss", loss, batch_size=x.shape[0])
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "train_loss"},
        }


class SimpleDenseNet(nn.Module):
    """Flattens in itself; batch normalisation between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(16, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Linear(8, FEATURES),
            nn.BatchNorm1d(FEATURES),
            nn.ReLU(),
            nn.Linear(FEATURES, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        logits: Tensor = self.model(x)
        return logits


class MNISTLitModule(pl.LightningModule):
    """As of a template: net and optimizer are given, metrics in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SimpleDenseNet()
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc = MulticlassAccuracy(CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def model_step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), torch.argmax(logits, dim=1), y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, preds, targets = self.model_step(batch)
        self.train_acc(preds, targets)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, batch_size=len(preds))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        return {"optimizer": torch.optim.Adam(self.parameters(), lr=1e-2, weight_decay=0.02)}


class ModelOutput(OrderedDict[str, Any]):
    """A dictionary with attributes, as a library for transformers returns."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class ViTForImageClassification(nn.Module):
    """Patches, attention and a classifier; loss and logits in one output."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 4, 4) / 4)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu")
        self.vit = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.classifier = nn.Linear(4, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ModelOutput:
        tokens = self.patches(pixel_values).flatten(2).mT + self.position
        logits = self.classifier(self.vit(tokens).mean(dim=1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ModelOutput(loss=loss, logits=logits, hidden_states=None)


class HuggingModule(pl.LightningModule):
    """The usual wrapper: the model takes the batch's entries and returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ViTForImageClassification()

    def forward(self, pixel_values: Tensor) -> Any:
        return self.model(pixel_values=pixel_values)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


class LinearModel(pl.LightningModule):
    """As of another library for self-supervised learning: forward returns a dictionary."""

    def __init__(self, finetune: bool) -> None:
        super().__init__()
        self.finetune = finetune
        self.backbone = backbone()
        self.classifier = nn.Linear(FEATURES, CLASSES)
        self.loss_func = nn.CrossEntropyLoss()

    def forward(self, X: Tensor) -> dict[str, Any]:
        with torch.set_grad_enabled(self.finetune):
            feats = self.backbone(X)
        return {"logits": self.classifier(feats), "feats": feats}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, target = batch
        loss: Tensor = self.loss_func(self(x)["logits"], target)
        return loss

    def configure_optimizers(self) -> Any:
        return sgd(self)


class TransferLearning(pl.LightningModule):
    """As of an official example: a feature extractor and the layers after it."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = backbone()
        self.fc = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES))

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.feature_extractor(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.5, weight_decay=0.02)


class MilestonesFinetuning(pl.callbacks.BaseFinetuning):
    """Unfreezes a part of the backbone after the first epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(modules=pl_module.feature_extractor)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.feature_extractor[3:], optimizer)


class SequenceClassifier(Plain):
    """An encoder over sequences of features; the perturbation is of the features."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu")
        super().__init__(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.backbone(x.reshape(len(x), 4, 4)).mean(dim=1))


class Normalised(Plain):
    """Takes images of [0, 1] and normalises them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4]).reshape(1, 1, 1, 1))
        self.register_buffer("std", torch.tensor([0.25]).reshape(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.backbone((x - self.mean) / self.std))


class TwoHeads(Plain):
    """One head is trained, the other one is another task's."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(FEATURES, CLASSES), "b": nn.Linear(FEATURES, 7)})
        del self.head

    def forward(self, x: Tensor) -> Any:
        h = self.backbone(x)
        return {name: head(h) for name, head in self.heads.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return self.loss(self(x)["a"], y)


class BatchNormed(Plain):
    """Batch normalisation before the head."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                nn.Conv2d(1, 3, 3),
                nn.BatchNorm2d(3),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(12, FEATURES),
            )
        )


class Stepping(Plain):
    """A plain module whose step is the caller's."""

    def __init__(self, step: Callable[[Any, Any], Any], optimizer: Any = None) -> None:
        super().__init__()
        self.step, self.make = step, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def configure_optimizers(self) -> Any:
        return sgd(self) if self.make is None else self.make(self)


class Manual(Plain):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        optimizer: Any = self.optimizers()
        loss = self.loss(self(x), y)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class Masked(Plain):
    """Needs another entry of the batch in its forward."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.head(self.backbone(x * mask))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self(batch["x"], batch["mask"]), batch["y"])


class Padded(Plain):
    """An encoder over sequences of two lengths, their ends masked; token types of its own."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu")
        super().__init__(nn.TransformerEncoder(layer, 1))
        self.head = nn.Linear(4, CLASSES)
        self.types = nn.Embedding(2, 4)

    def forward(self, x: Tensor, padding: Tensor, types: Tensor | None = None) -> Any:
        tokens = x.reshape(len(x), 4, 4)
        if types is not None:
            tokens = tokens + self.types(types)
        seen = self.backbone(tokens, src_key_padding_mask=padding)
        kept = (~padding).to(seen).unsqueeze(2)
        return self.head((seen * kept).sum(dim=1) / kept.sum(dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, *beside = batch if isinstance(batch, (list, tuple)) else vars(batch).values()
        return self.loss(self(x, *beside), y)


class Dense(Plain):
    """One output a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, CLASSES, 1)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y)


class Regression(Plain):
    """Two numbers a point."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, 2)
        self.criterion = nn.MSELoss()

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.criterion(outputs, y)
        return loss


class ManyLabels(Plain):
    """Any of three labels a point."""

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, y)


class Pair(NamedTuple):
    """A batch by names, with an entry that is no tensor."""

    image: Tensor
    label: Tensor
    path: list[str]


def namespace(x: Tensor, y: Tensor) -> Any:
    return SimpleNamespace(inputs=x, targets=y)
