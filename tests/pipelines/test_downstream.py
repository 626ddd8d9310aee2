"""What comes after fit reads batches and outputs as fit did: requests, loaders, tests, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import people
import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET
from pipelines import EPS, Points, entries, pair
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_muter import (
    AdversarialTraining,
    ConfigurationError,
    L2Ball,
    MUterCallback,
    RemovalDataModule,
    RemovalError,
    Trainer,
    UnlearningMemory,
    UnlearningModule,
    adversarial_influence,
)

MASKED = Points(lambda x, y, i: {"left": x, "right": x, "label": y, "path": f"{i}.png"})


class TwoTower(people.Plain):
    """Reads one of two images, returns a dictionary of several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def score(self, x: Tensor) -> dict[str, Tensor]:
        h = self.backbone(x)
        return {"features": h, "scores": self.head(h)}

    def forward(self, batch: Any) -> Tensor:
        return self.score(batch["left"])["scores"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert set(batch) == {"left", "right", "label", "path"}
        loss: Tensor = self.criterion(self(batch), batch["label"])
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The metrics are the callback's."""


def scores(output: dict[str, Tensor]) -> Tensor:
    return output["scores"]


def callback(**options: Any) -> MUterCallback:
    named: dict[str, Any] = {"batch": ["left", "label"], "output": "scores", "forward": "score"}
    return MUterCallback(
        L2Ball(EPS),
        **{"head": "head", "loss": "criterion", "newton_steps": 12, **named, **options},
    )


def fitted(**options: Any) -> tuple[Trainer, TwoTower, MUterCallback]:
    pl.seed_everything(0, verbose=False)
    model, own = TwoTower(), callback(**options)
    trainer = Trainer(max_epochs=1, callbacks=[own], **QUIET)
    trainer.fit(model, DataLoader(MASKED, batch_size=10))
    return trainer, model, own


def reference() -> tuple[Trainer, people.Plain, MUterCallback]:
    """The same training by a plain module on pairs."""
    pl.seed_everything(0, verbose=False)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    model = people.Stepping(lambda module, batch: loss(module(batch[0]), batch[1]))
    own = MUterCallback(L2Ball(EPS), head="head", newton_steps=12, loss=loss)
    trainer = Trainer(max_epochs=1, callbacks=[own], **QUIET)
    trainer.fit(model, DataLoader(Points(pair), batch_size=10))
    return trainer, model, own


def memory(own: MUterCallback) -> UnlearningMemory:
    assert own.memory is not None
    return own.memory


def test_the_memory_is_that_of_the_plain_pipeline_and_so_is_each_request(tmp_path: Path) -> None:
    trainer, model, own = fitted(memory_dir=str(tmp_path))
    plain_trainer, plain, plain_own = reference()
    a, b = memory(own), memory(plain_own)
    assert a.curvature is not None and b.curvature is not None
    torch.testing.assert_close(a.curvature.matrix, b.curvature.matrix)
    trainer.unlearn(RemovalDataModule(MASKED, [3, 7]))
    plain_trainer.unlearn(RemovalDataModule(Points(pair), [3, 7]))
    torch.testing.assert_close(model.head.weight, plain.head.weight)
    # a loader of the points in the user's shape, without a callback: names are kept in the folder
    loader = DataLoader(Subset(MASKED, [11, 12]), batch_size=2)
    Trainer(**QUIET).unlearn(loader, model=model, memory=str(tmp_path))
    plain_trainer.unlearn(RemovalDataModule(Points(pair), [11, 12]), corrector_steps=0)
    torch.testing.assert_close(model.head.weight, plain.head.weight)
    # and bare pairs of input and target, as a file of points has them
    bare = DataLoader(Subset(Points(pair), [20]), batch_size=1)
    result = Trainer(**QUIET).unlearn(bare, model=model, memory=str(tmp_path))
    assert result.indices == (20,)
    kept = UnlearningMemory.load(tmp_path)
    assert kept.settings.to_dict()["batch"] == ["left", "label"]
    assert kept.settings.to_dict()["loss"] == {"torch": "CrossEntropyLoss", "label_smoothing": 0.1}


def test_corrector_bound_rebase_and_influence_read_them_too(tmp_path: Path) -> None:
    trainer, model, own = fitted(memory_dir=str(tmp_path))
    plain_trainer, plain, _ = reference()
    for one, data in ((trainer, MASKED), (plain_trainer, Points(pair))):
        one.unlearn(RemovalDataModule(data, [3]), corrector_steps=2, bound=True)
    torch.testing.assert_close(model.head.weight, plain.head.weight, rtol=1e-6, atol=1e-8)
    batch = torch.utils.data.default_collate([MASKED[i] for i in range(3)])
    model.double()
    pairs = [batch["left"].double(), batch["label"]]
    batch["left"] = pairs[0]
    torch.testing.assert_close(
        adversarial_influence(memory(own), model, batch),
        adversarial_influence(memory(own), model, pairs),
    )
    assert trainer.rebase(MASKED).points == len(MASKED) - 1


def test_a_predict_loop_of_ones_own(tmp_path: Path) -> None:
    _, model, own = fitted()
    module = UnlearningModule(model, memory(own), own)
    Trainer(**QUIET).predict(module, DataLoader(Subset(MASKED, [4]), batch_size=1))
    named = RemovalDataModule(MASKED, [9], batch=("left", "label"))
    Trainer(**QUIET).predict(module, named)
    assert torch.nonzero(module.memory.removed).flatten().tolist() == [4, 9]


def test_retrain_trains_again_on_batches_of_the_same_shape() -> None:
    trainer, model, own = fitted(method="retrain", newton_steps=12)
    result = trainer.unlearn(RemovalDataModule(MASKED, [3]))
    _, again, _ = fitted()
    assert result.indices == (3,) and not torch.equal(model.head.weight, again.head.weight)


def test_accuracies_of_validation_and_test_are_of_the_logits() -> None:
    trainer, model, _ = fitted()
    plain_trainer, plain, _ = reference()
    plain.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    found = trainer.test(model, DataLoader(MASKED, batch_size=30), verbose=False)
    data = DataLoader(Points(pair), batch_size=30)
    assert found == plain_trainer.test(plain, data, verbose=False)
    assert set(found[0]) == {"test_clean_acc", "test_robust_acc"}


def test_functions_are_known_by_their_code_and_never_looked_up(tmp_path: Path) -> None:
    own = {"batch": lambda batch: (batch["left"], batch["label"]), "output": scores}
    _, model, _ = fitted(memory_dir=str(tmp_path), **own)
    request = RemovalDataModule(MASKED, [3])
    with pytest.raises(ConfigurationError, match="give the trainer the MUterCallback"):
        Trainer(**QUIET).unlearn(request, model=model, memory=str(tmp_path))
    other = callback(batch=own["batch"], output=lambda out: out["scores"] * 2)
    with pytest.raises(ConfigurationError, match="output"):
        Trainer(callbacks=[other], **QUIET).unlearn(request, model=model, memory=str(tmp_path))
    same = Trainer(callbacks=[callback(**own)], **QUIET)
    assert same.unlearn(request, model=model, memory=str(tmp_path)).indices == (3,)


def test_removal_batches_that_cannot_be_read_change_nothing() -> None:
    trainer, model, _ = fitted()
    before = model.head.weight.clone()
    for bad in (
        DataLoader(Points(entries("a", "b")), batch_size=3),
        DataLoader(Points(lambda x, y, i: {"left": x, "label": "cat"}), batch_size=3),
        [torch.zeros(2, 2)],
    ):
        with pytest.raises(RemovalError, match="removal batch"):
            trainer.unlearn(bad)
    assert torch.equal(model.head.weight, before)


class Nothing(people.Plain):
    """Forward gives what no one can read."""

    def forward(self, x: Tensor) -> Any:
        return {"a": self.head(self.backbone(x)), "b": x}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("trained")

    validation_step = training_step


def test_adversarial_training_alone_says_it_before_the_first_batch() -> None:
    loader = DataLoader(Points(pair), batch_size=10)
    trainer = pl.Trainer(max_epochs=1, callbacks=[AdversarialTraining(L2Ball(EPS))], **QUIET)
    with pytest.raises(ConfigurationError, match="output="):
        trainer.fit(Nothing(), loader)
    with pytest.raises(ConfigurationError, match="loss='criterion' is neither"):
        own = AdversarialTraining(L2Ball(EPS), loss="criterion")
        pl.Trainer(max_epochs=1, callbacks=[own], **QUIET).fit(Nothing(), loader)


def test_a_sanity_check_before_training_gets_the_same_errors() -> None:
    model = people.SSLFineTuner()
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    loader = DataLoader(Points(pair), batch_size=10)
    own = MUterCallback(L2Ball(EPS), head="linear_layer")
    trainer = Trainer(max_epochs=1, callbacks=[own], **QUIET)
    with pytest.raises(ConfigurationError, match="forward="):
        trainer.fit(model, loader, loader)
    assert all(p.requires_grad for p in model.parameters())


def test_a_data_set_that_only_its_own_collate_fn_batches() -> None:
    data = Points(lambda x, y, i: people.namespace(x, y))
    pl.seed_everything(0, verbose=False)
    model = people.Stepping(lambda m, b: m.loss(m(b.inputs), b.targets))
    own = MUterCallback(L2Ball(EPS), head="head", newton_steps=12)
    trainer = Trainer(max_epochs=1, callbacks=[own], **QUIET)

    class Module(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(data, batch_size=10, collate_fn=as_namespaces)

    trainer.fit(model, Module())
    with pytest.raises(ConfigurationError, match="give the datamodule"):
        trainer.unlearn(RemovalDataModule(data, [3]))
    assert trainer.unlearn(RemovalDataModule(Module(), [3])).indices == (3,)


def as_namespaces(points: list[Any]) -> Any:
    x = torch.stack([one.inputs for one in points]).double()  # no precision plugin looks inside
    return people.namespace(x, torch.stack([one.targets for one in points]))
