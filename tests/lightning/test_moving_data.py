"""The data set moves on: points are known by content and by the user's keys, not by position."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET, Data, Net, fit, memory_of
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

from lightning_muter import (
    ConfigurationError,
    MUterCallback,
    RemovalDataModule,
    RemovalError,
    Trainer,
    UnlearningMemory,
)
from lightning_muter.lightning.removals import removal_batches

N = 60
IDS = [f"p{i // 3}" for i in range(N)]  # a person owns three rows


class Table(Dataset[Any]):
    """Rows with the keys of their owners, as a database gives them."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, owner: Any = None) -> None:
        self.x, self.y = x, y
        if owner is not None:
            self.owner = owner

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def original() -> tuple[torch.Tensor, torch.Tensor]:
    """Sixty points, of which 30 and 31 are equal, and 40 and 50."""
    x, y = (tensor.clone() for tensor in Data(N).dataset.tensors)
    for a, b in ((30, 31), (40, 50)):
        x[b], y[b] = x[a], y[a]
    return x, y


def rows(keep: list[int]) -> TensorDataset:
    x, y = original()
    return TensorDataset(x[keep], y[keep])


def without(*gone: int) -> TensorDataset:
    return rows([i for i in range(N) if i not in gone])


@pytest.fixture(scope="module")
def fitted() -> tuple[MUterCallback, Net]:
    data = Data()
    data.dataset = rows(list(range(N)))
    _, callback, model, _ = fit(data, ids=IDS)
    return callback, model


class Case:
    """A trained model and its memory, in a trainer that has run nothing yet."""

    def __init__(self, fitted: tuple[MUterCallback, Net]) -> None:
        self.callback, self.model = copy.copy(fitted[0]), copy.deepcopy(fitted[1])
        self.trainer = Trainer(callbacks=[self.callback], **QUIET)

    def forget(self, data: Any, indices: Any = None, **options: Any) -> Any:
        named = {k: options.pop(k) for k in ("ids", "batch_size") if k in options}
        removals = RemovalDataModule(data, indices, **named)
        return self.trainer.unlearn(removals, model=self.model, **options)

    @property
    def omega(self) -> torch.Tensor:
        return memory_of(self.callback).omega

    @property
    def weights(self) -> torch.Tensor:
        return self.callback.settings.view(self.model).get()


@pytest.fixture
def case(fitted: tuple[MUterCallback, Net]) -> Case:
    return Case(fitted)


@pytest.fixture
def reference(fitted: tuple[MUterCallback, Net]) -> Case:
    return Case(fitted)


# --- positions in today's data set ------------------------------------------------------------


def test_a_row_deleted_after_its_request_shifts_the_others(case: Case, reference: Case) -> None:
    case.forget(without(), [5])
    result = case.forget(without(5), [16])
    assert result.indices == (17,)
    assert memory_of(case.callback).ledger[-1]["indices"] == [17]
    reference.forget(without(), [5, 17], batch_size=1)
    torch.testing.assert_close(case.omega, reference.omega, rtol=0, atol=1e-12)
    torch.testing.assert_close(case.weights, reference.omega)


def test_the_position_of_a_forgotten_point_is_another_persons_now(case: Case) -> None:
    case.forget(without(), [5])
    assert case.forget(without(5), [5]).indices == (6,)


def test_a_shuffled_and_a_longer_data_set(case: Case) -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3)).tolist()
    asked = [order.index(i) for i in (7, 2, 19)]
    assert case.forget(rows(order), asked).indices == (7, 2, 19)
    x, y = original()
    longer = TensorDataset(torch.cat([x[:20] + 9, x]), torch.cat([y[:20], y]))
    assert case.forget(longer, [20 + 21, 20 + 59], batch_size=1).indices == (21, 59)


