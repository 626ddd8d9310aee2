"""Rows through Lightning: fit, requests by index alone, folder, rebase."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import QUIET, Data, Net, fit, memory_of

from lightning_muter import (
    ConfigurationError,
    RemovalDataModule,
    RemovalError,
    Rows,
    Trainer,
    UnlearningMemory,
)
from lightning_muter.curvature.rows import RowsCurvature

TIGHT = Rows(tol=1e-12)


def test_a_list_of_indices_is_a_request_and_needs_no_data(tmp_path: Path) -> None:
    dense_trainer, dense, dense_model, data = fit(sketch=200)
    trainer, callback, model, _ = fit(
        sketch=200, representation=TIGHT, memory_dir=str(tmp_path / "memory")
    )
    assert isinstance(memory_of(callback).curvature, RowsCurvature)
    torch.testing.assert_close(memory_of(callback).omega, memory_of(dense).omega)
    by_point = dense_trainer.unlearn(RemovalDataModule(data, [3, 17]))
    by_index = trainer.unlearn([3, 17])
    assert by_index.indices == by_point.indices == (3, 17) and by_index.status == "converged"
    assert by_index.residual <= by_index.residual_asked == 1e-12 and by_point.residual_asked is None
    assert by_index.stationary == by_point.stationary == 1.0
    torch.testing.assert_close(by_index.active, by_point.active)
    step = memory_of(dense).omega - memory_of(dense).omega_star
    found = memory_of(callback).omega - memory_of(callback).omega_star
    assert float((found - step).norm() / step.norm()) < 1e-8
    with pytest.raises(RemovalError, match="forgotten already"):
        trainer.unlearn([3])
    repeated = trainer.unlearn([3, 4], already="skip")
    assert repeated.indices == (4,) and repeated.already == (3,)
    # another process, without the data and without the callback
    other = Net().double()
    other.load_state_dict(model.state_dict())
    Trainer(**QUIET).unlearn([20], model=other, memory=tmp_path / "memory")
    dense_trainer.unlearn(RemovalDataModule(data, [4]))
    dense_trainer.unlearn(RemovalDataModule(data, [20]))
    torch.testing.assert_close(
        other.classifier.weight, dense_model.classifier.weight, rtol=1e-8, atol=1e-10
    )
    loaded = UnlearningMemory.load(tmp_path / "memory")
    assert isinstance(loaded.curvature, RowsCurvature) and loaded.curvature.points == 37
    assert loaded.ledger[-1]["residual_asked"] == 1e-12
    with pytest.raises(RemovalError, match="out of range"):
        trainer.unlearn([41])


def test_a_rebase_of_rows_goes_by_the_remaining_points(tmp_path: Path) -> None:
    trainer, callback, model, data = fit(
        sketch=40, representation=TIGHT, memory_dir=str(tmp_path / "memory")
    )
    trainer.unlearn([0, 7])
    trainer.rebase(data)
    rows = memory_of(callback).curvature
    assert isinstance(rows, RowsCurvature)
    assert rows.blocks[0].facts.indices.tolist() == list(range(39))
    x = data.dataset.tensors[0]
    left = torch.tensor([i for i in range(41) if i not in (0, 7)])
    with torch.no_grad():
        features = model.eval().backbone(x[left])
    near = torch.cdist(rows.blocks[0].points.features[:, :6], features).argmin(dim=1)
    assert near.tolist() == list(range(39))  # a row is that of the point of its number
    trainer.unlearn([38])
    assert memory_of(callback).remaining == list(range(38))


def test_what_rows_cannot_keep_is_refused_before_training() -> None:
    with pytest.raises(ConfigurationError, match="sketch=1 or more"):
        fit(representation="rows")
    with pytest.raises(ConfigurationError, match="linear head"):
        fit(representation="rows", head=None, parameters=["classifier.weight"])
    with pytest.raises(ConfigurationError, match="must be one of"):
        fit(representation="columns")
    with pytest.raises(ConfigurationError, match="solver_tol=2.0"):
        fit(representation=Rows(tol=2.0))
    trainer, _, _, _ = fit()
    with pytest.raises(RemovalError, match="representation='rows'"):
        trainer.unlearn([3])


def test_auto_takes_rows_where_a_matrix_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_muter.unlearning import representation

    room = {"free": 10_000}
    monkeypatch.setattr(representation, "free_bytes", lambda device: room["free"])
    with pytest.raises(ConfigurationError, match="as a matrix, .* as rows.* are free on cpu"):
        fit(sketch=40)
    monkeypatch.setattr(representation, "request_bytes", lambda p: 10**9)
    room["free"] = 10**6
    _, callback, _, _ = fit(sketch=40)
    assert isinstance(memory_of(callback).curvature, RowsCurvature)
    with pytest.raises(ConfigurationError, match="rows need sketch=1"):
        fit()


def test_the_named_rows_of_a_data_set_that_moved(tmp_path: Path) -> None:
    trainer, callback, _, data = fit(sketch=40, representation=TIGHT)
    rest = Data(keep=[i for i in range(41) if i != 2])
    trainer.unlearn(RemovalDataModule(rest, [5]))  # training point 6
    assert memory_of(callback).ledger[-1]["indices"] == [6]
