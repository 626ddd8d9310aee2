"""After a rebase nothing of a forgotten point is left, and the memory is as good as a new one."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import QUIET, Data, Net, fit, memory_of

from lightning_muter import (
    ConfigurationError,
    RemovalDataModule,
    RemovalError,
    StateError,
    Trainer,
    UnlearningMemory,
)


def reference(gone: list[int], n: int = 41) -> torch.Tensor:
    """ω of a Retrain to the optimum without some points."""
    data = Data(n)
    x, y = data.dataset.tensors
    kept = [i for i in range(len(x)) if i not in gone]
    data.dataset.tensors = (x[kept], y[kept])
    _, callback, _, _ = fit(data=data)
    return memory_of(callback).omega


def test_a_rebased_memory_is_that_of_the_remaining_points(tmp_path: Path) -> None:
    """At the Retrain's own optimum, with its curvature, by a pass that nobody told about it."""
    trainer, callback, model, data = fit(memory_dir=str(tmp_path))
    trainer.unlearn(RemovalDataModule(data, [3, 17]))
    distance = torch.linalg.vector_norm(memory_of(callback).omega - reference([3, 17]))
    result = trainer.rebase(data)
    memory = memory_of(callback)
    assert result.gradient <= max(10 * result.gradient_of_training, 1e-8) < result.gradient_before
    assert memory.n == 39 and memory.remaining == list(range(39))
    left = torch.linalg.vector_norm(memory.omega - reference([3, 17]))
    assert left < 1e-6 * max(1.0, float(distance)) and left < distance
    assert torch.equal(memory.settings.view(model).get(), memory.omega)
    assert torch.count_nonzero(memory.gradient) == 0
    found = UnlearningMemory.load(tmp_path)
    assert found.curvature is not None and memory.curvature is not None
    assert torch.equal(found.curvature.matrix, memory.curvature.matrix)
    assert torch.equal(found.omega, memory.omega) and found.generation == memory.generation == 2
    kept = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(kept["classifier.weight"], model.classifier.weight)


def test_ten_points_with_and_without_a_rebase_in_the_middle() -> None:
    gone = list(range(0, 20, 2))
    truth = reference(gone, 241)
    x, y = Data(241).dataset.tensors
    distances = {}
    for rebases in (False, True):
        trainer, callback, _, data = fit(Data(241))
        none = torch.linalg.vector_norm(memory_of(callback).omega - truth)
        trainer.unlearn(RemovalDataModule(data, gone[:5]))
        if rebases:
            trainer.rebase(data)
            rest = [i for i in range(len(x)) if i not in gone[:5]]
            data = Data(241)
            data.dataset.tensors = (x[rest], y[rest])
            trainer.unlearn(RemovalDataModule(data, [rest.index(i) for i in gone[5:]]))
        else:
            trainer.unlearn(RemovalDataModule(data, gone[5:]))
        distances[rebases] = float(torch.linalg.vector_norm(memory_of(callback).omega - truth))
    assert distances[True] < distances[False] < 0.3 * none


def traces(folder: Path, point: torch.Tensor, secrets: list[bytes]) -> list[str]:
    """Where the bytes of a point's values, or of a secret, lie in a folder."""
    patterns = [point.double().numpy().tobytes(), point.float().numpy().tobytes(), *secrets]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [f.name for f in files if any(one in f.read_bytes() for one in patterns)]


def read_off(folder: Path) -> torch.Tensor | None:
    """The features of the one forgotten point, by who holds the folder alone: G_r / r."""
    memory = UnlearningMemory.load(folder)
    share = memory.gradient - memory.settings.weight_decay * memory.omega_star
    if not bool(memory.gradient.any()):
        return None
    return share[:18].reshape(3, 6) / share[18:].unsqueeze(1)  # r ⊗ h over r, the bias's share


def test_a_forgotten_point_is_read_off_the_folder_before_a_rebase_and_not_after(
    tmp_path: Path,
) -> None:
    trainer, callback, model, data = fit(memory_dir=str(tmp_path))
    key = memory_of(callback).key
    digest = memory_of(callback).digests[3].numpy().tobytes()
    trainer.unlearn(RemovalDataModule(data, [3]))
    features = memory_of(callback).curvature.removed.parts[0].points.features[0, :6]  # type: ignore[union-attr, attr-defined]
    found = read_off(tmp_path)
    assert found is not None
    torch.testing.assert_close(found, features.expand(3, -1), rtol=1e-8, atol=1e-8)
    secrets = [key, key.hex().encode(), digest, digest.hex().encode()]
    assert traces(tmp_path, features, secrets)
    trainer.rebase(data)
    assert read_off(tmp_path) is None
    assert traces(tmp_path, features, secrets) == []
    assert len(list(tmp_path.glob("base-*"))) == 1
    kept = UnlearningMemory.load(tmp_path)
    assert not bool(kept.residual_gradient.any())  # what Newton's last step left leans towards it
    ledger = kept.ledger
    assert "indices" not in ledger[0] and ledger[0]["m"] == 1 and ledger[1]["kind"] == "rebase"