def test_rows_that_training_never_saw_are_no_training_points(case: Case) -> None:
    x, y = original()
    longer = TensorDataset(torch.cat([x, x[:2] + 9]), torch.cat([y, y[:2]]))
    with pytest.raises(RemovalError, match=r"\[61\] are not what the memory was built on"):
        case.forget(longer, [4, 61])
    x[3] += 1
    with pytest.raises(RemovalError, match=r"\[3\] are not what the memory was built on"):
        case.forget(TensorDataset(x, y), [3, 4])
    with pytest.raises(RemovalError, match="out of range"):
        case.forget(without(), [N])


def test_content_comes_before_what_was_forgotten(case: Case) -> None:
    case.forget(without(), [5])
    moved = rows([5, *(i for i in range(N) if i != 5)])
    with pytest.raises(RemovalError, match=r"\[5\] were forgotten already"):
        case.forget(moved, [0])
    assert case.forget(moved, [5]).indices == (4,)
    x, y = original()
    x[5] += 1
    with pytest.raises(RemovalError, match="not what the memory was built on"):
        case.forget(TensorDataset(x, y), [5])


def test_equal_points_are_taken_in_their_order(case: Case) -> None:
    shifted = rows([0, *range(N)][1:][::-1])
    assert case.forget(shifted, [N - 1 - 50]).indices == (40,)
    assert case.forget(shifted, [N - 1 - 50]).indices == (50,)
    with pytest.raises(RemovalError, match="forgotten already"):
        case.forget(shifted, [N - 1 - 50])


def test_the_row_of_an_equal_point_moved_to_where_a_forgotten_one_was(case: Case) -> None:
    case.forget(without(), [30])
    with pytest.raises(RemovalError, match=r"\[30\] were forgotten already"):
        case.forget(without(), [30])
    assert case.forget(without(30), [30]).indices == (31,)


def test_one_equal_row_too_many(case: Case) -> None:
    doubled = rows([3, *range(N)])
    with pytest.raises(RemovalError, match="forgotten already, or named twice"):
        case.forget(doubled, [0, 4])
    assert case.forget(doubled, [4, 7], batch_size=1).indices == (3, 6)


def test_equal_rows_of_one_call_in_batches_of_one(case: Case) -> None:
    moved = rows([50, *range(N)][:N])  # position 0 is the second of two equal points or the first
    assert case.forget(moved, [0, 41], batch_size=1).indices == (40, 50)


def test_fifty_thousand_rows_are_looked_up_in_one_go(case: Case) -> None:
    x, y = original()
    many = TensorDataset(
        torch.cat([x[:1].repeat(50_000, 1), x]), torch.cat([y[:1].repeat(50_000), y])
    )
    with pytest.raises(RemovalError, match="forgotten already, or named twice"):
        case.forget(many, list(range(50_000)))
    with pytest.warns(UserWarning, match="50000 rows"):
        assert case.forget(many, [50_008], bound=True).indices == (8,)


class Split(pl.LightningDataModule):
    """Splits by chance each time that it is set up."""

    def setup(self, stage: str) -> None:
        self.part = random_split(without(), [50, 10])[0]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.part, batch_size=10)


def test_a_data_set_that_is_another_one_at_each_setup_is_refused(case: Case) -> None:
    before = memory_of(case.callback)
    with pytest.raises(RemovalError, match="each time that it is set up"):
        case.forget(Split(), [1, 2, 3])
    assert memory_of(case.callback) is before


def test_positions_of_a_subset_are_its_own(case: Case) -> None:
    part = Subset(without(), [9, 8, 7])
    assert case.forget(part, [1]).indices == (8,)
    with pytest.raises(RemovalError, match="positions in the Subset that was given, not in its ba"):
        case.forget(part, [9])


# --- the user's own keys ----------------------------------------------------------------------


def test_an_id_owns_all_of_its_points(case: Case, reference: Case) -> None:
    result = case.forget(without(), ids=["p4", "p0"])
    assert result.indices == (12, 13, 14, 0, 1, 2)
    reference.forget(without(), [12, 13, 14, 0, 1, 2])
    torch.testing.assert_close(case.omega, reference.omega, rtol=0, atol=1e-12)
    with pytest.raises(RemovalError, match="forgotten already"):
        case.forget(without(), ids=["p4"])


