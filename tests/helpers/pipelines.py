"""Pipelines as people have them, and whether the callback serves them: a table of the docs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import people
import pytorch_lightning as pl
import torch
from cases import QUIET
from people import CLASSES, Pair, Plain
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_muter import ConfigurationError, L2Ball, MUterCallback, Trainer

N, EPS, GONE = 30, 0.05, [3, 11, 19]


class Points(Dataset[Any]):
    """Points in any shape, made of images and their classes."""

    def __init__(self, make: Callable[[Tensor, Tensor, int], Any], y: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.y = torch.arange(N) % CLASSES if y is None else y
        patterns = (torch.rand(CLASSES, 1, 4, 4, generator=generator) > 0.5).float()
        noise = torch.rand(N, 1, 4, 4, generator=generator)
        self.x = 0.5 * patterns[torch.arange(N) % CLASSES] + 0.5 * noise
        self.make = make

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.make(self.x[index], self.y[index], index)


@dataclass
class Example:
    """A batch by attributes."""

    x: Tensor
    y: Tensor
    source: str = "here"


def as_examples(points: list[Any]) -> Example:
    return Example(torch.stack([p[0] for p in points]), torch.stack([p[1] for p in points]))


@dataclass
class Sequences:
    """A batch of padded sequences."""

    x: Tensor
    y: Tensor
    padding: Tensor
    types: Tensor


def padding(index: int) -> Tensor:
    """Every other sequence is one token shorter."""
    return torch.arange(4) >= 4 - index % 2


def as_sequences(points: list[Any]) -> Sequences:
    """The first image of a point says which types its tokens have."""
    x, y = (torch.stack([p[k] for p in points]) for k in range(2))
    types = (x.reshape(len(x), 4, 4).sum(dim=2) > 2).long()
    return Sequences(x, y, types.bool() & (torch.arange(4) > 1), types)


def as_namespace(points: list[Any]) -> Any:
    example = as_examples(points)
    return people.namespace(example.x, example.y)


def pair(x: Tensor, y: Tensor, index: int) -> Any:
    return x, y


def entries(first: str, second: str, **more: Any) -> Callable[[Tensor, Tensor, int], Any]:
    return lambda x, y, index: {first: x, second: y, **more}


@dataclass(frozen=True)
class Pipeline:
    """A model, its data, and how they are trained.

    ``own`` is the module's own loss of a batch in its own shape, its backbone differentiable;
    ``judge`` says whether the gradient or a really run Retrain decides what is right; ``outcome``
    is "right", or what the refusal says.
    """

    name: str
    model: Callable[[], pl.LightningModule]
    callback: dict[str, Any]
    make: Callable[[Tensor, Tensor, int], Any] = pair
    collate: Callable[[list[Any]], Any] | None = None
    targets: Tensor | None = None
    data: str = "(x, y)"
    precision: str = "64-true"
    trainer: dict[str, Any] = field(default_factory=dict)
    others: Callable[[], list[pl.Callback]] = list
    others_after: Callable[[], list[pl.Callback]] = list
    note: str = ""
    own: Callable[[Any, Any], Tensor] | None = None
    weight_decay: float = 0.02
    tolerance: float = 0.15
    batch_size: int = 10
    judge: str = "gradient"
    outcome: str = "right"

    def dataset(self) -> Points:
        return Points(self.make, self.targets)

    def datamodule(self, left: Sequence[int] = range(N)) -> pl.LightningDataModule:
        pipeline, data = self, Subset(self.dataset(), left)

        class Data(pl.LightningDataModule):
            def train_dataloader(self) -> DataLoader[Any]:
                return DataLoader(data, batch_size=pipeline.batch_size, collate_fn=pipeline.collate)

        return Data()

    def trainer_of(self, **more: Any) -> tuple[Trainer, MUterCallback]:
        """A new trainer and its callback, as the table says."""
        options = {"threat": L2Ball(EPS), "head": "head", "newton_steps": 12, **self.callback}
        callback = MUterCallback(**{**options, **more})
        callbacks = [*self.others(), callback, *self.others_after()]
        settings = {**QUIET, "precision": self.precision, "max_epochs": 2, **self.trainer}
        return Trainer(callbacks=callbacks, **settings), callback

    def fit(
        self, left: Sequence[int] = range(N), **more: Any
    ) -> tuple[Trainer, pl.LightningModule, MUterCallback]:
        """Train as the table says."""
        pl.seed_everything(0, verbose=False)
        model = self.model()
        trainer, callback = self.trainer_of(**more)
        trainer.fit(model, self.datamodule(left))
        return trainer, model, callback

    def refusal(self) -> str:
        """What the error says that ends fit."""
        epochs: list[int] = []

        class Epochs(pl.Callback):
            def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
                epochs.append(trainer.current_epoch)

        try:
            replace(self, others=lambda: [Epochs(), *self.others()]).fit()
        except ConfigurationError as error:
            assert len(epochs) <= 1, "refused after the second epoch had begun"
            return str(error)
        return "right"

    def row(self) -> str:
        """The table's line."""
        said = {k: v for k, v in self.callback.items() if k != "newton_steps" and v is not None}
        arguments = ", ".join(f"`{k}={_shown(v)}`" for k, v in said.items())
        cells = (self.name, self.data, self.precision, arguments, self.note or "-", self.outcome)
        return "| " + " | ".join(cells) + " |"


