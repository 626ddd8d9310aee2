"""A library's attack against the threat that the memory is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    AdversarialTraining,
    Attack,
    ConfigurationError,
    L2Ball,
    LinfBall,
    MUterCallback,
    Threat,
    Trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*")


class Pictures(pl.LightningModule):
    """A linear model of pictures 1 x 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-2)


def pictures() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(24, 1, 4, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.3
    return DataLoader(TensorDataset(x, torch.arange(24) % 3), batch_size=8)


def attacked(threat: Threat, name: str, strict: bool = True, **arguments: Any) -> MUterCallback:
    pl.seed_everything(0, verbose=False)
    attack = Attack(f"torchattacks.{name}", init_args=arguments)
    callback = MUterCallback(threat, head="head", attack=attack, method="none", strict=strict)
    Trainer(max_epochs=2, callbacks=[callback], **QUIET).fit(Pictures(), pictures())
    return callback


@pytest.mark.parametrize(
    ("threat", "name", "arguments"),
    [
        (L2Ball(0.2), "PGDL2", {"eps": 0.2}),
        (LinfBall(0.1), "PGD", {"eps": 0.1}),
        (LinfBall(0.1, data_range=(0, 1)), "FGSM", {"eps": 0.1}),
    ],
)
def test_an_attack_of_the_threats_own_size_trains(
    threat: Threat, name: str, arguments: dict[str, Any]
) -> None:
    assert attacked(threat, name, **arguments).memory is not None


@pytest.mark.parametrize(
    ("threat", "name", "arguments", "match"),
    [
        (L2Ball(0.2), "PGDL2", {"eps": 1.0}, "moves points out of the threat's set"),
        (L2Ball(0.2), "PGD", {"eps": 0.2}, "moves points out of the threat's set"),
        (L2Ball(0.2), "GN", {"std": 0.2}, "moves points out of the threat's set"),
        (LinfBall(0.1), "PGD", {"eps": 0.3}, "moves points out of the threat's set"),
        (L2Ball(0.2), "PGDL2", {"eps": 0.02, "alpha": 0.01}, "never moved .*: at the most 0.1 "),
        (L2Ball(0.2), "VANILA", {}, "never moved .*: at the most 0 times"),
    ],
)
def test_an_attack_of_another_size_or_norm_is_refused(
    threat: Threat, name: str, arguments: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigurationError, match=match):
        attacked(threat, name, **arguments)
    with pytest.warns(UserWarning, match=match):
        callback = attacked(threat, name, strict=False, **arguments)
    assert len(callback.findings) == 1


def test_an_attack_of_another_size_measures_nothing_either() -> None:
    attack = Attack("torchattacks.PGDL2", init_args={"eps": 1.0})
    trainer = Trainer(callbacks=[AdversarialTraining(L2Ball(0.2), attack=attack)], **QUIET)
    with pytest.raises(ConfigurationError, match="moves points out of the threat's set"):
        trainer.validate(Pictures(), pictures(), verbose=False)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AdversarialTraining(L2Ball(0.2), attack=lambda m, x, y: x), "must be an Attack"),
        (lambda: attacked(L2Ball(0.2), "PGDL2", size=1.0), "cannot be made with init_args"),
    ],
)
def test_what_is_no_attack_is_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        make()


def test_points_and_labels_that_cannot_be_measured_are_refused() -> None:
    callback = AdversarialTraining(L2Ball(0.2))
    for change, match in ((torch.nan, "NaN or infinite"), (None, "integer classes 0 to 2")):
        x, y = (tensor.clone() for tensor in pictures().dataset.tensors)
        if change is None:
            y[0] = 7
        else:
            x[20] = change
        loader = DataLoader(TensorDataset(x, y), batch_size=8)
        trainer = Trainer(callbacks=[callback], **QUIET)
        with pytest.raises(ConfigurationError, match=match):
            trainer.validate(Pictures(), loader, verbose=False)