@pytest.mark.parametrize("size", [None, 1, 2])
def test_ids_in_a_data_set_that_moved(case: Case, size: int | None) -> None:
    case.forget(without(), [5])
    order = [i for i in torch.randperm(N).tolist() if i != 5]
    assert case.forget(rows(order), ids=["p13"], batch_size=size).indices == (39, 40, 41)
    assert case.forget(rows(order), ids=["p16"], batch_size=size).indices == (48, 49, 50)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["p99"], r"\['p99'\]"),
        (["p1", "p1"], "twice"),
        ([], "empty"),
        ([None], "None"),
        ([1.5], "1.5"),
        ([True], "True"),
    ],
)
def test_ids_that_name_nobody(case: Case, ids: list[Any], message: str) -> None:
    before = memory_of(case.callback)
    with pytest.raises(RemovalError, match=message):
        case.forget(without(), ids=ids)
    assert memory_of(case.callback) is before


def test_an_id_whose_row_is_gone_is_refused(case: Case) -> None:
    with pytest.raises(RemovalError, match=r"\[13\].*1 of"):
        case.forget(without(13), ids=["p4"])


def test_indices_or_ids() -> None:
    for options in ({}, {"indices": [1], "ids": ["p1"]}):
        with pytest.raises(RemovalError, match="indices=.*ids="):
            RemovalDataModule(without(), **options)
    with pytest.raises(RemovalError, match="trainer.unlearn"):
        RemovalDataModule(without(), ids=["p1"]).predict_dataloader()
    with pytest.raises(RemovalError, match="trainer.unlearn"):
        RemovalDataModule(without(), ids=["p1"]).remaining()
    assert RemovalDataModule(without(), ids="p1").ids == ["p1"]


def test_a_memory_without_ids_says_so() -> None:
    trainer, callback, _, data = fit(newton_steps=0)
    assert memory_of(callback).ids is None
    with pytest.raises(RemovalError, match="keeps no ids"):
        trainer.unlearn(RemovalDataModule(data, ids=["p1"]))


