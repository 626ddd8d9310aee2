"""The remaining rows as one reading finds them, against a search of every row by its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import memory_of
from linear_cases import Linear, LinearData, fit_linear
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lightning_muter import (
    ConfigurationError,
    RemovalDataModule,
    RemovalError,
    UnlearningMemory,
)
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.progress import no_bar
from lightning_muter.lightning.remaining import places_of, read_once
from lightning_muter.memory.blocks import BLOCK, block_digest
from lightning_muter.unlearning.points import Batch

N = 2 * BLOCK + 76


@pytest.fixture(scope="module")
def case() -> tuple[UnlearningMemory, Linear, Tensor, Tensor]:
    """A memory, its model, and the inputs and targets of its points."""
    _, callback, model, data = fit_linear(data=LinearData("logistic", n=N))
    return memory_of(callback), model, *data.dataset.tensors


def read(memory: UnlearningMemory, model: Linear, data: Dataset[Any], **more: Any) -> Batch:
    points = TrainingPoints(data, **more)
    return read_once(memory, points, memory.settings.view(model), no_bar)


def reordered(what: str) -> Tensor:
    order = torch.arange(N)
    if what == "shuffled":
        return order[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    if what == "without some that are gone":
        return torch.tensor([i for i in order.tolist() if i not in (3, BLOCK + 1)])
    if what == "two changed places":
        order[[7, BLOCK]] = order[[BLOCK, 7]]
    return order


@pytest.mark.parametrize(
    "what", ["as it was", "shuffled", "without some that are gone", "two changed places"]
)
@pytest.mark.parametrize(
    "gone", [[], [3, BLOCK + 1], [*range(3, 60), BLOCK + 1, N - 1], list(range(3, N - 40))], ids=len
)
def test_every_remaining_point_is_read_and_no_other(
    case: tuple[UnlearningMemory, Linear, Tensor, Tensor], what: str, gone: list[int]
) -> None:
    memory, model, x, y = case
    if what == "without some that are gone" and not gone:
        gone = [3, BLOCK + 1]
    order = reordered(what)
    data = TensorDataset(x[order], y[order])
    batch = read(memory.without(gone), model, data)
    assert batch.indices is not None
    left = sorted(set(range(N)) - set(gone))
    assert sorted(batch.indices.tolist()) == left
    assert torch.equal(batch.x, x[batch.indices].to(batch.x))
    assert torch.equal(batch.targets, y[batch.indices])
    places = places_of(memory.without(gone), TrainingPoints(data), no_bar)
    assert torch.equal(x[order][places[left]], x[left])


def test_equal_rows_are_each_of_one_point(
    case: tuple[UnlearningMemory, Linear, Tensor, Tensor],
) -> None:
    _, _, x, y = case
    x, y = x.clone(), y.clone()
    x[[5, 9, BLOCK + 4]], y[[5, 9, BLOCK + 4]] = x[0].clone(), y[0].clone()
    data = LinearData("logistic", n=N)
    data.dataset = TensorDataset(x, y)
    _, callback, model, _ = fit_linear(data=data)
    memory = memory_of(callback).without([5])
    rows = [i for i in range(N) if i != 9]  # an equal point has to lie where the gone one was
    batch = read(memory, model, TensorDataset(x[rows], y[rows]))
    assert batch.indices is not None
    assert sorted(batch.indices.tolist()) == [i for i in range(N) if i != 5]
    with pytest.raises(RemovalError, match="have no row"):
        rows.remove(BLOCK + 4)
        read(memory, model, TensorDataset(x[rows], y[rows]))


def test_what_was_read_is_no_longer_the_data_sets(
    case: tuple[UnlearningMemory, Linear, Tensor, Tensor],
) -> None:
    memory, model, x, y = case
    data = TensorDataset(x.clone(), y.clone())
    batch = read(memory, model, data)
    for column in data.tensors:
        column.zero_()
    assert torch.equal(batch.x, x.to(batch.x)) and torch.equal(batch.targets, y)
    with pytest.raises(RemovalError, match="have no row"):
        read(memory, model, data)


def test_rows_of_two_shapes_are_refused(
    case: tuple[UnlearningMemory, Linear, Tensor, Tensor],
) -> None:
    memory, model, x, y = case

    def padded(points: list[Any]) -> list[Tensor]:
        wide = torch.stack([one for one, _ in points])
        width = 4 if len(points) == 4 * BLOCK else 1
        return [wide[:, :width], torch.stack([two for _, two in points])]

    with pytest.raises(ConfigurationError, match=r"shape \(4,\) and \(1,\)"):
        data = TensorDataset(torch.cat([x, x, x]), torch.cat([y, y, y]))
        read(memory, model, data, collate=padded)


def test_a_folder_and_a_rebase_keep_digests_of_blocks(tmp_path: Path) -> None:
    trainer, callback, _, data = fit_linear(
        data=LinearData("logistic", n=N), memory_dir=str(tmp_path)
    )
    x, y = data.dataset.tensors

    def expected(memory: UnlearningMemory, left: list[int]) -> list[bytes]:
        parts = [left[first : first + BLOCK] for first in range(0, len(left), BLOCK)]
        return [block_digest(memory.key, x[some], y[some]) for some in parts]

    def kept(memory: UnlearningMemory) -> list[bytes]:
        assert memory.blocks is not None
        return [bytes(row) for row in memory.blocks.tolist()]

    memory = memory_of(callback)
    assert kept(memory) == expected(memory, list(range(N)))
    assert kept(UnlearningMemory.load(tmp_path)) == kept(memory)
    trainer.unlearn(RemovalDataModule(data, [4, 600]))
    trainer.rebase(data)
    after = memory_of(callback)
    assert after.key != memory.key
    assert kept(after) == expected(after, [i for i in range(N) if i not in (4, 600)])
    assert kept(UnlearningMemory.load(tmp_path)) == kept(after)
