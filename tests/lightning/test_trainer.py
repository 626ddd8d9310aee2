"""Stages I to III through the trainer, against rebuilt memories and real Retrains."""

from __future__ import annotations

import copy
import csv
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import QUIET, Data, Net, fit, memory_of
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    METHODS,
    ConfigurationError,
    L2Ball,
    LinfBall,
    MemoryFormatError,
    RemovalDataModule,
    RemovalError,
    StateError,
    Trainer,
    UnlearningMemory,
    adversarial_influence,
    total_hessian,
)


def test_training_ends_stationary_with_a_summary() -> None:
    _, callback, _, _ = fit()
    summary = memory_of(callback).summary
    assert summary["n"] == 41 and summary["p"] == 21
    assert summary["residual_gradient"] < 1e-8
    assert summary["stationary"] == summary["active"] == 1.0
    assert 0 < summary["smallest_eigenvalue"] < summary["largest_eigenvalue"]


def test_memory_after_forgetting_is_the_memory_of_the_rest() -> None:
    trainer, callback, model, data = fit()
    star = memory_of(callback).omega_star
    gone = [3, 17, 40]
    trainer.unlearn(RemovalDataModule(data, gone))
    after = memory_of(callback)
    rest = [i for i in range(41) if i not in gone]
    at_star = copy.deepcopy(model)
    callback.settings.view(at_star).set(star)
    x, y = data.dataset.tensors
    rebuilt = total_hessian(
        at_star, (x[rest], y[rest]), L2Ball(0.5), head="classifier", weight_decay=1e-2
    )
    torch.testing.assert_close(after.curvature.matrix, rebuilt, rtol=1e-8, atol=1e-8)
    assert after.remaining == rest and torch.equal(after.omega_star, star)


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.downdate])
def test_at_once_equals_point_by_point_in_any_order(method: str) -> None:
    found = []
    for indices, size in (([5, 9, 30], None), ([5, 9, 30], 1), ([30, 5, 9], 2)):
        trainer, callback, _, data = fit(method=method)
        result = trainer.unlearn(RemovalDataModule(data, indices, size))
        assert set(result.indices) == {5, 9, 30}
        found.append(memory_of(callback).omega)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found[2], found[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.has_memory])
def test_schur_equals_direct(method: str) -> None:
    found = []
    for solver in ("direct", "schur"):
        trainer, callback, _, data = fit(method=method, solver=solver, damping=0.1)
        result = trainer.unlearn(RemovalDataModule(data, [1, 2, 3]))
        assert result.status == "converged" and result.residual < 1e-8
        found.append(memory_of(callback).omega)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("threat", [L2Ball(0.5), LinfBall(0.1, bandwidth=0.05)], ids=str)
def test_muter_is_nearest_to_retrain_and_the_bound_holds(threat: Any) -> None:
    gone = [4, 12]
    keep = [i for i in range(41) if i not in gone]
    retrained = memory_of(fit(Data(keep=keep), threat=threat, newton_steps=30)[1]).omega_star
    distance = {}
    for method in METHODS:
        trainer, callback, model, data = fit(threat=threat, method=method, newton_steps=30)
        wants_bound = method == "muter"
        result = trainer.unlearn(RemovalDataModule(data, gone), bound=wants_bound)
        distance[method] = float((memory_of(callback).omega - retrained).norm())
        if result.bound is not None:
            assert distance[method] <= result.bound * (1 + 1e-6)
            assert "strong convexity" in result.certificate
        else:
            assert result.certificate == "no certificate"
        weights = callback.settings.view(model).get()
        torch.testing.assert_close(weights, memory_of(callback).omega)
    others = [v for k, v in distance.items() if k not in ("muter", "retrain")]
    assert distance["muter"] < 0.5 * min(others), distance


def test_corrector_contracts_towards_retrain() -> None:
    gone = [4, 12, 33]
    keep = [i for i in range(41) if i not in gone]
    retrained = memory_of(fit(Data(keep=keep), newton_steps=30)[1]).omega_star
    distance = []
    for steps in (0, 1, 3):
        trainer, callback, _, data = fit(newton_steps=30)
        trainer.unlearn(RemovalDataModule(data, gone), corrector_steps=steps)
        distance.append(float((memory_of(callback).omega - retrained).norm()))
    assert distance[1] < 0.3 * distance[0] and distance[2] < 0.3 * distance[1]


