"""The contents of the training points: read once before training, and not others at its end."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET, Data, Net
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from training import train

from lightning_muter import ConfigurationError, RemovalDataModule, Trainer
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.fidelity.contents import Contents, contents_of
from lightning_muter.memory.blocks import block_digest
from lightning_muter.memory.points import digests_of
from lightning_muter.models import BatchForm, Beside

N = 600  # two blocks


def read(x: Tensor, y: Tensor, precision: str = "64-true") -> tuple[Contents, TrainingPoints, Any]:
    seen: list[tuple[Tensor, Tensor, Beside]] = []
    points = TrainingPoints(TensorDataset(x, y), None, BatchForm())
    trainer = Trainer(**{**QUIET, "precision": precision})
    found = contents_of(trainer, points, lambda t: t, lambda *block: seen.append(block))
    return found, points, seen


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (N,), generator=generator)


def test_a_digest_a_point_and_a_block_and_each_block_is_checked_once() -> None:
    x, y = data()
    found, _, seen = read(x, y)
    assert [bytes(row) for row in found.digests.tolist()] == digests_of(found.key, x, y)
    assert found.received == digests_of(found.key, x, y)
    own = [block_digest(found.key, x[some], y[some]) for some in (slice(512), slice(512, N))]
    assert [bytes(row) for row in found.blocks.tolist()] == own
    assert torch.equal(torch.cat([one[0] for one in seen]), x)
    assert torch.equal(torch.cat([one[1] for one in seen]), y)


def test_what_the_module_receives_is_rounded_to_its_precision() -> None:
    x, y = data()
    found, _, seen = read(x, y, "bf16-true")
    assert [bytes(row) for row in found.digests.tolist()] == digests_of(found.key, x, y)
    assert found.received == digests_of(found.key, x.bfloat16(), y)
    assert seen[0][0].dtype == torch.bfloat16


def test_some_points_are_read_again() -> None:
    x, y = data()
    found, points, _ = read(x, y)
    found.check_unchanged(points)
    y[-1] += 1
    with pytest.raises(ConfigurationError, match=rf"points \[{N - 1}\] are not what they were"):
        found.check_unchanged(points)


def test_a_data_set_that_changes_while_training_is_refused() -> None:
    points = DataLoader(Data().dataset, batch_size=16)

    class Change(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            points.dataset.tensors[0].add_(1.0)

    with pytest.raises(ConfigurationError, match="not what they were when training began"):
        train(loader=points, before=[Change()])


def test_single_precision_data_in_a_double_precision_module() -> None:
    x, y = Data().dataset.tensors
    data = TensorDataset(x.float(), y)
    pl.seed_everything(0, verbose=False)
    model = Net()
    callback = train(
        model, DataLoader(data, batch_size=16), method="muter", newton_steps=15, weight_decay=0.1
    )
    exact = train(
        loader=DataLoader(TensorDataset(x.float().double(), y), batch_size=16),
        method="muter",
        newton_steps=15,
        weight_decay=0.1,
    )
    torch.testing.assert_close(callback.memory.curvature.matrix, exact.memory.curvature.matrix)
    assert bool((callback.point_weights == 1).all())
    trainer = model.trainer
    result = trainer.unlearn(RemovalDataModule(data, [3, 5]), bound=True)
    assert result.status == "converged" and result.bound is not None
    later = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    doubles = TensorDataset(x.float().double(), y)  # the same values
    later.unlearn(RemovalDataModule(doubles, [7]), model=model, memory=callback.memory)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 5, 23, 38])
def test_a_point_that_is_no_number_is_named_wherever_it_lies(where: int, value: float) -> None:
    data = Data()
    data.dataset.tensors[0][where, 2] = value
    with pytest.raises(ConfigurationError, match=rf"points \[{where}\] have NaN or infinite"):
        train(loader=data)
