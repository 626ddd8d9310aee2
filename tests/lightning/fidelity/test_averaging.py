"""Averaged weights: an average over the flow, beside a Retrain that is averaged alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET, memory_of
from pytorch_lightning.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    ConfigurationError,
    L2Ball,
    MUterCallback,
    RemovalDataModule,
    Trainer,
    UnlearningMemory,
)

averaging: Any = getattr(pl.callbacks, "WeightAveraging", None)
pytestmark = [
    pytest.mark.skipif(averaging is None, reason="Lightning has no WeightAveraging"),
    pytest.mark.filterwarnings("ignore:.*swa.*|.*Swapping.*|.*log_every_n_steps.*|.*many workers"),
]
N, EPOCHS = 40, 60
GONE = [3, 11]


class Ridge(pl.LightningModule):
    """A linear map of a frozen one, whose robust loss at a tiny radius is quadratic."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 0.5 * (self(batch[0]).squeeze(1) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), self.lr, weight_decay=1e-2)


def points(gone: list[int] | None = None) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]).double() + 0.3 * x[:, 0] ** 2
    keep = [i for i in range(N) if i not in (gone or [])]
    return TensorDataset(x[keep], y[keep])


class Late(averaging or object):  # type: ignore[misc]
    """An average over the epochs of the second half."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None and epoch_idx >= EPOCHS // 2


MAKERS: dict[str, Callable[[], pl.Callback]] = {
    "even": lambda: averaging(),
    "EMA": lambda: averaging(avg_fn=get_ema_avg_fn(0.95)),
    "EMA of all at once": lambda: averaging(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "epochs": lambda: Late(),
    "stochastic": lambda: StochasticWeightAveraging(0.02, EPOCHS // 2, annealing_epochs=5),
}


def run(
    make: Callable[[], pl.Callback] | None, gone: list[int] | None = None, **options: Any
) -> tuple[Trainer, MUterCallback, Ridge]:
    """Full batches, of which a Retrain takes as many."""
    torch.manual_seed(0)
    model = Ridge(0.02).double()
    callback = MUterCallback(
        L2Ball(1e-7), head="head", loss="squared", horizon="training", **options
    )
    made = [] if make is None else [make()]
    trainer = Trainer(max_epochs=EPOCHS, callbacks=[*made, callback], **QUIET)
    data = points(gone)
    trainer.fit(model, DataLoader(data, batch_size=len(data)))
    return trainer, callback, model


@pytest.mark.parametrize("name", MAKERS)
def test_a_request_ends_at_the_averaged_retrain(name: str, tmp_path: Path) -> None:
    trainer, callback, _ = run(MAKERS[name], memory_dir=str(tmp_path))
    memory = memory_of(callback)
    assert memory.summary["retrace_error"] < 0.02
    before, truth = memory.omega, memory_of(run(MAKERS[name], GONE)[1]).omega
    last = memory_of(run(None, method="none")[1]).omega
    none = float((before - truth).norm())
    assert float((before - last).norm()) > 2 * none  # the average is not the last weights
    trainer.unlearn(RemovalDataModule(points(), indices=GONE))
    assert float((memory_of(callback).omega - truth).norm()) < 0.05 * none
    found = UnlearningMemory.load(tmp_path)
    assert found.start is not None and memory.start is not None
    assert found.start.flow == memory.start.flow and found.start.flow.pace == "steps"


def test_a_checkpoint_of_averaged_weights_has_the_horizon_of_its_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Ridge(0.02).double()
    callback = MUterCallback(
        L2Ball(1e-7), head="head", loss="squared", horizon="training", weight_decay=1e-2
    )
    saving = ModelCheckpoint(tmp_path, save_last=True)
    settings = {
        **QUIET,
        "enable_checkpointing": True,
        "callbacks": [MAKERS["EMA"](), callback, saving],
    }
    trainer = Trainer(max_epochs=EPOCHS, **settings)
    trainer.fit(model, DataLoader(points(), batch_size=N))
    whole = memory_of(callback)
    with pytest.warns(UserWarning, match="of a model that was trained already"):
        found = trainer.build_memory(model, points(), tmp_path / "last.ckpt")
    assert found.start is not None and whole.start is not None
    torch.testing.assert_close(found.omega, whole.omega)
    torch.testing.assert_close(found.start.retraced, whole.start.retraced)
    assert found.start.flow.pace == "steps"
    # and where nothing followed the average, there is no horizon
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for one in state["callbacks"].values():
        one.pop("average", None)
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(ConfigurationError, match="did not follow the average"):
        trainer.build_memory(model, points(), tmp_path / "other.ckpt")


def test_an_average_that_never_began_is_refused() -> None:
    class Never(averaging):  # type: ignore[misc]
        def should_update(self, **when: Any) -> bool:
            return False

    with pytest.raises(ConfigurationError, match="averaged nothing"):
        run(Never)


def test_an_average_by_a_rule_of_its_own_is_refused() -> None:
    def largest(old: Tensor, new: Tensor, count: Tensor) -> Tensor:
        return torch.maximum(old, new)

    with pytest.raises(ConfigurationError, match="away from the average"):
        run(lambda: averaging(avg_fn=largest))


def test_a_run_that_is_resumed_has_the_same_average(tmp_path: Path) -> None:
    whole = memory_of(run(MAKERS["EMA"])[1])

    def part(epochs: int, ckpt: str | None) -> MUterCallback:
        torch.manual_seed(0)
        callback = MUterCallback(L2Ball(1e-7), head="head", loss="squared", horizon="training")
        saving = ModelCheckpoint(tmp_path, save_last=True)
        settings = {**QUIET, "enable_checkpointing": True}
        callbacks = [MAKERS["EMA"](), callback, saving]
        trainer = Trainer(max_epochs=epochs, callbacks=callbacks, **settings)
        loader = DataLoader(points(), batch_size=N)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(Ridge(0.02).double(), loader, ckpt_path=ckpt)
        return callback

    part(EPOCHS // 2, None)
    memory = memory_of(part(EPOCHS, str(tmp_path / "last.ckpt")))
    torch.testing.assert_close(memory.omega, whole.omega)
    assert memory.settings.horizon == pytest.approx(whole.settings.horizon)
    assert memory.start is not None and whole.start is not None
    torch.testing.assert_close(memory.start.retraced, whole.start.retraced)
