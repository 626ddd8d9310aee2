"""A request does what was asked, on the user's terms, or changes nothing."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET, Data, Net, fit, memory_of
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    ConfigurationError,
    L2Ball,
    MUterCallback,
    RemovalDataModule,
    RemovalError,
    SolverError,
    StateError,
    Trainer,
    UnlearningMemory,
    UnlearningModule,
)
from lightning_muter.unlearning.objective import RobustObjective


@pytest.fixture(scope="module")
def fitted() -> tuple[MUterCallback, Net]:
    _, callback, model, _ = fit()
    return callback, model


class Case:
    """A trained model with its memory in a trainer that has run nothing yet."""

    def __init__(self, fitted: tuple[MUterCallback, Net]) -> None:
        self.callback, self.model = copy.copy(fitted[0]), copy.deepcopy(fitted[1])
        self.data = Data()
        self.trainer = Trainer(callbacks=[self.callback], **QUIET)

    def unlearn(self, removals: Any, **options: Any) -> Any:
        return self.trainer.unlearn(removals, model=self.model, **options)

    def state(self) -> dict[str, Any]:
        """All that a failed call must leave alone."""
        model = self.model
        return {
            "memory": id(self.callback.memory),
            "weights": {k: v.clone() for k, v in model.state_dict().items()},
            "places": [(str(p.device), p.dtype, p.requires_grad) for p in model.parameters()],
            "modes": [m.training for m in model.modules()],
            "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "module": id(self.trainer.lightning_module),
        }


@pytest.fixture
def case(fitted: tuple[MUterCallback, Net]) -> Case:
    return Case(fitted)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


class Spy(pl.Callback):
    """Counts the hooks of a loop that must not run."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_predict") or name == "setup":
            object.__getattribute__(self, "seen").append(name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize(
    "setting",
    [
        {"limit_predict_batches": 1},
        {"limit_predict_batches": 0},
        {"fast_dev_run": True},
        {"precision": "32-true"},
        {"precision": "bf16-mixed"},
        {"inference_mode": False},
    ],
    ids=str,
)
def test_the_trainers_settings_are_about_its_loops(case: Case, setting: dict[str, Any]) -> None:
    spy = Spy()
    case.trainer = Trainer(callbacks=[case.callback, spy], **{**QUIET, **setting})
    spy.seen.clear()
    result = case.unlearn(RemovalDataModule(case.data, [3, 4, 9], batch_size=1))
    assert result.indices == (3, 4, 9) and result.requests == 3
    assert memory_of(case.callback).remaining == [i for i in range(41) if i not in (3, 4, 9)]
    assert spy.seen == []
    assert next(case.model.parameters()).dtype == torch.float64


@pytest.mark.parametrize("fails", [False, True])
def test_the_trainer_is_the_users_afterwards(fails: bool, tmp_path: Any) -> None:
    trainer, callback, model, data = fit(newton_steps=2)
    state = copy.deepcopy(trainer.state)
    if fails:
        data.dataset.tensors[0][9] += 1
        with pytest.raises(RemovalError):
            trainer.unlearn(RemovalDataModule(data, [3, 9]))
        data.dataset.tensors[0][9] -= 1
    else:
        trainer.unlearn(RemovalDataModule(data, [3, 9]))
    assert trainer.lightning_module is model and model.trainer is trainer
    assert trainer.state == state
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == model.state_dict().keys()
    metrics = trainer.test(trainer.lightning_module, data.test_dataloader(), verbose=False)
    assert "test_loss" in metrics[0]


@pytest.mark.parametrize(
    "options",
    [{"noise_std": -1.0}, {"corrector_steps": 1.5}, {"bound": "yes"}, {"inner_gap": 0.1}],
    ids=str,
)
def test_arguments_that_are_none_change_nothing(case: Case, options: dict[str, Any]) -> None:
    before = case.state()
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        case.unlearn(RemovalDataModule(case.data, [3]), **options)
    assert same(case.state(), before)


@pytest.mark.parametrize("indices", [[3.7], [True], ["3"], [-1], [41], [2, 2], []], ids=str)
def test_indices_that_are_none_change_nothing(case: Case, indices: list[Any]) -> None:
    before = case.state()
    with pytest.raises(RemovalError):
        case.unlearn(RemovalDataModule(case.data, indices))
    assert same(case.state(), before)


def test_indices_of_numpy_and_torch(case: Case) -> None:
    chosen = [np.int64(3), torch.tensor(4)]
    assert case.unlearn(RemovalDataModule(case.data, chosen)).indices == (3, 4)
    chosen = np.array([5, 6], dtype=np.uint8)
    assert case.unlearn(RemovalDataModule(case.data, chosen)).indices == (5, 6)  # type: ignore[arg-type]


class Partial(RemovalDataModule):
    """Yields fewer points than it names."""

    def predict_dataloader(self) -> Any:
        return [batch for batch in super().predict_dataloader()][:-1]


class Later(RemovalDataModule):
    """Fails after its first batch."""

    def predict_dataloader(self) -> Any:
        def batches() -> Iterator[Any]:
            yield next(iter(super(Later, self).predict_dataloader()))
            torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
            raise OSError("the disk is gone")

        return batches()


def _blanked(case: Case) -> Any:
    case.data.dataset.tensors[0][20] = 0.0
    case.data.dataset.tensors[0][30] = float("nan")
    return RemovalDataModule(case.data, [3])


def _without_last(case: Case) -> Any:
    x, y = case.data.dataset.tensors
    return RemovalDataModule(TensorDataset(x[:-1], y[:-1]), [3])


def _points(case: Case, indices: list[int], **options: Any) -> Any:
    x, y = case.data.dataset.tensors
    return DataLoader(TensorDataset(x[indices], y[indices]), **options)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda c: Partial(c.data, [3, 4], 1), {}, RemovalError, r"missing \[4\]"),
        (lambda c: Partial(c.data, [3], 1), {}, RemovalError, "no batch"),
        (lambda c: Later(c.data, [3, 4], 1), {}, OSError, "the disk is gone"),
        (_blanked, {"bound": True}, RemovalError, r"\[20, 30\]"),
        (_blanked, {"corrector_steps": 1}, RemovalError, r"\[20, 30\]"),
        (_without_last, {"bound": True}, RemovalError, r"\[40\].*1 of 40"),
        (lambda c: _points(c, [3, 4, 3], batch_size=2), {}, RemovalError, "forgotten already"),
        (lambda c: _points(c, [3, 4, 5], batch_size=2, drop_last=True), {}, RemovalError, "out of"),
        (lambda c: _points(c, [3]), {"bound": True}, ConfigurationError, "RemovalDataModule"),
        (lambda c: [3, 17], {}, RemovalError, "RemovalDataModule"),
        (lambda c: 3, {}, RemovalError, "RemovalDataModule"),
        (lambda c: [[torch.zeros(2, 8), torch.zeros(1), [1]]], {}, RemovalError, "one of each"),
        (lambda c: [[torch.zeros(0, 8), torch.zeros(0)]], {}, RemovalError, "shape"),
        (lambda c: [[torch.zeros(1, 8), torch.zeros(1), [0.5]]], {}, RemovalError, "integers"),
    ],
)
def test_a_refused_request_changes_nothing(
    case: Case, make: Callable[[Case], Any], options: Any, error: Any, message: str, tmp_path: Any
) -> None:
    case.callback.memory_dir = str(tmp_path)
    memory_of(case.callback).save(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    case.model.train()
    case.model.classifier.weight.requires_grad_(False)
    before = case.state()
    with pytest.raises(error, match=message):
        case.unlearn(make(case), **options)
    assert same(case.state(), before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_rows_that_nobody_reads_may_have_changed(case: Case) -> None:
    assert case.unlearn(_blanked(case)).indices == (3,)


@pytest.mark.parametrize("where", [1, 2, 3])
def test_a_corrector_that_fails_leaves_the_model(
    case: Case, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    real = RobustObjective._pass

    def breaks(self: RobustObjective, *args: Any) -> Any:
        passes.append(1)
        if len(passes) == where:
            raise SolverError("out of luck")
        return real(self, *args)

    monkeypatch.setattr(RobustObjective, "_pass", breaks)
    before = case.state()
    with pytest.raises(SolverError, match="out of luck"):
        case.unlearn(
            RemovalDataModule(case.data, [3, 4]), corrector_steps=1, bound=True, noise_std=0.1
        )
    assert same(case.state(), before)
    monkeypatch.undo()
    assert case.unlearn(RemovalDataModule(case.data, [3, 4]), corrector_steps=1).indices == (3, 4)


def test_a_gradient_without_end_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RobustObjective._pass

    def endless(self: RobustObjective, *args: Any) -> Any:
        found = real(self, *args)
        return replace(found, gradient=found.gradient * float("nan"))

    monkeypatch.setattr(RobustObjective, "_pass", endless)
    before = case.state()
    with pytest.raises(SolverError, match="not finite"):
        case.unlearn(RemovalDataModule(case.data, [3]), corrector_steps=2)
    assert same(case.state(), before)
    result = case.unlearn(RemovalDataModule(case.data, [3]), bound=True)
    assert result.bound is None and "not finite" in result.certificate


def test_another_precision_is_refused_unconverted(case: Case) -> None:
    case.model.float()
    before = case.state()
    case.trainer = Trainer(callbacks=[case.callback], **QUIET)
    with pytest.raises(StateError, match="float32"):
        case.unlearn(RemovalDataModule(case.data, [3]))
    after = case.state()
    assert same(after["places"], before["places"]) and same(after["weights"], before["weights"])


def test_a_frozen_head_forgets_and_stays_frozen(case: Case) -> None:
    case.model.classifier.requires_grad_(False)
    before = case.state()
    case.unlearn(RemovalDataModule(case.data, [3]), corrector_steps=1, bound=True)
    after = case.state()
    for name in ("places", "modes", "hooks", "torch", "python", "numpy"):
        assert same(after[name], before[name]), name
    assert not same(after["weights"], before["weights"])


def test_noise_comes_last_and_from_the_seed(case: Case, fitted: Any) -> None:
    found = []
    for noise in (0.0, 0.5, 0.5):
        one = Case(fitted)
        torch.manual_seed(7)
        one.unlearn(
            RemovalDataModule(one.data, [3, 4], 1),
            noise_std=noise,
            corrector_steps=2,
        )
        found.append(memory_of(one.callback).omega)
        weights = one.callback.settings.view(one.model).get()
        torch.testing.assert_close(weights, found[-1])
    torch.manual_seed(7)
    noise = 0.5 * torch.randn(len(found[0]), dtype=torch.float64)
    torch.testing.assert_close(found[1] - found[0], noise)
    assert torch.equal(found[1], found[2])
    one = Case(fitted)
    torch.manual_seed(7)
    for index in (3, 4):  # two requests of one process have noise of their own
        one.unlearn(RemovalDataModule(one.data, [index]), noise_std=0.5)
        found.append(memory_of(one.callback).omega)
    assert not torch.allclose(found[-1] - found[-2], torch.zeros(1).double(), atol=0.1)


def test_the_bound_is_of_the_model_that_goes_out(case: Case) -> None:
    removals = RemovalDataModule(case.data, [3])
    quiet = Case((case.callback, case.model)).unlearn(removals, bound=True).bound
    noisy = case.unlearn(removals, bound=True, noise_std=1.0).bound
    assert quiet is not None and noisy is not None and noisy > 10 * quiet


def test_warnings_stay_with_the_memory_and_say_so_once(case: Case, tmp_path: Any) -> None:
    said = "the retrace error is 0.4"
    memory = replace(memory_of(case.callback), warnings=(said,))
    memory.save(tmp_path)
    with pytest.warns(UserWarning, match="retrace error") as caught:
        result = case.unlearn(RemovalDataModule(case.data, [3, 4], 1), memory=tmp_path)
    assert len(caught) == 1
    assert result.warnings == (said,) and result.status == "doubtful"
    assert result.to_dict()["warnings"] == [said]
    assert UnlearningMemory.load(tmp_path).warnings == (said,)
    assert memory_of(case.callback).ledger == ()  # another memory was named
    quiet = Case((case.callback, copy.deepcopy(case.model)))
    before = UnlearningMemory.load(tmp_path)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="retrace error"):
        warnings.simplefilter("error")  # who wants errors gets one before anything changed
        quiet.unlearn(RemovalDataModule(case.data, [5]), memory=tmp_path)
    assert UnlearningMemory.load(tmp_path).ledger == before.ledger


def test_a_logger_that_fails_is_no_failed_request(case: Case) -> None:
    class Broken(pl.loggers.CSVLogger):
        def log_metrics(self, *args: Any, **options: Any) -> None:
            raise OSError("full")

    case.trainer = Trainer(callbacks=[case.callback], **{**QUIET, "logger": Broken("unused")})
    with pytest.warns(UserWarning, match="is committed, but Broken"):
        result = case.unlearn(RemovalDataModule(case.data, [3]))
    assert result.indices == (3,) and len(memory_of(case.callback).ledger) == 1


def test_a_callback_of_another_threat_or_decay_is_refused(case: Case, tmp_path: Any) -> None:
    memory_of(case.callback).save(tmp_path)
    known = {"head": "classifier", "threat": case.callback.settings.threat}
    for other in (
        {**known, "weight_decay": 0.5},
        {**known, "weight_decay": 0.0},
        {**known, "horizon": "training"},
        {**known, "loss": lambda z, y: z.sum(dim=1)},
        {**known, "damping": 1.0},
    ):
        trainer = Trainer(callbacks=[MUterCallback(**other)], **QUIET)
        with pytest.raises(ConfigurationError, match="the callback"):
            trainer.unlearn(RemovalDataModule(case.data, [3]), model=case.model, memory=tmp_path)
    trainer = Trainer(callbacks=[MUterCallback(**known)], **QUIET)
    trainer.unlearn(RemovalDataModule(case.data, [3]), model=case.model, memory=tmp_path)


def test_several_processes_that_do_not_run_are_refused(case: Case) -> None:
    case.trainer = Trainer(callbacks=[case.callback], devices=2, strategy="ddp_spawn", **QUIET)
    before = memory_of(case.callback)
    with pytest.raises(ConfigurationError, match="2 processes"):
        case.unlearn(RemovalDataModule(case.data, [3]))
    assert memory_of(case.callback) is before


def test_a_predict_loop_of_ones_own(case: Case, tmp_path: Any) -> None:
    memory = memory_of(case.callback)
    server = UnlearningModule(case.model, memory, memory_dir=str(tmp_path))
    pl.Trainer(**QUIET).predict(server, RemovalDataModule(case.data, [3, 4], 1))
    assert [e["indices"] for e in UnlearningMemory.load(tmp_path).ledger] == [[3], [4]]
    weights = memory.settings.view(case.model).get()
    torch.testing.assert_close(weights, server.memory.omega)
    assert memory.ledger == ()


@pytest.mark.parametrize("method", ["none", "retrain"])
def test_rows_without_a_memory_take_no_extras_and_leave_the_trainer(method: str) -> None:
    trainer, callback, model, data = fit(method=method, newton_steps=0)
    with pytest.raises(ConfigurationError, match="noise_std"):
        trainer.unlearn(RemovalDataModule(data, [3]), noise_std=0.1)
    trainer.unlearn(RemovalDataModule(data, [3]))
    assert model.trainer is trainer and trainer.lightning_module is model
    assert memory_of(callback).remaining == [i for i in range(41) if i != 3]


def test_a_retrain_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, callback, model, data = fit(method="retrain", newton_steps=0)
    before, weights = memory_of(callback), copy.deepcopy(model.state_dict())

    def fails(*args: Any) -> Any:
        raise OSError("no power")

    monkeypatch.setattr(Net, "training_step", fails)
    with pytest.raises(OSError, match="no power"):
        trainer.unlearn(RemovalDataModule(data, [3]))
    assert memory_of(callback) is before and same(dict(model.state_dict()), dict(weights))
    assert model.trainer is trainer


def test_a_datamodule_without_points_to_forget_is_refused_by_name() -> None:
    trainer, _, _, data = fit(newton_steps=0, attack_steps=2, method="newton")
    with pytest.raises(RemovalError, match=r"Data has no predict_dataloader.*RemovalDataModule"):
        trainer.unlearn(data)


def test_a_tuple_of_loaders_is_read_as_a_list_of_them_is() -> None:
    x, y = Data().dataset.tensors
    found = []
    for kind in (list, tuple):
        trainer, callback, _, _ = fit(newton_steps=0, attack_steps=2, method="newton")
        loaders = [DataLoader(TensorDataset(x[i : i + 2], y[i : i + 2])) for i in (3, 17)]
        assert trainer.unlearn(kind(loaders)).indices == (3, 4, 17, 18)
        found.append(memory_of(callback).omega)
    assert torch.equal(*found)


@pytest.mark.parametrize("wrong", [3, 0.5, {"folder": "x"}])
def test_a_memory_that_is_none_is_refused(wrong: Any) -> None:
    trainer, _, _, data = fit(newton_steps=0, attack_steps=2, method="newton")
    with pytest.raises(ConfigurationError, match="must be an UnlearningMemory or the path"):
        trainer.unlearn(RemovalDataModule(data, indices=[3]), memory=wrong)


@pytest.mark.parametrize(
    "removals", [np.array([3, 17]), {3, 17}, (3, 17), torch.tensor([3, 17]), range(3, 18, 14)]
)
def test_indices_of_any_kind_name_rows_without_data(removals: Any) -> None:
    trainer, callback, _, _ = fit(representation="rows", sketch=40, attack_steps=2)
    assert sorted(trainer.unlearn(removals).indices) == [3, 17]


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"max_steps": 3},
    ],
)
def test_retrain_trains_as_training_did(options: dict[str, Any]) -> None:
    class Whole(Data):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.dataset, batch_size=64)  # one batch: no order matters

    def trained(data: Data, method: str) -> tuple[Any, MUterCallback]:
        pl.seed_everything(0, verbose=False)
        callback = MUterCallback(
            L2Ball(0.5), head="classifier", method=method, random_start=False, attack_steps=2
        )
        trainer = Trainer(**{"max_epochs": 5, **options, "callbacks": [callback], **QUIET})
        trainer.fit(Net(), data)
        return trainer, callback

    trainer, callback = trained(Whole(), "retrain")
    trainer.unlearn(RemovalDataModule(Whole(), indices=[3, 17]))
    _, expected = trained(Whole(keep=[i for i in range(41) if i not in (3, 17)]), "none")
    torch.testing.assert_close(memory_of(callback).omega, memory_of(expected).omega)


class Made(Net):
    """A module whose arguments are objects, as configs of other tools make them."""

    def __init__(self, criterion: torch.nn.Module, cache: Path) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_the_folders_model_follows_a_module_whose_arguments_are_objects(tmp_path: Path) -> None:
    folder, data = tmp_path / "memory", Data()
    pl.seed_everything(0, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own advice on modules among them
        model = Made(torch.nn.CrossEntropyLoss(), tmp_path)
    callback = MUterCallback(
        L2Ball(0.5), head="classifier", newton_steps=15, memory_dir=str(folder)
    )
    with pytest.warns(UserWarning, match=r"leaves out hyper_parameters\.c"):
        Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(model, data)
    Trainer(**QUIET).unlearn(RemovalDataModule(data, [3]), model=model, memory=str(folder))
    kept = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    for name, value in UnlearningMemory.load(folder).state().items():
        torch.testing.assert_close(kept[name], value.to(kept[name]))
