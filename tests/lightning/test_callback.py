"""The callback in unusual company: augmentation, accumulation, precision, attacks, BatchNorm."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import QUIET, Data, Net, fit, memory_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_muter import (
    Attack,
    ConfigurationError,
    L2Ball,
    LinfBall,
    MUterCallback,
    RemovalDataModule,
    RemovalError,
    Trainer,
)


class Images(pl.LightningModule):
    """A convolution with BatchNorm and a head, on normalised images."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-2)


def images(n: int = 12) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(n, 1, 6, 6, generator=generator) - 0.5) / 0.5
    return DataLoader(TensorDataset(x, torch.arange(n) % 3), batch_size=4)


@pytest.mark.parametrize("name", ["PGD", "PGDL2", "FGSM"])
@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*|.*fewer.*|the update is.*")
def test_torchattacks_and_frozen_batchnorm(name: str) -> None:
    attack = Attack(f"torchattacks.{name}", mean=[0.5], std=[0.5], init_args={"eps": 0.1})
    pl.seed_everything(0, verbose=False)
    model = Images()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    ball = L2Ball if name == "PGDL2" else LinfBall
    callback = MUterCallback(ball(0.2, data_range=(-1, 1)), head="head", attack=attack)
    trainer = Trainer(max_epochs=1, callbacks=[callback], **{**QUIET, "precision": "32-true"})
    loader = images()
    trainer.fit(model, loader)
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert all(module.training for module in model.modules())
    result = trainer.unlearn(RemovalDataModule(loader.dataset, [0, 5]))
    assert result.status == "doubtful" and result.residual < 1e-8  # one epoch is no optimum
    assert any("newton_steps" in warning for warning in result.warnings)


def test_attack_perturbs_within_the_ball_and_leaves_the_rng() -> None:
    model, loader = Images().eval(), images()
    x, y = next(iter(loader))
    attack = Attack(
        "torchattacks.PGD", mean=[0.5], std=[0.5], init_args={"eps": 0.1, "alpha": 0.05}
    )
    callback = MUterCallback(LinfBall(0.2), head="head", attack=attack)
    state = torch.get_rng_state()
    moved = callback.perturb(model, x, y)
    assert torch.equal(state, torch.get_rng_state())
    assert 0 < float((moved - x).abs().max()) <= 0.2 + 1e-6
    assert float(moved.abs().max()) <= 1 + 1e-6
    with torch.no_grad():
        assert F.cross_entropy(model(moved), y) > F.cross_entropy(model(x), y)
    with pytest.raises(ConfigurationError, match="pixels"):
        Attack("torchattacks.PGD")(model, x, y)
    with pytest.raises(ConfigurationError, match="images"):
        attack(model, x.flatten(1), y)
    with pytest.raises(ConfigurationError, match="cannot be imported"):
        Attack("torchattacks.NoSuchAttack")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_other_precisions_and_accumulation(precision: str) -> None:
    pl.seed_everything(0, verbose=False)
    model, data = Net(), Data()
    data.dataset = TensorDataset(data.dataset.tensors[0].float(), data.dataset.tensors[1])
    callback = MUterCallback(L2Ball(0.5), head="classifier", newton_steps=15)
    options = {**QUIET, "precision": precision, "accumulate_grad_batches": 2}
    trainer = Trainer(max_epochs=2, callbacks=[callback], **options)
    trainer.fit(model, data)
    assert memory_of(callback).summary["residual_gradient"] < 1e-2
    result = trainer.unlearn(RemovalDataModule(data, [1, 2]))
    assert result.status == "converged"
    trainer.unlearn(RemovalDataModule(data, [3]))


@pytest.mark.filterwarnings("ignore:.*torch.compile.*")
@pytest.mark.parametrize("whole", [True, False], ids=["module", "backbone"])
def test_compiled_modules(whole: bool) -> None:
    reference = memory_of(fit()[1])
    pl.seed_everything(0, verbose=False)
    model, data = Net(), Data()
    if whole:
        model.compile(backend="eager")
    else:
        model.backbone = torch.compile(model.backbone, backend="eager")  # type: ignore[assignment]
    callback = MUterCallback(L2Ball(0.5), head="classifier", newton_steps=15)
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    trainer.fit(model, data)
    torch.testing.assert_close(
        memory_of(callback).curvature.matrix, reference.curvature.matrix, rtol=1e-6, atol=1e-6
    )
    result = trainer.unlearn(RemovalDataModule(data, [3, 5]))
    assert result.status == "converged"
    torch.testing.assert_close(model.classifier.weight.flatten(), memory_of(callback).omega[:18])