def test_points_are_found_by_content_and_plain_trainers_learn_the_verb() -> None:
    trainer, callback, _, data = fit(trainer_class=pl.Trainer)
    x, y = data.dataset.tensors
    loader = DataLoader(TensorDataset(x[[7, 8]], y[[7, 8]]), batch_size=2)
    assert trainer.unlearn(loader).indices == (7, 8)
    with pytest.raises(RemovalError, match="forgotten already"):
        trainer.unlearn(loader)
    with pytest.raises(RemovalError, match="never trained on"):
        trainer.unlearn(DataLoader(TensorDataset(x[:1] + 1, y[:1])))


def test_memory_on_disk_serves_another_process(tmp_path: Any) -> None:
    trainer, callback, model, data = fit(memory_dir=str(tmp_path))
    fresh = copy.deepcopy(model)
    folder = tmp_path
    first = trainer.unlearn(RemovalDataModule(data, [0]))
    assert first.to_dict()["indices"] == [0]
    later = Trainer(**QUIET).unlearn(RemovalDataModule(data, [1]), model=model, memory=folder)
    assert later.indices == (1,)
    loaded = UnlearningMemory.load(folder)
    assert [entry["indices"] for entry in loaded.ledger] == [[0], [1]]
    torch.testing.assert_close(loaded.omega, callback.settings.view(model).get())
    with pytest.raises(StateError, match="away from the memory"):
        callback.settings.view(fresh).set(loaded.omega + 1)
        Trainer(**QUIET).unlearn(RemovalDataModule(data, [2]), model=fresh, memory=folder)


def contents(folder: Any) -> dict[str, bytes]:
    """What a folder keeps, without who wrote last and what a reader leaves open."""
    kept = (p for p in folder.iterdir() if not p.name.endswith((".lock", "-wal", "-shm")))
    return {p.name: p.read_bytes() for p in kept}


@pytest.mark.parametrize(
    ("indices", "message"),
    [([99], "out of range"), ([1, 1], "twice"), ([2], "forgotten already"), (None, "all")],
)
def test_bad_requests_change_nothing(
    indices: list[int] | None, message: str, tmp_path: Any
) -> None:
    trainer, callback, model, data = fit(memory_dir=str(tmp_path))
    trainer.unlearn(RemovalDataModule(data, [2]))
    indices = [i for i in range(41) if i != 2] if indices is None else indices
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before, files = memory_of(callback), contents(tmp_path)
    with pytest.raises(RemovalError, match=message):
        trainer.unlearn(RemovalDataModule(data, indices))
    assert memory_of(callback) is before
    assert contents(tmp_path) == files
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("change", ["content", "nan", "model", "backbone"])
def test_changed_data_or_model_is_refused(change: str) -> None:
    trainer, callback, model, data = fit()
    before = memory_of(callback)
    error: type[Exception] = RemovalError
    if change == "content":
        data.dataset.tensors[0][3] += 1
    elif change == "nan":
        data.dataset.tensors[0][3, 0] = torch.nan
    else:
        error = StateError
        layer = model.classifier if change == "model" else model.backbone[0]
        layer.weight.data.add_(0.1)
    with pytest.raises(error):
        trainer.unlearn(RemovalDataModule(data, [3]))
    assert memory_of(callback) is before