def _shown(value: Any) -> str:
    if isinstance(value, L2Ball):
        return f"L2Ball(eps={value.eps}, data_range={value.data_range})"
    if isinstance(value, (str, int, float, tuple, list)):
        return repr(value).replace("'", '"')
    return "function" if callable(value) and not isinstance(value, nn.Module) else str(value)


def _step(shape: Callable[[Any], tuple[Tensor, Tensor]] = tuple) -> Callable[[Any, Any], Tensor]:
    def step(module: Any, batch: Any) -> Tensor:
        x, y = shape(batch)
        loss: Tensor = module.loss(module(x), y)
        return loss

    return step


def _compiled() -> pl.LightningModule:
    model = Plain()
    model.compile(backend="eager")
    return model


def _softmax(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.nll_loss(module(x).softmax(1).clamp(min=1e-9).log() * 2, y)


def _averaging(name: str, **options: Any) -> Callable[[], list[pl.Callback]]:
    def make() -> list[pl.Callback]:
        kind = getattr(pl.callbacks, name)
        if name == "WeightAveraging":
            ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
            return [kind(multi_avg_fn=ema)]
        return [kind(**options)]

    return make


def _cosine(module: Any) -> dict[str, Any]:
    optimizer = people.sgd(module, lr=0.03)
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _by_epoch(module: Any) -> dict[str, Any]:
    optimizer = people.sgd(module, lr=0.03)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4)
    return {"optimizer": optimizer, "lr_scheduler": schedule}


OTHER_LOSS = (
    "the gradient that training_step leaves in the trained parameters is not that of the "
    "callback's loss"
)
IMAGE = entries("image", "label", crs="EPSG:4326")
HORIZON: dict[str, Any] = {"newton_steps": 0, "horizon": "training"}

