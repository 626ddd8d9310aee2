"""The points: those of the data set, with the weights that training gives them, or an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET, Data, Net
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from training import train

from lightning_muter import (
    ConfigurationError,
    L2Ball,
    MUterCallback,
    Trainer,
)

N = 41


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Data().dataset, **{"batch_size": 16, **options})


class Transferred(Net):
    """A transform on the device, for training alone."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]]


class Mixed(pl.Callback):
    """A callback that mixes the points of a batch."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        batch[0] = 0.5 * (batch[0] + batch[0].flip(0))


def _noisy(samples: list[Any]) -> list[Tensor]:
    x, y = torch.utils.data.default_collate(samples)
    return [x + 0.1 * len(x), y]  # another point in a batch than alone


@pytest.mark.parametrize("how", ["transfer", "callback", "collate", "targets"])
def test_points_that_the_data_set_does_not_hold_are_refused_at_the_first_batch(how: str) -> None:
    model, points, before = Net(), loader(), []
    if how == "transfer":
        model = Transferred()
    elif how == "callback":
        before = [Mixed()]
    elif how == "collate":
        points = loader(collate_fn=_noisy)
    else:
        model.on_after_batch_transfer = lambda b, _: [b[0], (b[1] + 1) % 3]  # type: ignore
    with pytest.raises(ConfigurationError, match="not what the data set holds"):
        train(model, points, before)
    assert model.trainer.global_step == 0


def test_a_batch_that_changes_after_the_attack_is_another_loss() -> None:
    with pytest.raises(ConfigurationError, match="relative difference"):
        train(Net(), loader(), after=[Mixed()])


def test_every_point_equally_often_weighs_one() -> None:
    for options in ({}, {"shuffle": True}, {"sampler": RandomSampler(range(N), True)}):
        points = loader(**{"batch_size": N, **options})
        callback = train(loader=points, trainer={"max_epochs": 12})
        assert torch.equal(callback.point_weights, torch.ones(N).double())
    twice = [*range(N), *range(N)]
    assert bool((train(loader=loader(sampler=twice)).point_weights == 1).all())


@pytest.mark.parametrize(
    "case",
    [
        (loader(sampler=SubsetRandomSampler(range(20))), {"max_epochs": 3}, range(20)),
        (loader(drop_last=True), {"max_epochs": 3}, range(32)),
        (loader(), {"max_epochs": 3, "limit_train_batches": 1}, range(16)),
        (loader(), {"max_epochs": 3, "max_steps": 2}, range(32)),
        (loader(sampler=WeightedRandomSampler([1.0] * 20 + [0] * 21, 99)), {}, range(20)),
    ],
)
def test_points_never_trained_on_weigh_nothing(case: Any) -> None:
    points, options, seen = case
    callback = train(loader=points, trainer=options)
    assert torch.nonzero(callback.point_weights).flatten().tolist() == list(seen)


def test_a_point_that_is_dropped_in_one_epoch_is_seen_in_another() -> None:
    points = loader(drop_last=True, shuffle=True)
    callback = train(loader=points, trainer={"max_epochs": 12})
    assert bool((callback.point_weights == 1).all())


@pytest.mark.parametrize("inside", ["sampler", "batch_sampler"])
def test_a_weighted_sampler_s_weights_are_the_objective_s(inside: str) -> None:
    frequencies = torch.arange(N) % 2 * 9.0 + 1
    sampler = WeightedRandomSampler(frequencies, 10 * N)
    points = loader(sampler=sampler)
    if inside == "batch_sampler":
        batches = BatchSampler(sampler, 16, drop_last=False)
        points = DataLoader(Data().dataset, batch_sampler=batches)
    callback = train(loader=points, trainer={"max_epochs": 3})
    expected = N * frequencies.double() / frequencies.sum()
    torch.testing.assert_close(callback.point_weights, expected)


def test_a_weighted_sampler_without_replacement_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="replacement=False"):
        train(loader=loader(sampler=WeightedRandomSampler(torch.ones(N), 20, replacement=False)))


class Twice(Sampler[int]):
    """Draws the first points twice."""

    def __len__(self) -> int:
        return N + 10

    def __iter__(self) -> Any:
        return iter([*range(N), *range(10)])


class Own(WeightedRandomSampler):
    """Draws by a rule of its own."""

    def __iter__(self) -> Any:
        return iter([0] * 10 + list(range(N)))


@pytest.mark.parametrize("sampler", [Twice(), Own(torch.ones(N).tolist(), N)])
def test_unequal_counts_are_refused_with_the_numbers(sampler: Any) -> None:
    model = Net()
    with pytest.raises(ConfigurationError, match="unequally.*points 1 times.*WeightedRandom"):
        train(model, loader(sampler=sampler), trainer={"max_epochs": 4})
    assert model.trainer.current_epoch == 0


def test_points_of_equal_content_are_counted_together() -> None:
    x, y = Data().dataset.tensors
    x, y = torch.cat([x, x[:5]]), torch.cat([y, y[:5]])
    points = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    assert bool((train(loader=points).point_weights == 1).all())
    points = DataLoader(TensorDataset(x, y), batch_size=16, sampler=SubsetRandomSampler(range(N)))
    assert float(train(loader=points).point_weights.sum()) == N


def test_a_resumed_run_knows_what_was_seen_before(tmp_path: Any) -> None:
    first = range(20)
    model = Net()
    train(model, loader(sampler=SubsetRandomSampler(first)))
    model.trainer.save_checkpoint(tmp_path / "first.ckpt")
    callback = MUterCallback(L2Ball(0.1), head="classifier", attack_steps=2, method="none")
    trainer = Trainer(max_epochs=2, callbacks=[callback], **QUIET)
    trainer.fit(
        Net(),
        loader(sampler=SubsetRandomSampler(range(20, 30))),
        ckpt_path=str(tmp_path / "first.ckpt"),
    )
    assert torch.nonzero(callback.point_weights).flatten().tolist() == list(range(30))


class Curriculum(Sampler[int]):
    """All points in the first epoch, the first ones alone in all later ones."""

    def __init__(self, first: int) -> None:
        self.first, self.epoch = first, 0

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Any:
        self.epoch += 1
        return iter(range(N if self.epoch == 1 else self.first))


def test_points_that_later_epochs_leave_out_are_refused() -> None:
    model = Net()
    with pytest.raises(ConfigurationError, match="unequally often over"):
        train(model, loader(sampler=Curriculum(10)), trainer={"max_epochs": 8})
    assert model.trainer.current_epoch <= 3


def test_random_shares_of_each_epoch_are_even() -> None:
    points = loader(shuffle=True)
    options = {"max_epochs": 25, "limit_train_batches": 2, "precision": "64-true"}
    callback = train(loader=points, trainer=options)
    assert bool((callback.point_weights == 1).all())


@pytest.mark.filterwarnings("ignore:.*IterableDataset.*")
def test_a_data_set_that_only_iterates_is_refused_though_it_has_a_length() -> None:
    class Stream(IterableDataset[Any]):
        def __len__(self) -> int:
            return 8

        def __iter__(self) -> Iterator[Any]:
            return iter([(torch.ones(8).double(), torch.tensor(1))] * 8)

    with pytest.raises(ConfigurationError, match="Stream has no length or no index"):
        train(loader=DataLoader(Stream(), batch_size=4))