def test_a_failed_write_changes_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, callback, model, data = fit(memory_dir=str(tmp_path))
    before, state = memory_of(callback), copy.deepcopy(model.state_dict())

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lightning_muter.memory.database.append", fail)
    with pytest.raises(StateError, match="could not be written.*disk full"):
        trainer.unlearn(RemovalDataModule(data, [3]))
    monkeypatch.undo()
    assert memory_of(callback) is before and UnlearningMemory.load(tmp_path).ledger == ()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_model_file_that_cannot_be_written_is_mended_at_the_next_opening(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, callback, model, data = fit(memory_dir=str(tmp_path))

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lightning_muter.memory.model_file.prepare", fail)
    with pytest.warns(UserWarning, match="memory is committed, but model.ckpt"):
        trainer.unlearn(RemovalDataModule(data, [3]))
    monkeypatch.undo()
    assert UnlearningMemory.load(tmp_path).remaining == memory_of(callback).remaining
    trainer.unlearn(RemovalDataModule(data, [4]))
    kept = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_the_folder_is_ahead_of_a_process_that_slept(tmp_path: Any) -> None:
    """Another process forgets 5; this one then forgets 7: both stay forgotten."""
    trainer, callback, model, data = fit(memory_dir=str(tmp_path))
    other = Net().double()
    other.load_state_dict(model.state_dict())
    Trainer(**QUIET).unlearn(RemovalDataModule(data, [5]), model=other, memory=tmp_path)
    trainer.unlearn(RemovalDataModule(data, [7]))
    assert [e["indices"] for e in memory_of(callback).ledger] == [[5], [7]]
    memory = memory_of(callback)
    assert torch.equal(memory.settings.view(model).get(), memory.omega)
    assert torch.equal(UnlearningMemory.load(tmp_path).omega, memory.omega)


@pytest.mark.parametrize("damage", ["truncate", "alter", "older", "missing"])
def test_damaged_memories_are_refused(damage: str, tmp_path: Any) -> None:
    _, _, model, data = fit(memory_dir=str(tmp_path))
    base, database = next(tmp_path.glob("base-*")), tmp_path / "memory.sqlite"
    content = base.read_bytes()
    if damage == "truncate":
        base.write_bytes(content[:-9])
    elif damage == "alter":
        base.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "older":
        database.unlink()
        (tmp_path / "manifest.json").write_text('{"format_version": 2}')
    else:
        database.unlink()
    with pytest.raises(MemoryFormatError):
        Trainer(**QUIET).unlearn(RemovalDataModule(data, [1]), model=model, memory=tmp_path)


def test_unlearn_before_fit() -> None:
    with pytest.raises(StateError, match="no memory"):
        Trainer(**QUIET).unlearn(RemovalDataModule(Data(), [1]), model=Net().double())


@pytest.mark.parametrize("damage", ["content", "nan"])
def test_a_bad_point_of_a_later_batch_stops_the_whole_call(damage: str, tmp_path: Any) -> None:
    trainer, callback, model, data = fit(memory_dir=str(tmp_path))
    before, state = memory_of(callback), copy.deepcopy(model.state_dict())
    data.dataset.tensors[0][9] += 1 if damage == "content" else torch.nan
    with pytest.raises(RemovalError):
        trainer.unlearn(RemovalDataModule(data, [3, 4, 9], batch_size=1))
    assert memory_of(callback) is before and UnlearningMemory.load(tmp_path).ledger == ()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_memory_of_another_head_or_architecture_is_refused(tmp_path: Any) -> None:
    _, _, _, data = fit(memory_dir=str(tmp_path))

    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(6, 4)

    class Deeper(Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone.append(nn.Linear(6, 6))

    class Renamed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.classifier = self.classifier, nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    cases = [(Wider, StateError), (Deeper, StateError), (Renamed, ConfigurationError)]
    for architecture, error in cases:
        with pytest.raises(error):
            Trainer(**QUIET).unlearn(
                RemovalDataModule(data, [1]), model=architecture().double(), memory=tmp_path
            )
    assert UnlearningMemory.load(tmp_path).ledger == ()


def test_metrics_reach_the_logger(tmp_path: Any) -> None:
    trainer, callback, model, data = fit()
    logger = CSVLogger(tmp_path)
    options = {**QUIET, "logger": logger}
    result = Trainer(callbacks=[callback], **options).unlearn(
        RemovalDataModule(data, [3, 5]), model=model, bound=True
    )
    with open(f"{logger.log_dir}/metrics.csv") as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["unlearn/update_norm"]) == pytest.approx(result.update_norm)
    assert float(row["unlearn/bound"]) == pytest.approx(result.bound)
    assert float(row["unlearn/points"]) == 2 and int(row["step"]) == 1


def test_user_state_is_left_alone() -> None:
    data = Data()
    copies = [t.clone() for t in data.dataset.tensors]
    trainer, _, model, _ = fit(data)
    assert all(torch.equal(a, b) for a, b in zip(copies, data.dataset.tensors, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    model.train()
    model.backbone[0].weight.requires_grad_(False)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    trainer.unlearn(RemovalDataModule(data, [1]))
    assert torch.equal(state, torch.get_rng_state())
    assert not model.backbone[0].weight.requires_grad and not model.classifier._forward_pre_hooks
    metrics = trainer.test(model, data, verbose=False)[0]
    assert metrics["test_robust_acc"] <= metrics["test_clean_acc"]


def test_frozen_backbone_and_a_disagreeing_loss() -> None:
    _, _, model, _ = fit(newton_steps=0)
    pl.seed_everything(0, verbose=False)
    assert torch.equal(model.backbone[0].weight, Net().double().backbone[0].weight)
    with pytest.raises(ConfigurationError, match="0.5 times the mean"):
        fit(newton_steps=0, loss=lambda z, y: 2 * F.cross_entropy(z, y, reduction="none"))


def test_influence_predicts_a_removal() -> None:
    trainer, callback, model, data = fit()
    before = memory_of(callback)
    x, y = data.dataset.tensors
    influence = adversarial_influence(before, model, (x[:1], y[:1]))
    trainer.unlearn(RemovalDataModule(data, [0]))
    change = memory_of(callback).omega - before.omega_star
    cosine = F.cosine_similarity(change, -influence[0] / 41, dim=0)
    assert float(cosine) > 0.9