PIPELINES = [
    Pipeline("backbone and head", Plain, {}),
    Pipeline(
        "the same, by names of parameters", Plain, {"head": None, "parameters": ["head.bias"]}
    ),
    Pipeline(
        "batch as a tuple, three entries",
        lambda: people.Stepping(_step(lambda b: b[:2])),
        {},
        make=lambda x, y, i: (x, y, f"{i}.png"),
        collate=lambda points: (
            torch.stack([p[0] for p in points]),
            torch.stack([p[1] for p in points]),
            [p[2] for p in points],
        ),
        data="(x, y, path) as a tuple",
    ),
    Pipeline(
        "batch as a dataclass",
        lambda: people.Stepping(_step(lambda b: (b.x, b.y))),
        {},
        collate=as_examples,
        data="dataclass x, y, source",
    ),
    Pipeline(
        "batch as a named tuple",
        lambda: people.Stepping(_step(lambda b: (b.image, b.label))),
        {},
        make=lambda x, y, i: Pair(x, y, "here"),  # type: ignore[arg-type]
        data="named tuple image, label, path",
    ),
    Pipeline(
        "two tensors that may be the input",
        lambda: people.Stepping(_step(lambda b: (b["left"], b["label"]))),
        {},
        make=lambda x, y, i: {"left": x, "right": x, "label": y},
        data="dict left, right, label",
        outcome="which is the input and which the target is not clear",
    ),
    Pipeline(
        "the same, with batch=",
        lambda: people.Stepping(_step(lambda b: (b["left"], b["label"]))),
        {"batch": ("left", "label")},
        make=lambda x, y, i: {"left": x, "right": x, "label": y},
        data="dict left, right, label",
    ),
    Pipeline(
        "a nested batch",
        lambda: people.Stepping(_step(lambda b: (b["inputs"]["x"], b["y"]))),
        {"batch": lambda batch: (batch["inputs"]["x"], batch["y"])},
        make=lambda x, y, i: {"inputs": {"x": x}, "y": y},
        data="dict inputs, y",
    ),
    Pipeline(
        "forward needs another entry",
        people.Masked,
        {},
        make=lambda x, y, i: {"x": x, "mask": x > 0.1, "y": y},
        data="dict x, mask, y",
    ),
    Pipeline(
        "the same, by names of parameters",
        people.Masked,
        {"head": None, "parameters": ["head.weight", "head.bias"]},
        make=lambda x, y, i: {"x": x, "mask": x > 0.1, "y": y},
        data="dict x, mask, y",
    ),
    Pipeline(
        "the same, under another name",
        people.Masked,
        {},
        make=lambda x, y, i: {"x": x, "region": x > 0.1, "y": y},
        data="dict x, region, y",
        outcome="forward(x) must make logits (n, C) of a batch's input",
    ),
    Pipeline(
        "padded sequences, the mask in third place",
        people.Padded,
        {"batch": (0, 1, 2)},
        make=lambda x, y, i: (x, y, padding(i)),
        data="(x, y, padding)",
    ),
    Pipeline(
        "padded sequences with token types",
        people.Padded,
        {"head": None, "parameters": ["head.weight"]},
        collate=as_sequences,
        data="dataclass x, y, padding, types",
    ),
    Pipeline(
        "index first",
        lambda: people.Stepping(_step(lambda b: (b[1], b[2]))),
        {"batch": (1, 2)},
        make=lambda x, y, i: (i, x, y),
        data="(index, x, y)",
    ),
    Pipeline(
        "linear classifier, backbone under no_grad",
        people.LinearClassifier,
        {"head": "classification_head", "loss": "criterion"},
        outcome="no gradient of the loss reaches the input",
    ),
    Pipeline(
        "the same, with forward=",
        people.LinearClassifier,
        {
            "head": "classification_head",
            "loss": "criterion",
            "forward": people.linear_classifier_logits,
        },
        own=lambda m, b: m.criterion(people.linear_classifier_logits(m, b[0]), b[1]),
        note="cosine schedule by step",
    ),
    Pipeline(
        "finetune classifier",
        lambda: people.LinearClassifier(freeze_model=False),
        {"head": "classification_head", "loss": "criterion"},
        note="cosine schedule by step",
    ),
    Pipeline(
        "fine-tuner without forward",
        people.SSLFineTuner,
        {"head": "linear_layer"},
        outcome="forward(x) failed with NotImplementedError",
    ),
    Pipeline(
        "the same, with forward=",
        people.SSLFineTuner,
        {"head": "linear_layer", "forward": people.ssl_logits},
        own=lambda m, b: nn.functional.cross_entropy(people.ssl_logits(m, b[0]), b[1]),
        note="Nesterov momentum",
    ),
    Pipeline(
        "logistic regression, the step flattens",
        people.LogisticRegression,
        {"head": "linear"},
        outcome="forward(x) failed with RuntimeError",
    ),
    Pipeline(
        "the same, with forward=",
        people.LogisticRegression,
        {"head": "linear", "forward": lambda module, x: module(x.flatten(1))},
        note="Adam",
    ),
    Pipeline(
        "deterministic classification",
        lambda: people.DeterministicClassification(nn.CrossEntropyLoss(label_smoothing=0.1)),
        {"head": "model.1", "loss": "loss_fn"},
        make=entries("input", "target"),
        data="dict input, target",
        note="label smoothing",
    ),
    Pipeline(
        "the same, its smoothing not said",
        lambda: people.DeterministicClassification(nn.CrossEntropyLoss(label_smoothing=0.1)),
        {"head": "model.1"},
        make=entries("input", "target"),
        data="dict input, target",
        outcome=OTHER_LOSS,
    ),
    Pipeline(
        "the same, with class weights",
        lambda: people.DeterministicClassification(
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
        ),
        {"head": "model.1", "loss": "loss_fn"},
        make=entries("input", "target"),
        data="dict input, target",
        outcome="divides by the batch's own sum of weights",
    ),
    Pipeline(
        "classification task of remote sensing",
        lambda: people.ClassificationTask(nn.CrossEntropyLoss(ignore_index=-1000)),
        {"head": "model.fc", "loss": "criterion", "weight_decay": 0.02},
        make=IMAGE,
        data="dict image, label, crs",
        note="AdamW, plateau schedule",
    ),
    Pipeline(
        "template's module",
        people.MNISTLitModule,
        {"head": "net.model.6", "loss": "criterion"},
        note="frozen batch norm, Adam",
    ),
    Pipeline(
        "vision transformer, ModelOutput",
        people.HuggingModule,
        {"head": "model.classifier", "weight_decay": 0.02},
        make=entries("pixel_values", "labels"),
        data="dict pixel_values, labels",
        note="AdamW",
    ),
    Pipeline(
        "linear model, forward returns a dict",
        lambda: people.LinearModel(finetune=True),
        {"head": "classifier", "loss": "loss_func"},
    ),
    Pipeline(
        "the same, its backbone under no_grad",
        lambda: people.LinearModel(finetune=False),
        {
            "head": "classifier",
            "loss": "loss_func",
            "forward": lambda module, x: module.classifier(module.backbone(x)),
        },
        own=lambda m, b: m.loss_func(m.classifier(m.backbone(b[0])), b[1]),
    ),
    Pipeline(
        "transfer learning, unfrozen at a milestone",
        people.TransferLearning,
        {"head": "fc.2"},
        others=lambda: [people.MilestonesFinetuning()],
        note="MilestonesFinetuning",
        outcome="freezes and unfreezes parts of the module",
    ),
    Pipeline("transformer encoder on sequences", people.SequenceClassifier, {}),
    Pipeline(
        "a normalisation inside", people.Normalised, {"threat": L2Ball(EPS, data_range=(0, 1))}
    ),
    Pipeline(
        "two heads, one trained",
        people.TwoHeads,
        {"head": "heads.a"},
        outcome="where the logits (n, C) are is not clear",
    ),
    Pipeline("the same, with output=", people.TwoHeads, {"head": "heads.a", "output": "a"}),
    Pipeline("batch norm below the head", people.BatchNormed, {}, note="frozen batch norm"),
    Pipeline(
        "batch norm trained with the head",
        people.BatchNormed,
        {"head": None, "parameters": ["head.weight", "backbone.1.weight"]},
        outcome="the trained path is another one in train mode",
    ),
    Pipeline("a compiled module", _compiled, {}, note="torch.compile"),
    Pipeline("single precision", Plain, {}, precision="32-true", tolerance=0.2),
    Pipeline("bf16 autocast", Plain, {}, precision="bf16-mixed", tolerance=0.3),
    Pipeline("weights of half precision", Plain, {}, precision="bf16-true", tolerance=0.3),
    Pipeline(
        "weights of half precision, several processes' strategy",
        Plain,
        {},
        precision="bf16-true",
        trainer={"strategy": "ddp", "devices": 1},
        note="ddp",
        outcome="with a distributed strategy",
    ),
    Pipeline(
        "accumulated gradients",
        Plain,
        {},
        trainer={"accumulate_grad_batches": 3},
        note="accumulate_grad_batches=3",
    ),
    Pipeline("manual optimization", people.Manual, {}),
    Pipeline(
        "strategy ddp, one process",
        Plain,
        {},
        trainer={"strategy": "ddp", "devices": 1},
        note="ddp",
    ),
    Pipeline(
        "several labels a point",
        people.ManyLabels,
        {"loss": nn.BCEWithLogitsLoss()},
        targets=nn.functional.one_hot(torch.arange(N) % CLASSES, CLASSES).double(),
    ),
    Pipeline(
        "regression",
        people.Regression,
        {"loss": "criterion"},
        targets=torch.stack([torch.linspace(-1, 1, N), torch.arange(N) % 5 / 5], 1).double(),
    ),
    Pipeline(
        "one output a pixel",
        people.Dense,
        {"head": None, "parameters": ["conv.weight"]},
        targets=torch.zeros(N, 4, 4, dtype=torch.long),
        outcome="it must return one value a point",
    ),
    Pipeline(
        "images of bytes",
        lambda: people.Stepping(_step(lambda b: (b[0].double() / 255, b[1]))),
        {},
        make=lambda x, y, i: ((255 * x).to(torch.uint8), y),
        outcome="inputs are torch.uint8; the perturbation needs floating-point tensors",
    ),
    Pipeline(
        "forward gives probabilities",
        lambda: people.Stepping(_softmax),
        {},
        outcome=OTHER_LOSS,
    ),
    Pipeline(
        "Adam with a horizon",
        lambda: people.Stepping(_step(), lambda m: torch.optim.Adam(m.parameters())),
        HORIZON,
        outcome="it needs torch.optim.SGD of one learning rate",
    ),
    Pipeline(
        "SGD that stops early, schedule by step",
        lambda: people.Stepping(_step(), _cosine),
        HORIZON,
        trainer={"max_epochs": 10},
        batch_size=3,
        judge="retrain",
        note="cosine schedule over all steps",
    ),
    Pipeline(
        "SGD that stops early, schedule by epoch",
        lambda: people.Stepping(_step(), _by_epoch),
        HORIZON,
        trainer={"max_epochs": 10},
        batch_size=3,
        judge="retrain",
        note="step schedule",
    ),
    Pipeline(
        "averaged weights, listed before",
        Plain,
        {},
        others=_averaging("WeightAveraging"),
        precision="32-true",
        tolerance=0.2,
        note="WeightAveraging (EMA) first",
    ),
    Pipeline(
        "averaged weights, listed after",
        Plain,
        {},
        others_after=_averaging("WeightAveraging"),
        note="WeightAveraging (EMA) last",
        outcome="list WeightAveraging before MUterCallback",
    ),
    Pipeline(
        "stochastic weight averaging, listed after",
        Plain,
        {},
        others_after=_averaging("StochasticWeightAveraging", swa_lrs=0.1),
        note="StochasticWeightAveraging last",
        outcome="list StochasticWeightAveraging before MUterCallback",
    ),
]
if not hasattr(pl.callbacks, "WeightAveraging"):  # which came with Lightning 2.6
    PIPELINES = [one for one in PIPELINES if "WeightAveraging (EMA)" not in one.note]