class Noisy(Dataset[Any]):
    """The same index gives another tensor every time."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(8, dtype=torch.float64), index % 3


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*")
def test_random_augmentation_is_refused() -> None:
    trainer = Trainer(
        max_epochs=1, callbacks=[MUterCallback(L2Ball(0.5), head="classifier")], **QUIET
    )
    with pytest.raises(ConfigurationError, match="random"):
        trainer.fit(Net(), DataLoader(Noisy(), batch_size=4))


@pytest.mark.parametrize(
    "bad",
    [
        {"head": "backbone.0.weight"},
        {"head": "backbone"},
        {"parameters": ["classifier.weight"]},
        {"method": "forget"},
        {"solver": "qr"},
        {"damping": -1.0},
        {"newton_steps": -1},
        {"space": "latent"},
        {"response": "free"},
        {"threat": 0.5},
    ],
)
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        fit(**bad)


def test_a_head_too_large_names_the_estimate() -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(6, 10_000)

    trainer = Trainer(
        max_epochs=1, callbacks=[MUterCallback(L2Ball(0.5), head="classifier")], **QUIET
    )
    with pytest.raises(ConfigurationError, match="p = 70,000 .* 39 GB as a matrix.* sketch=1"):
        trainer.fit(Wide(), Data())


def test_empty_requests_and_a_whole_class() -> None:
    trainer, callback, _, data = fit()
    with pytest.raises(RemovalError, match="empty"):
        RemovalDataModule(data, [])
    whole = torch.nonzero(data.dataset.tensors[1] == 0).flatten().tolist()
    assert trainer.unlearn(RemovalDataModule(data, whole)).status == "converged"
    assert set(memory_of(callback).remaining).isdisjoint(whole)


def test_another_fit_does_not_learn_forgotten_points_again_unasked() -> None:
    trainer, callback, model, data = fit(newton_steps=0, attack_steps=2)
    trainer.unlearn(RemovalDataModule(data, indices=[3, 17]))
    again = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=r"has forgotten 2 points.*overwrite=True"):
        again.fit(model, data)
    assert [entry["indices"] for entry in memory_of(callback).ledger] == [[3, 17]]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    callback.overwrite = True
    again.fit(model, data)
    assert not memory_of(callback).removed.any()


def test_a_callback_after_fit_is_a_value_without_trainer_and_data() -> None:
    trainer, callback, model, data = fit(newton_steps=0, attack_steps=2)
    size = len(pickle.dumps(memory_of(callback)))
    copied = pickle.loads(pickle.dumps(callback))
    assert len(pickle.dumps(callback)) < 2 * size + 10_000
    assert copied.state_dict().keys() == callback.state_dict().keys()
    Trainer(callbacks=[copied], **QUIET).unlearn(
        RemovalDataModule(data, indices=[3]), model=copy.deepcopy(model)
    )
    result = trainer.unlearn(RemovalDataModule(data, indices=[3]))
    assert torch.equal(memory_of(copied).omega, memory_of(callback).omega)
    assert result.indices == (3,)


def test_a_checkpoint_of_an_unlearned_model_is_not_trained_on_unasked(tmp_path: Any) -> None:
    trainer, callback, model, data = fit(newton_steps=0, attack_steps=2)
    trainer.unlearn(RemovalDataModule(data, indices=[3, 17]))
    trainer.save_checkpoint(tmp_path / "unlearned.ckpt")
    options = {"threat": L2Ball(0.5), "head": "classifier", "attack_steps": 2}
    other = Trainer(max_epochs=2, callbacks=[MUterCallback(**options)], **QUIET)
    with pytest.raises(ConfigurationError, match="has forgotten 2 points"):
        other.fit(Net(), data, ckpt_path=tmp_path / "unlearned.ckpt", weights_only=False)
    built = Trainer(callbacks=[MUterCallback(**options)], **QUIET)
    with pytest.raises(ConfigurationError, match="has forgotten 2 points"):
        built.build_memory(Net(), data, ckpt_path=tmp_path / "unlearned.ckpt")
    again = MUterCallback(**options, overwrite=True)
    trainer = Trainer(max_epochs=2, callbacks=[again], **QUIET)
    trainer.fit(Net(), data, ckpt_path=tmp_path / "unlearned.ckpt", weights_only=False)
    assert again.state_dict()["forgotten"] == 0


@pytest.mark.parametrize("horizon", ["training", 0.5])
def test_a_horizon_needs_the_start_of_a_resumed_training(tmp_path: Any, horizon: Any) -> None:
    plain = Trainer(max_epochs=1, **QUIET)
    plain.fit(Net(), Data())
    plain.save_checkpoint(tmp_path / "half.ckpt")
    callback = MUterCallback(L2Ball(0.5), head="classifier", horizon=horizon, attack_steps=2)
    trainer = Trainer(max_epochs=2, callbacks=[callback], **QUIET)
    with pytest.raises(ConfigurationError, match="resumed from a checkpoint without"):
        trainer.fit(Net(), Data(), ckpt_path=tmp_path / "half.ckpt")