@pytest.mark.parametrize("kind", ["attribute", "subset", "concatenated", "tensor", "numpy"])
def test_where_ids_come_from(kind: str, tmp_path: Any) -> None:
    x, y = Data().dataset.tensors
    owner: Any = [i // 2 for i in range(41)]
    data, ids, expected = Data(), "owner", (8, 9)
    data.dataset = Table(x, y, owner)  # type: ignore[assignment]
    if kind == "subset":
        inner = Subset(data.dataset, list(range(20, 0, -1)))
        data.dataset, expected = Subset(inner, list(range(15))), (11, 12)  # type: ignore[assignment]
    elif kind == "concatenated":
        parts = [Table(x[:20], y[:20], owner[:20]), Table(x[20:], y[20:], owner[20:])]
        data.dataset = ConcatDataset(parts)  # type: ignore[assignment]
    elif kind == "tensor":
        ids = torch.tensor(owner)  # type: ignore[assignment]
    elif kind == "numpy":
        ids = np.array([str(one) for one in owner])  # type: ignore[assignment]
    _, callback, model, _ = fit(data, newton_steps=0, ids=ids, memory_dir=str(tmp_path))
    memory = UnlearningMemory.load(tmp_path)
    assert memory.ids is not None and memory.ids.shape == (memory.n, 16)
    assert memory.ids.dtype == torch.uint8 and torch.equal(memory.ids, memory_of(callback).ids)
    for named in (4, "4"):  # a key is known by its text
        result = Trainer(**QUIET).unlearn(
            RemovalDataModule(data, ids=[named]), model=copy.deepcopy(model), memory=memory
        )
        assert result.indices == expected


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("owner", "no attribute 'owner'"),
        (["a"] * 40, "40 .*41 points"),
        ([None] * 41, "None"),
        ([0.5] * 41, "0.5"),
        (7, "ids=7"),
    ],
)
def test_ids_are_checked_before_training(ids: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(ids=ids)


def test_ids_are_not_kept_in_clear(tmp_path: Any) -> None:
    names = [f"somebody-{i}" for i in range(41)]
    fit(newton_steps=0, ids=names, memory_dir=str(tmp_path))
    assert not any(b"somebody" in path.read_bytes() for path in tmp_path.iterdir())


def test_a_retrain_of_a_callback_with_ids() -> None:
    trainer, callback, _, data = fit(newton_steps=0, method="retrain", ids=[*range(41)])
    assert trainer.unlearn(RemovalDataModule(data, ids=[7])).indices == (7,)
    data.dataset = TensorDataset(*(t[torch.arange(41) != 7] for t in data.dataset.tensors))
    assert trainer.unlearn(RemovalDataModule(data, [7])).indices == (8,)
    x, y = data.dataset.tensors
    data.dataset = TensorDataset(x[1:], y[1:])
    with pytest.raises(RemovalError, match=r"\[0\].*1 of"):
        trainer.unlearn(RemovalDataModule(data, [7]))


# --- already forgotten ------------------------------------------------------------------------


def loader(indices: list[int], **options: Any) -> DataLoader[Any]:
    return DataLoader(rows(indices), **options)


@pytest.mark.parametrize("by", ["index", "id", "content", "one by one"])
def test_a_repeated_request_is_passed_over(case: Case, by: str, tmp_path: Any) -> None:
    memory_of(case.callback).save(tmp_path)
    start = case.callback.settings.view(case.model).get()

    def ask(**options: Any) -> Any:
        removals = {
            "index": lambda: RemovalDataModule(without(), [3, 4, 5]),
            "id": lambda: RemovalDataModule(without(), ids=["p1"]),
            "content": lambda: loader([3, 4, 5], batch_size=2),
            "one by one": lambda: RemovalDataModule(without(), [3, 4, 5], batch_size=1),
        }[by]()
        return case.trainer.unlearn(removals, model=case.model, memory=tmp_path, **options)

    first = ask()
    assert first.indices == (3, 4, 5) and first.already == ()
    after = case.callback.settings.view(case.model).get()
    with pytest.raises(RemovalError, match="already='skip'"):
        ask()
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    case.callback.settings.view(case.model).set(start)  # the process died before it had the model
    again = ask(already="skip", noise_std=0.1)
    assert again.indices == () and again.already == (3, 4, 5)
    assert again.status == "converged" and again.requests == 0 and again.update_norm == 0
    assert again.to_dict()["already"] == [3, 4, 5]
    assert torch.equal(case.callback.settings.view(case.model).get(), after)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("size", [None, 1])
def test_what_is_left_of_a_request_is_forgotten(
    case: Case, reference: Case, size: int | None
) -> None:
    case.forget(without(), [4])
    result = case.forget(without(), [3, 4, 5], batch_size=size, already="skip", bound=True)
    assert result.indices == (3, 5) and result.already == (4,)
    assert result.requests == (1 if size is None else 2)
    reference.forget(without(), [4, 3, 5])
    torch.testing.assert_close(case.omega, reference.omega, rtol=1e-8, atol=1e-10)


def test_a_point_twice_in_one_call_is_no_repetition(case: Case) -> None:
    with pytest.raises(RemovalError, match="forgotten already"):
        case.trainer.unlearn(loader([3, 4, 3], batch_size=2), model=case.model, already="skip")
    with pytest.raises(RemovalError, match="named twice"):
        case.trainer.unlearn(loader([3, 4, 3], batch_size=3), model=case.model, already="skip")


@pytest.mark.parametrize("already", ["Skip", True, None])
def test_already_is_one_of_two(case: Case, already: Any) -> None:
    with pytest.raises(ConfigurationError, match="already="):
        case.forget(without(), [3], already=already)


@pytest.mark.parametrize("method", ["none", "retrain"])
def test_rows_without_a_memory_pass_over_too(method: str) -> None:
    trainer, callback, _, data = fit(method=method, newton_steps=0)
    trainer.unlearn(RemovalDataModule(data, [3]))
    before = memory_of(callback)
    again = trainer.unlearn(RemovalDataModule(data, [3]), already="skip")
    assert again.indices == () and again.already == (3,) and memory_of(callback) is before
    more = trainer.unlearn(RemovalDataModule(data, [3, 5]), already="skip")
    assert more.indices == (5,) and more.already == (3,)


# --- the rest of the points, for correctors and bounds ----------------------------------------


@pytest.mark.parametrize("options", [{"bound": True}, {"corrector_steps": 1}], ids=str)
def test_the_rest_is_found_by_content(case: Case, reference: Case, options: dict[str, Any]) -> None:
    case.forget(without(), [5, 30])
    reference.forget(without(), [5, 30])
    order = [i for i in torch.randperm(N).tolist() if i not in (5, 30)]
    moved = case.forget(rows(order), [order.index(17)], **options)
    kept = reference.forget(without(), [17], **options)
    assert moved.indices == kept.indices == (17,)
    torch.testing.assert_close(case.omega, reference.omega, rtol=1e-9, atol=1e-12)
    assert moved.bound == (None if kept.bound is None else pytest.approx(kept.bound, rel=1e-6))


def test_new_rows_are_left_out_and_said(case: Case, reference: Case) -> None:
    x, y = original()
    more = TensorDataset(torch.cat([x[:3] + 9, x]), torch.cat([y[:3], y]))
    with pytest.warns(UserWarning, match="3 rows of the data set are new") as caught:
        found = case.forget(more, [3 + 17], bound=True)
    assert len(caught) == 1 and found.status == "converged"
    assert found.bound == pytest.approx(reference.forget(without(), [17], bound=True).bound)


@pytest.mark.parametrize("options", [{"bound": True}, {"corrector_steps": 1}], ids=str)
def test_a_living_row_that_is_missing_or_changed_is_refused(
    case: Case, options: dict[str, Any]
) -> None:
    before, weights = memory_of(case.callback), case.weights
    with pytest.raises(RemovalError, match=r"\[20, 22\].*2 of 59"):
        case.forget(without(20, 22), [17], **options)
    x, y = original()
    x[20] = 0
    with pytest.raises(RemovalError, match=r"\[20\].*1 of 59"):
        case.forget(TensorDataset(x, y), [17], **options)
    with pytest.raises(RemovalError, match=r"\[31\].*1 of 59"):  # one of two equal rows
        case.forget(without(31), [17], **options)
    assert memory_of(case.callback) is before and torch.equal(case.weights, weights)


def test_the_point_to_forget_need_not_stay_among_the_rest(case: Case, reference: Case) -> None:
    case.forget(without(), [30])
    result = case.forget(without(30), [30], bound=True)  # the row of 31 lies where 30 was
    assert result.indices == (31,)
    assert reference.forget(without(), [30, 31], bound=True).bound == pytest.approx(result.bound)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_a_request_is_read_as_its_loader_would_read_it(batch_size: int | None) -> None:
    removals = RemovalDataModule(Data(), [7, 3, 11], batch_size=batch_size)
    with removal_batches(removals, Trainer(**QUIET)) as batches:
        for read, loaded in zip(batches, removals.predict_dataloader(), strict=True):
            for one, other in zip(read, loaded, strict=True):
                torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


class Once(Table):
    """Rows that are as they were trained at the first reading alone."""

    def __init__(self) -> None:
        super().__init__(*original())
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        again = index in self.read
        self.read.append(index)
        return self.x[index] + float(again), self.y[index]


def test_a_request_in_one_batch_is_of_what_was_read_first(case: Case, reference: Case) -> None:
    """What was compared with the memory is what is forgotten, not what the data set says later."""
    data = Once()
    assert case.forget(data, [7, 2, 19]).indices == (7, 2, 19)
    assert data.read == [7, 2, 19]
    reference.forget(without(), [7, 2, 19])
    assert torch.equal(case.omega, reference.omega)


def test_requests_one_after_the_other_are_compared_as_each_is_read(case: Case) -> None:
    before = case.weights
    with pytest.raises(RemovalError, match=r"\[7\] are not what the memory was built on"):
        case.forget(Once(), [7, 2], batch_size=1)
    assert torch.equal(case.weights, before)
