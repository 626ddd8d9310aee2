"""An exception anywhere in fit: the module is as it was; the trained model is not lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET, Data, Net, fit, memory_of
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_muter import (
    ConfigurationError,
    L2Ball,
    MUterCallback,
    MuterError,
    RemovalDataModule,
    Trainer,
    UnlearningMemory,
)
from lightning_muter.lightning import after_training
from lightning_muter.lightning.kept_state import KeptState
from lightning_muter.lightning.preflight import Preflight
from lightning_muter.lightning.rescue import Rescue
from lightning_muter.unlearning.representation import Representation

pytestmark = pytest.mark.filterwarnings("ignore:.*module.s. in eval mode at the start.*")


class Broken(Exception):
    """What the tests raise."""


class Places(Net):
    """A network with a module in eval mode and a frozen parameter, which raises at one hook."""

    def __init__(self, place: str = "", error: BaseException | None = None) -> None:
        super().__init__()
        self.backbone[1].eval()
        self.backbone[0].bias.requires_grad_(False)
        self.place, self.error = place, error or Broken("boom")

    def at(self, place: str) -> None:
        if self.place == place:
            raise self.error

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 1:
            self.at("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.at("validation_step" if not self.trainer.sanity_checking else "sanity_step")

    def setup(self, stage: str) -> None:
        self.at("setup")

    def on_fit_start(self) -> None:
        self.at("on_fit_start")

    def on_train_start(self) -> None:
        self.at("on_train_start")

    def on_train_epoch_start(self) -> None:
        self.at("on_train_epoch_start")

    def on_after_backward(self) -> None:
        self.at("on_after_backward")

    def on_train_epoch_end(self) -> None:
        self.at("on_train_epoch_end")

    def on_train_end(self) -> None:
        self.at("on_train_end")

    def on_fit_end(self) -> None:
        self.at("on_fit_end")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.at("configure_optimizers")
        return super().configure_optimizers()

    def train_dataloader(self) -> DataLoader[Any]:
        self.at("train_dataloader")
        return Data().train_dataloader()

    def val_dataloader(self) -> DataLoader[Any]:
        return Data().test_dataloader()


PLACES = [
    *("setup", "configure_optimizers", "on_fit_start", "sanity_step", "train_dataloader"),
    *("on_train_start", "on_train_epoch_start", "training_step", "on_after_backward"),
    *("validation_step", "on_train_epoch_end", "on_train_end", "on_fit_end"),
    *("attack", "newton", "stage_one", "callback_setup", "callback_start"),
]


def state_of(model: pl.LightningModule) -> list[Any]:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    return [flags, [m.training for m in model.modules()], hooks]


def boom(*args: Any, **options: Any) -> Any:
    raise Broken("boom")


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_leaves_flags_modes_and_hooks(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = Places(place)
    callback = MUterCallback(
        L2Ball(0.5), head="classifier", newton_steps=2 if place == "newton" else 0
    )
    before = state_of(model)
    if place == "attack":
        monkeypatch.setattr(callback, "perturb", boom)
    if place == "newton":
        monkeypatch.setattr(after_training, "newton", boom)
    if place == "stage_one":
        monkeypatch.setattr(after_training, "build_memories", boom)
    if place == "callback_setup":
        monkeypatch.setattr(KeptState, "train_only", _half_way)
    if place == "callback_start":
        monkeypatch.setattr(after_training, "rehearse", boom)
    trainer = Trainer(max_epochs=1, callbacks=[callback], default_root_dir=str(tmp_path), **QUIET)
    with pytest.raises((Broken, MuterError)):
        trainer.fit(model)
    assert state_of(model) == before
    assert callback.memory is None or place in ("on_train_end", "on_fit_end")
    monkeypatch.undo()
    model.place = ""  # the same callback and model can go on
    Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(model)
    assert state_of(model) == before and callback.memory is not None


_train_only = KeptState.train_only


def _half_way(self: Any, module: Any, trained: Any) -> None:
    _train_only(self, module, trained)
    raise Broken("boom")


def test_a_keyboard_interrupt_leaves_the_flags() -> None:
    model = Places("training_step", KeyboardInterrupt())
    before = state_of(model)
    handler = signal.getsignal(signal.SIGINT)
    trainer = Trainer(
        max_epochs=1, callbacks=[MUterCallback(L2Ball(0.5), head="classifier")], **QUIET
    )
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(model)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert state_of(model) == before


def test_a_fit_that_ends_well_leaves_flags_and_modes() -> None:
    model = Places()
    before = state_of(model)
    callback = MUterCallback(L2Ball(0.5), head="classifier")
    Trainer(max_epochs=2, callbacks=[callback], **QUIET).fit(model)
    assert state_of(model) == before


def test_a_later_exception_elsewhere_changes_no_mode() -> None:
    trainer, _, model, data = fit()
    model.eval()
    model.test_step = boom  # type: ignore[method-assign]
    with pytest.raises(Broken):
        trainer.test(model, data, verbose=False)
    assert not any(m.training for m in model.modules())


class Unfreezes(pl.Callback):
    """Another callback's flag, set in the middle of a fit."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.backbone[0].bias.requires_grad_(True)


