"""Stage I for a model that is trained already: the best checkpoint, or one from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import QUIET, Data, Net, fit, memory_of
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import (
    DataLoader,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_muter import (
    ConfigurationError,
    L2Ball,
    MUterCallback,
    RemovalDataModule,
    RemovalError,
    Trainer,
    UnlearningMemory,
)

pytestmark = pytest.mark.filterwarnings("ignore:the memory is of a model that was trained already")


def builder(**options: Any) -> tuple[Trainer, MUterCallback]:
    callback = MUterCallback(
        **{"threat": L2Ball(0.5), "head": "classifier", "weight_decay": 1e-2, **options}
    )
    return Trainer(callbacks=[callback], **QUIET), callback


def curvature(memory: UnlearningMemory) -> torch.Tensor:
    assert memory.curvature is not None
    return memory.curvature.matrix


def test_the_memory_of_a_trained_model_is_that_of_its_fit(tmp_path: Path) -> None:
    trainer, callback, model, data = fit()
    flags = [p.requires_grad for p in model.parameters()]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    other, own = builder(memory_dir=str(tmp_path))
    memory = other.build_memory(model, data)
    assert memory is own.memory and torch.equal(state, torch.get_rng_state())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    torch.testing.assert_close(curvature(memory), curvature(memory_of(callback)))
    assert torch.equal(memory.omega, memory_of(callback).omega)
    # requests serve from it, in this process and from the folder
    result = other.unlearn(RemovalDataModule(data, [3, 5]))
    assert result.status == "doubtful" and "trained already" in result.warnings[-1]
    same = Net().double()
    same.load_state_dict(torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"])
    Trainer(**QUIET).unlearn(RemovalDataModule(data, [7]), model=same, memory=str(tmp_path))
    twin, twin_model = trainer, model
    with torch.no_grad():
        twin_model.classifier.weight.copy_(memory_of(callback).omega[:18].reshape(3, 6))
        twin_model.classifier.bias.copy_(memory_of(callback).omega[18:])
    twin.unlearn(RemovalDataModule(data, [3, 5, 7]))
    torch.testing.assert_close(same.classifier.weight, twin_model.classifier.weight)


def test_newton_steps_take_a_model_from_elsewhere_to_its_optimum() -> None:
    pl.seed_everything(0, verbose=False)
    model, data = Net().double(), Data()
    trainer, _ = builder(newton_steps=15)
    memory = trainer.build_memory(model, data)
    assert memory.summary["residual_gradient"] < 1e-7
    reference = memory_of(fit(data)[1])
    pl.seed_everything(0, verbose=False)
    torch.testing.assert_close(curvature(memory), curvature(reference), rtol=1e-5, atol=1e-5)
    far, _ = builder()
    with pytest.warns(UserWarning, match="training stopped about"):
        far.build_memory(Net().double(), data)


def best_fit(folder: Path, **options: Any) -> tuple[Trainer, MUterCallback, Net, Data]:
    """A fit whose best epoch is not its last one."""

    class Scored(Net):
        def on_train_epoch_end(self) -> None:
            self.log("score", float((self.current_epoch - 1) ** 2))

    pl.seed_everything(0, verbose=False)
    model, data = Scored(), Data()
    callback = MUterCallback(
        **{"threat": L2Ball(0.5), "head": "classifier", "memory_dir": None, **options}
    )
    saving = ModelCheckpoint(folder, monitor="score", filename="{epoch}")
    settings = {**QUIET, "enable_checkpointing": True, "callbacks": [callback, saving]}
    trainer = Trainer(max_epochs=4, **settings)
    trainer.fit(model, data)
    return trainer, callback, model, data


@pytest.mark.parametrize("where", ["best", "path"])
def test_the_best_checkpoint(where: str, tmp_path: Path) -> None:
    trainer, callback, model, data = best_fit(tmp_path)
    last = model.classifier.weight.detach().clone()
    best = tmp_path / "epoch=1.ckpt"
    callback.weight_decay = None  # read from the checkpoint's optimizer
    memory = trainer.build_memory(model, data, "best" if where == "best" else best)
    kept = torch.load(best, weights_only=True)["state_dict"]["classifier.weight"]
    assert torch.equal(model.classifier.weight, kept) and not torch.equal(kept, last)
    assert torch.equal(memory.omega[:18], kept.flatten())
    assert memory.settings.weight_decay == 1e-2
    trainer.unlearn(RemovalDataModule(data, [3]))
    assert not torch.equal(model.classifier.weight, kept)


def test_a_horizon_comes_from_the_checkpoint_of_a_fit_with_the_callback(tmp_path: Path) -> None:
    trainer, callback, model, data = best_fit(tmp_path, horizon="training")
    full = memory_of(callback).settings.horizon
    memory = trainer.build_memory(model, data, "best")
    assert full is not None and memory.settings.horizon == pytest.approx(full / 2)
    assert memory.start is not None and callback.initial is not None
    assert torch.equal(memory.start.initial, callback.initial)
    other, _ = builder(horizon="training")
    with pytest.raises(ConfigurationError, match="parameters that training started from"):
        other.build_memory(model, data)


@pytest.mark.parametrize(
    ("options", "data", "match"),
    [
        ({"weight_decay": None}, Data(), "weight decay of the training is not known"),
        ({"threat": L2Ball(0.5, data_range=(0, 1))}, Data(), "range"),
        ({"loss": "logistic"}, Data(), "one output"),
        ({"head": "clasifier"}, Data(), "did you mean 'classifier'"),
        ({"ckpt_path": "missing.ckpt"}, Data(), "no file"),
        ({"ckpt_path": "best"}, Data(), "has no best model"),
        (
            {},
            DataLoader(TensorDataset(torch.randn(4, 8).double(), torch.full((4,), 7))).dataset,
            "classes 0 to 2",
        ),
    ],
)
def test_what_is_refused_leaves_the_model(options: dict[str, Any], data: Any, match: str) -> None:
    ckpt_path = options.pop("ckpt_path", None)
    trainer, callback = builder(**options)
    model = Net().double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=match):
        trainer.build_memory(model, data, ckpt_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert callback.memory is None and all(p.requires_grad for p in model.parameters())


def test_no_callback_a_taken_folder_and_another_models_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs a MUterCallback"):
        Trainer(**QUIET).build_memory(Net(), Data())
    folder = str(tmp_path / "memory")
    fit(memory_dir=folder)
    trainer, _ = builder(memory_dir=folder)
    with pytest.raises(ConfigurationError, match="holds a memory already"):
        trainer.build_memory(Net(), Data())
    torch.save({"state_dict": {"head.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    trainer, _ = builder()
    with pytest.raises(ConfigurationError, match="weights are not the model's"):
        trainer.build_memory(Net().double(), Data(), tmp_path / "other.ckpt")
    torch.save([1], tmp_path / "none.ckpt")
    with pytest.raises(ConfigurationError, match="no checkpoint with a state_dict"):
        trainer.build_memory(Net().double(), Data(), tmp_path / "none.ckpt")


def test_a_memory_of_rows_serves_indices_alone() -> None:
    _, _, model, data = fit()
    dense, _ = builder(sketch=40)
    dense.build_memory(model, data)
    rows, _ = builder(sketch=40, representation="rows")
    twin = Net().double()
    twin.load_state_dict(model.state_dict())
    rows.build_memory(twin, data)
    dense.unlearn(RemovalDataModule(data, [3, 5]))
    rows.unlearn([3, 5])
    torch.testing.assert_close(
        model.classifier.weight, twin.classifier.weight, rtol=1e-6, atol=1e-7
    )


def smoothed(module: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.2)


def penalised(module: Any, batch: Any) -> torch.Tensor:
    weights = sum(p.square().sum() for p in module.classifier.parameters())
    return F.cross_entropy(module(batch[0]), batch[1]) + 0.005 * weights


def needing(module: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1]) * module.trainer.world_size


@pytest.mark.parametrize(
    ("step", "options", "match"),
    [
        (smoothed, {}, "is not that of the callback's loss"),
        (smoothed, {"loss": nn.CrossEntropyLoss(label_smoothing=0.2)}, None),
        (penalised, {}, None),
        (penalised, {"weight_decay": 0.0}, "L2 penalty of its own"),
    ],
)
def test_the_loss_of_its_training_step_is_compared(step: Any, options: Any, match: Any) -> None:
    class Stepping(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = step(self, batch)
            self.log("loss", loss)
            return {"loss": loss}

    pl.seed_everything(0, verbose=False)
    model, state = Stepping().double(), {}
    trainer, _ = builder(newton_steps=12, **options)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if match is None:
        memory = trainer.build_memory(model, Data())
        assert "this loss" not in memory.warnings[-1]
        return
    with pytest.raises(ConfigurationError, match=match):
        trainer.build_memory(model, Data())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_step_that_needs_a_trainer_is_named_as_not_compared() -> None:
    class Stepping(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return needing(self, batch)

    trainer, _ = builder(newton_steps=12)
    memory = trainer.build_memory(Stepping().double(), Data())
    assert "this loss, perturbations of this threat" in memory.warnings[-1]


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (WeightedRandomSampler([1.0] * 21 + [3.0] * 20, 41), [41 / 81] * 21 + [3 * 41 / 81] * 20),
        (SubsetRandomSampler(range(21)), [1.0] * 21 + [0.0] * 20),
        (None, [1.0] * 41),
    ],
)
def test_points_weigh_what_the_loader_draws(sampler: Any, expected: list[float]) -> None:
    class Sampled(Data):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.dataset, batch_size=16, sampler=sampler)

    callback = MUterCallback(L2Ball(0.5), head="classifier", weight_decay=0.01, attack_steps=2)
    trainer, model = Trainer(callbacks=[callback], **QUIET), Net().double()
    with pytest.warns(UserWarning, match="as often as its loader draws it"):
        memory = trainer.build_memory(model, Sampled())
    torch.testing.assert_close(memory.weights, torch.tensor(expected, dtype=torch.float64))
    if isinstance(sampler, SubsetRandomSampler):
        with pytest.raises(RemovalError, match="were never trained on"):
            trainer.unlearn(RemovalDataModule(Data(), indices=[30]))
