"""model.ckpt beside a memory: always the current model, or brought up to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import store_cases as cases
import torch

from lightning_muter.errors import MemoryFormatError, StateError
from lightning_muter.memory import model_file
from lightning_muter.memory.folder import MemoryStore


def made(folder: Path) -> MemoryStore:
    store = MemoryStore(folder)
    store.create(cases.content(), cases.model(0))
    return store


def loaded(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "model.ckpt", weights_only=True)
    return checkpoint


def parameters(generation: int) -> dict[str, torch.Tensor]:
    return {"head.weight": torch.full((3,), generation, dtype=torch.float64)}


def test_a_model_says_whose_it_is(tmp_path: Path) -> None:
    store, given = made(tmp_path), cases.model(1)
    assert store.model_generation() == 0 and not store.repair_model(parameters(0))
    store.commit(0, cases.current(1), [cases.request(1)])
    assert store.model_generation() == 0
    store.write_model(1, given)
    assert "lightning_muter" not in given
    assert store.model_generation() == 1 and not store.repair_model({})
    assert loaded(tmp_path)["lightning_muter"] == {"memory": cases.ID, "generation": 1}
    with pytest.raises(StateError, match="generation 1"):
        store.write_model(0, cases.model(0))


def test_a_memory_without_a_model(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    store.create(cases.content())
    assert store.model_generation() is None and not store.repair_model(parameters(0))
    store.commit(0, cases.current(1), [])
    assert not store.repair_model(parameters(1))


def test_a_model_that_is_behind_is_brought_up(tmp_path: Path) -> None:
    store = made(tmp_path)
    store.commit(0, cases.current(1), [cases.request(1)])
    assert MemoryStore(tmp_path).repair_model(parameters(1))
    found = loaded(tmp_path)
    assert found["state_dict"]["head.weight"].tolist() == [1, 1, 1]
    assert found["state_dict"]["head.weight"].dtype == torch.float32
    assert found["epoch"] == 3 and found["lightning_muter"]["generation"] == 1
    assert store.model_generation() == 1 and not store.repair_model(parameters(1))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    weight = torch.zeros(3)
    store = MemoryStore(tmp_path)
    store.create(cases.content(), {"state_dict": {"head.weight": weight, "twin": weight}})
    store.commit(0, cases.current(1), [])
    assert store.repair_model(parameters(1))
    state = loaded(tmp_path)["state_dict"]
    assert state["twin"].tolist() == [1, 1, 1]
    assert state["twin"].data_ptr() == state["head.weight"].data_ptr()


@pytest.mark.parametrize("place", ["prepare", "finish", "note"])
def test_a_crash_between_the_commit_and_the_model(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made(tmp_path)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    where = {
        "prepare": "lightning_muter.memory.model_file.torch.save",
        "finish": "lightning_muter.memory.model_file.finish",
        "note": "lightning_muter.memory.folder.MemoryStore._note_model",
    }[place]
    store.commit(0, cases.current(1), [cases.request(1)])
    monkeypatch.setattr(where, killed)
    with pytest.raises(KeyboardInterrupt):
        store.write_model(1, cases.model(1))
    monkeypatch.undo()
    assert store.model_generation() == 0
    assert MemoryStore(tmp_path).repair_model(parameters(1))
    assert store.model_generation() == 1
    assert loaded(tmp_path)["state_dict"]["head.weight"].tolist() == [1, 1, 1]
    assert not list(tmp_path.glob("model-*")) and not list(tmp_path.glob("*.new"))


def test_a_crash_between_a_new_memory_and_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path)

    def fail(*args: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(model_file, "finish", fail)
    other = replace(cases.content(2, 2), memory_id="ab" * 8)
    store = MemoryStore(tmp_path)
    store.create(other, cases.model(2), overwrite=True)
    monkeypatch.undo()
    assert loaded(tmp_path)["lightning_muter"]["memory"] == cases.ID
    with store.writing():
        assert loaded(tmp_path)["lightning_muter"] == {"memory": "ab" * 8, "generation": 2}
    assert not list(tmp_path.glob("model-*"))


def test_a_model_that_is_no_model_of_the_memory(tmp_path: Path) -> None:
    store = made(tmp_path)
    store.commit(0, cases.current(1), [cases.request(1)])
    path = tmp_path / "model.ckpt"
    intact = path.read_bytes()
    for wrong in ({"head.weight": torch.zeros(4)}, {"head.bias": torch.zeros(3)}):
        with pytest.raises(MemoryFormatError, match="another model"):
            store.repair_model(wrong)
        assert path.read_bytes() == intact
    stamped = {"memory": cases.ID, "generation": 0}
    for other in (
        [],
        {"state_dict": 3, "lightning_muter": stamped},
        cases.model(0),
        {**cases.model(0), "lightning_muter": {**stamped, "memory": "0" * 8}},
        {**cases.model(0), "lightning_muter": {**stamped, "generation": 2}},
        {**cases.model(0), "lightning_muter": {**stamped, "generation": "0"}},
        {**cases.model(0), "lightning_muter": stamped, "hook": made},
    ):
        torch.save(other, path)
        with pytest.raises(MemoryFormatError, match=r"UnlearningMemory\.restore"):
            store.repair_model(parameters(1))
    for data in (b"", b"no checkpoint", intact[: len(intact) // 2]):
        path.write_bytes(data)
        with pytest.raises(MemoryFormatError, match=r"UnlearningMemory\.restore"):
            store.repair_model(parameters(1))
    path.unlink()
    with pytest.raises(MemoryFormatError, match=r"UnlearningMemory\.restore"):
        store.repair_model(parameters(1))
    path.write_bytes(intact)
    assert store.repair_model(parameters(1))


def test_what_the_restricted_unpickler_does_not_load_is_left_out_and_named(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    given = cases.model(0)
    given |= {
        "hyper_parameters": {"rate": 0.1, "net": torch.nn.Linear(1, 1), "folder": Path("runs")},
        "made_by": Path("script.py"),
    }
    given["state_dict"] |= {"head._extra_state": Path("extra")}
    left = {"made_by", "hyper_parameters.net", "hyper_parameters.folder"}
    with pytest.warns(UserWarning, match="leaves out") as caught:
        store.create(cases.content(), given)
    names = str(caught[0].message).partition("leaves out ")[2].partition(":")[0].split(", ")
    assert set(names) == left | {"state_dict.head._extra_state"}
    assert "made_by" in given and "net" in given["hyper_parameters"]
    store.commit(0, cases.current(1), [cases.request(1)])
    assert store.repair_model(parameters(1))
    found = loaded(tmp_path)
    assert found["hyper_parameters"] == {"rate": 0.1}
    assert found["state_dict"]["head.weight"].tolist() == [1, 1, 1]