def test_flags_of_other_callbacks_stay() -> None:
    model = Places()
    callbacks = [MUterCallback(L2Ball(0.5), head="classifier"), Unfreezes()]
    Trainer(max_epochs=1, callbacks=callbacks, **QUIET).fit(model)
    assert all(p.requires_grad for p in model.parameters())


# --- Stage I fails after training -------------------------------------------------------------


class Counted(Net):
    """Remembers the head that each step of training ended with."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.last = self.classifier.weight.detach().clone()


def weights_in(path: Path) -> Tensor:
    loaded = torch.load(path, weights_only=False)
    return loaded["state_dict"]["classifier.weight"]


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("what", ["newton", "build_memories"])
def test_the_trained_model_is_saved_where_stage_one_fails(
    folder: bool, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def half_way(target: Any, *args: Any) -> Any:
        if what == "newton":
            target.view.set(torch.zeros(target.view.p))
        raise Broken("the kernel has no double backward")

    monkeypatch.setattr(after_training, what, half_way)
    model, root = Counted(), tmp_path / "root"
    memory_dir = str(tmp_path / "memory") if folder else None
    callback = MUterCallback(
        L2Ball(0.5),
        head="classifier",
        memory_dir=memory_dir,
        newton_steps=3 if what == "newton" else 0,
    )
    trainer = Trainer(max_epochs=1, callbacks=[callback], default_root_dir=str(root), **QUIET)
    with pytest.raises(MuterError, match="trained model is in .*nothing has to be") as caught:
        trainer.fit(model, Data())
    assert isinstance(caught.value.__cause__, Broken) and "double backward" in str(caught.value)
    (path,) = [*tmp_path.rglob("*.ckpt")]
    assert str(path) in str(caught.value)
    if folder:
        assert path == tmp_path / "memory" / "model.ckpt"
    torch.testing.assert_close(weights_in(path), model.last, rtol=0, atol=0)
    torch.testing.assert_close(model.classifier.weight.detach(), model.last, rtol=0, atol=0)


def test_an_older_model_beside_a_memory_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = str(tmp_path / "memory")
    fit(memory_dir=folder)
    before = (tmp_path / "memory" / "model.ckpt").read_bytes()
    monkeypatch.setattr(after_training, "build_memories", boom)
    callback = MUterCallback(L2Ball(0.5), head="classifier", memory_dir=folder, overwrite=True)
    root = tmp_path / "root"
    trainer = Trainer(max_epochs=1, callbacks=[callback], default_root_dir=str(root), **QUIET)
    with pytest.raises(MuterError, match="root.*muter-trained"):
        trainer.fit(Net(), Data())
    assert (tmp_path / "memory" / "model.ckpt").read_bytes() == before
    UnlearningMemory.load(folder)


def test_a_success_leaves_no_spare_model(tmp_path: Path) -> None:
    for folder in (None, str(tmp_path / "memory"), str(tmp_path / "memory")):
        callback = MUterCallback(L2Ball(0.5), head="classifier", memory_dir=folder, overwrite=True)
        trainer = Trainer(
            max_epochs=1, callbacks=[callback], default_root_dir=str(tmp_path), **QUIET
        )
        trainer.fit(Net(), Data())
    assert [p.name for p in tmp_path.rglob("*.ckpt")] == ["model.ckpt"]


def test_an_interrupt_in_stage_one_goes_on_as_it_is_with_the_model_saved(tmp_path: Path) -> None:
    trainer = Trainer(
        max_epochs=1,
        callbacks=[MUterCallback(L2Ball(0.5), head="classifier")],
        default_root_dir=str(tmp_path),
        **QUIET,
    )
    trainer.fit(Net(), Data())
    rescue = Rescue(trainer, None)
    with pytest.raises(KeyboardInterrupt), rescue.guarding("Stage I"):
        raise KeyboardInterrupt
    assert rescue.path.exists() and rescue.path.parent == tmp_path


class Terminated(Dataset[Any]):
    """SIGTERM arrives when a point is read after training."""

    def __init__(self) -> None:
        self.points, self.trained = Data().dataset, False

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if self.trained and index == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.points[index]


@pytest.mark.parametrize("newton_steps", [0, 2])
def test_sigterm_ends_stage_one(newton_steps: int, tmp_path: Path) -> None:
    dataset = Terminated()

    class Last(Counted):
        def on_train_epoch_end(self) -> None:
            dataset.trained = True

    model = Last()
    callback = MUterCallback(
        L2Ball(0.5), head="classifier", batch_size=8, newton_steps=newton_steps
    )
    trainer = Trainer(max_epochs=1, callbacks=[callback], default_root_dir=str(tmp_path), **QUIET)
    with pytest.raises(MuterError, match="SIGTERM .*trained model is in"):
        trainer.fit(model, DataLoader(dataset, batch_size=16))
    (path,) = [*tmp_path.rglob("*.ckpt")]
    torch.testing.assert_close(weights_in(path), model.last, rtol=0, atol=0)
    assert callback.memory is None


# --- the rest ---------------------------------------------------------------------------------


def test_fast_dev_run_writes_no_memory(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    callback = MUterCallback(L2Ball(0.5), head="classifier", memory_dir=str(folder))
    trainer = Trainer(fast_dev_run=True, callbacks=[callback], **QUIET)
    model, data = Net(), Data()
    trainer.fit(model, data)
    assert memory_of(callback).n == 41
    seen = memory_of(callback).remaining  # one batch alone was trained on
    assert 0 < len(seen) < 41
    trainer.unlearn(RemovalDataModule(data, seen[:1]), model)
    assert not folder.exists() and memory_of(callback).ledger


def test_an_expensive_pass_goes_in_pieces() -> None:
    slow = Preflight(0.0, 0.3, 0.5, dear=True)
    assert slow.piece(512) == 256 and slow.piece(2) == 2
    assert Preflight(0.0, 60.0, 0.5, dear=True).piece(512) == 256
    assert Preflight(0.01, 0.1, 0.5).piece(512) == 512
    settings = MUterCallback(L2Ball(0.5), head="classifier").settings
    kept = Representation(settings, 8 * 512**2, 8 * 512**2, "dense", None)
    cost = slow.cost(120, 512, 4, 0, kept, torch.device("cpu"))
    assert 30 < cost.stage_one_seconds < 60 and "120 points" in str(cost)


def test_two_processes_keep_the_model_before_the_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process that failed cannot wait for the others: the model is there before."""
    trainer = Trainer(
        max_epochs=1,
        callbacks=[MUterCallback(L2Ball(0.5), head="classifier")],
        default_root_dir=str(tmp_path),
        **QUIET,
    )
    trainer.fit(Net(), Data())
    monkeypatch.setattr(type(trainer), "world_size", 2)
    rescue = Rescue(trainer, None)
    rescue.keep()
    assert rescue.path.exists()
    rescue.done()
    assert not rescue.path.exists()


def test_data_that_is_not_finite_is_refused_before_training(tmp_path: Path) -> None:
    x, y = Data().dataset.tensors
    x[0, 0] = torch.inf
    callback = MUterCallback(L2Ball(0.5), head="classifier", memory_dir=str(tmp_path / "m"))
    with pytest.raises(ConfigurationError, match="NaN or infinite"):
        Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(
            Net(), DataLoader(TensorDataset(x, y), batch_size=16)
        )
    assert not (tmp_path / "m").exists()