def test_a_commitment_is_opened_by_its_salt_alone(tmp_path: Path) -> None:
    trainer, callback, _, data = fit(memory_dir=str(tmp_path))
    trainer.unlearn(RemovalDataModule(data, [9, 4]))
    (opening,) = trainer.rebase(data).openings
    assert (opening.request, opening.indices) == (1, (4, 9))
    text = bytes.fromhex(opening.salt) + json.dumps(list(opening.indices)).encode()
    (first, _) = UnlearningMemory.load(tmp_path).ledger
    assert first["commitment"] == blake2b(text, digest_size=32).hexdigest()
    assert traces(tmp_path, torch.tensor([1.2345e27]), [opening.salt.encode()]) == []


def test_a_memory_with_a_horizon_keeps_it_and_its_weights() -> None:
    trainer, callback, model, data = fit(horizon="training", newton_steps=0)
    trainer.unlearn(RemovalDataModule(data, [3]))
    before = memory_of(callback).omega
    result = trainer.rebase(data)
    after = memory_of(callback)
    assert result.newton_steps == 0 and torch.equal(after.omega, before)
    assert after.settings.horizon == memory_of(callback).settings.horizon
    assert after.start is not None
    assert trainer.unlearn(RemovalDataModule(without(3), [4])).indices == (4,)


def without(index: int) -> Data:
    data = Data()
    x, y = data.dataset.tensors
    kept = [i for i in range(len(x)) if i != index]
    data.dataset.tensors = (x[kept], y[kept])
    return data


def test_a_living_row_that_changed_is_refused_and_nothing_moves(tmp_path: Path) -> None:
    trainer, callback, model, data = fit(memory_dir=str(tmp_path))
    trainer.unlearn(RemovalDataModule(data, [3]))
    before, weights = memory_of(callback), model.classifier.weight.clone()
    data.dataset.tensors[0][7] += 1
    with pytest.raises(RemovalError, match="7"):
        trainer.rebase(data)
    assert memory_of(callback) is before and torch.equal(model.classifier.weight, weights)
    assert UnlearningMemory.load(tmp_path).generation == 1


def test_a_failed_write_leaves_memory_and_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, callback, model, data = fit(memory_dir=str(tmp_path))
    trainer.unlearn(RemovalDataModule(data, [3]))
    before, weights = memory_of(callback), model.classifier.weight.clone()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lightning_muter.memory.base_file.write", fail)
    with pytest.raises(StateError, match="disk full"):
        trainer.rebase(data)
    monkeypatch.undo()
    assert memory_of(callback) is before and torch.equal(model.classifier.weight, weights)
    assert torch.equal(UnlearningMemory.load(tmp_path).omega, before.omega)


def test_another_process_rebases_a_folder(tmp_path: Path) -> None:
    trainer, callback, model, data = fit(memory_dir=str(tmp_path))
    trainer.unlearn(RemovalDataModule(data, [3]))
    other = Net().double()
    other.load_state_dict(model.state_dict())
    Trainer(**QUIET).rebase(data, model=other, memory=tmp_path)
    assert UnlearningMemory.load(tmp_path).n == 40
    result = trainer.unlearn(RemovalDataModule(without(3), [0]))  # in the first process again
    assert result.indices == (0,) and memory_of(callback).n == 40


def test_a_memory_in_hand_has_no_place_for_a_rebased_one() -> None:
    trainer, callback, model, data = fit()
    with pytest.raises(ConfigurationError, match="give its folder"):
        Trainer(**QUIET).rebase(data, model=model, memory=memory_of(callback))


def test_results_ask_for_a_rebase(tmp_path: Path) -> None:
    trainer, callback, _, data = fit(memory_dir=str(tmp_path), rebase_every=2)
    assert trainer.unlearn(RemovalDataModule(data, [3])).rebase_due == ""
    assert "2 requests since" in trainer.unlearn(RemovalDataModule(data, [4])).rebase_due
    trainer.rebase(data)
    assert UnlearningMemory.load(tmp_path).rebase_policy.every == 2
    assert trainer.unlearn(RemovalDataModule(without(3), [0])).rebase_due == ""


def test_ids_name_points_after_a_rebase_too(tmp_path: Path) -> None:
    names = [f"person {i // 2}" for i in range(41)]
    trainer, callback, _, data = fit(memory_dir=str(tmp_path), ids=names)
    trainer.unlearn(RemovalDataModule(data, ids=["person 3"]))
    trainer.rebase(data)
    assert memory_of(callback).n == 39
    result = trainer.unlearn(RemovalDataModule(data, ids=["person 4"]))
    assert result.indices == (6, 7)  # rows 8 and 9, of which two before them are gone
    with pytest.raises(RemovalError, match="person 3"):
        trainer.unlearn(RemovalDataModule(data, ids=["person 3"]))


def test_a_point_forgotten_before_a_rebase_is_told_what_it_looks_like() -> None:
    """The memory keeps nothing of it, so that its row might as well be a changed one."""
    trainer, _, _, data = fit()
    changed = Data()
    changed.dataset.tensors[0][3] += 1
    trainer.unlearn(RemovalDataModule(data, [3]))
    with pytest.raises(RemovalError, match="not what the memory was built on") as error:
        trainer.unlearn(RemovalDataModule(changed, [3]))
    assert "rebase" not in str(error.value)
    trainer.rebase(data)
    for removals in (
        RemovalDataModule(data, [3]),
        RemovalDataModule(data, [3]).predict_dataloader(),
    ):
        with pytest.raises(RemovalError, match="forgotten before a rebase looks the same"):
            trainer.unlearn(removals)
