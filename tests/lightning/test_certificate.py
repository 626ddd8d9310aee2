"""Certified publications: the distance is true, the noise is drawn once, the rest is refused."""

from __future__ import annotations

import copy
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from cases import QUIET, fit, memory_of
from linear_cases import L2, LAMBDA, LINF, OUTPUTS, Linear, LinearData, N, fit_linear
from scipy import optimize
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_muter import (
    TRADES,
    Certificate,
    ConfigurationError,
    L2Ball,
    LinfBall,
    MUterCallback,
    RemovalDataModule,
    RemovalError,
    SolverError,
    Trainer,
    UnlearningMemory,
)
from lightning_muter.lightning.cli import main
from lightning_muter.memory.evidence import evidence
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.report import html
from lightning_muter.unlearning.gaussian_mechanism import largest_mu, seeded

ONE = Certificate(1.0, 1e-5, 1e-5)


# --- the distance -------------------------------------------------------------------------------


def two_outputs(omega: Tensor, x: Tensor, y: Tensor, eps: float, lam: float) -> Tensor:
    """The robust cross-entropy of two outputs, in closed form for an L2 ball."""
    f = x.shape[1]
    w, b = omega[: 2 * f].reshape(2, f), omega[2 * f :]
    seen = torch.cat([w[1] - w[0], (b[1] - b[0]).reshape(1)])
    plain = reference.robust_logistic(seen, x, y, eps, 0.0)
    return plain + 0.5 * len(x) * lam * omega.square().sum()


def l2_optimum(loss: str, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """By Newton's method on autograd's derivatives of the closed form."""
    formula = {"logistic": reference.robust_logistic, "cross_entropy": two_outputs}[loss]

    def robust(v: Tensor) -> Tensor:
        return formula(v, x, y, L2.eps, LAMBDA)

    w = start.clone()
    for _ in range(8):
        (gradient,) = torch.autograd.grad(robust(w.requires_grad_(True)), w)
        w = w.detach() - torch.linalg.solve(reference.hessian(robust, w.detach()), gradient)
    assert float(gradient.norm()) < 1e-9
    return w


@pytest.mark.parametrize("loss", ["logistic", "cross_entropy"])
def test_the_true_distance_is_never_above_the_radius(loss: str) -> None:
    trainer, callback, model, data = fit_linear(loss)
    start, state = memory_of(callback), copy.deepcopy(model.state_dict())
    x, y = data.dataset.tensors
    generator = torch.Generator().manual_seed(0)
    for request in range(40):
        callback.memory = start
        model.load_state_dict(state)
        m = int(torch.randint(1, 7, (1,), generator=generator))
        gone = torch.randperm(N, generator=generator)[:m].tolist()
        keep = [i for i in range(N) if i not in gone]
        radius = float(10.0 ** -(3 + request % 5))
        result = trainer.unlearn(
            RemovalDataModule(data, gone), certificate=Certificate(1.0, 1e-5, radius)
        )
        private = memory_of(callback).private
        assert private is not None and result.bound is not None
        distance = float((private - l2_optimum(loss, x[keep], y[keep], private)).norm())
        assert distance <= result.bound * (1 + 1e-9) + 1e-13 and result.bound <= radius


def test_a_smoothed_ball_and_adaptive_requests_that_compose() -> None:
    trainer, callback, _, data = fit_linear("logistic", LINF, data=LinearData("logistic", n=120))
    x, y = data.dataset.tensors
    gone: list[int] = []
    sigmas = []
    for request in range(50):
        left = [i for i in range(120) if i not in gone]
        published = memory_of(callback).omega
        margins = x[left] @ published[:4] + published[4]
        gone.append(left[int(margins.argmax())])  # chosen by looking at the published model
        result = trainer.unlearn(RemovalDataModule(data, gone[-1:]), certificate=ONE)
        memory, publication = memory_of(callback), result.publication
        assert publication is not None and memory.private is not None
        sigmas.append((memory.omega - memory.private) / publication.sigma)
        assert publication.spent.publications == request + 1
    total = result.publication.spent  # type: ignore[union-attr]
    assert total.mu == pytest.approx(50**0.5 * largest_mu(1.0, 1e-5)) and total.uncertified == ()
    assert 8.0 < total.epsilon < 15.0 and total.delta == 1e-5
    noise = torch.cat(sigmas)  # fresh each time
    assert abs(float(noise.mean())) < 0.3 and 0.8 < float(noise.std()) < 1.2
    keep = [i for i in range(120) if i not in gone]

    def ours(w: Any) -> tuple[float, Any]:
        rest = (x[keep].numpy(), y[keep].numpy())
        return reference.smoothed_linf_logistic(
            w, *rest, LINF.eps, LINF.bandwidth, LAMBDA, bias=True
        )

    first = memory.private.numpy()
    found = optimize.minimize(ours, first, jac=True, method="BFGS", options={"gtol": 1e-9})
    assert float(torch.tensor(found.x - first).norm()) <= ONE.radius


@pytest.mark.parametrize("threat", [L2, LINF], ids=str)
@pytest.mark.parametrize("loss", list(OUTPUTS))
def test_every_setting_of_the_theorem(loss: str, threat: Any) -> None:
    trainer, callback, _, data = fit_linear(loss, threat)
    keep = [i for i in range(N) if i not in (3, 7, 20)]
    result = trainer.unlearn(RemovalDataModule(data, [3, 7, 20]), certificate=ONE)
    again = fit_linear(loss, threat, data=kept(data, loss, keep), newton_steps=40)[1]
    private = memory_of(callback).private
    assert private is not None and result.bound is not None and result.bound <= ONE.radius
    distance = float((private - memory_of(again).omega_star).norm())
    # ridge with an L2 ball: Newton's method of Stage I stops at the kinks
    assert distance <= (ONE.radius if (loss, threat) != ("squared", L2) else 0.05)


def kept(data: LinearData, loss: str, keep: list[int]) -> LinearData:
    rest = LinearData(loss)
    rest.dataset = TensorDataset(*(tensor[keep] for tensor in data.dataset.tensors))
    return rest


# --- what is refused ----------------------------------------------------------------------------


def _features() -> Any:
    return fit(newton_steps=2)


def _of_another_loss() -> Any:
    return fit_linear(_smooth, module=Linear("logistic"), data=LinearData("logistic"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "condition"),
    [
        (lambda: fit_linear("logistic", L2Ball(0.4, data_range=(-9, 9))), "data_range"),
        (lambda: fit_linear("squared", L2Ball(0.4, temperature=0.1)), "temperature"),
        (lambda: fit_linear("logistic", L2Ball(0.4, mean=0.0, std=2.0)), "without mean or std"),
        (lambda: fit_linear("cross_entropy", objective=TRADES(1.0), strict=False), "TRADES"),
        (lambda: fit_linear("logistic", LinfBall(0.1)), "bandwidth"),
        (lambda: fit_linear(weight_decay=0.0, module=Linear("logistic", None, 0.0)), "convex"),
        (lambda: fit_linear(newton_steps=0, horizon=0.1), "horizon"),
        (lambda: fit_linear(method="newton"), "method"),
        (lambda: fit_linear(method="none"), "method"),
        (lambda: fit_linear(head=None, parameters=["head.weight", "head.bias"]), "linear head"),
        (lambda: fit_linear(space="features", response="unconstrained"), "features"),
        (lambda: fit_linear("cross_entropy", module=Linear("cross_entropy", 3)), "3 outputs"),
        (lambda: _of_another_loss(), "loss"),
        (_features, "3 outputs"),
        (lambda: fit_linear(threat=Ball(0.4)), "threat"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_each_condition_is_refused_by_name(make: Any, condition: str) -> None:
    trainer, callback, model, data = make()
    before = copy.deepcopy(model.state_dict())
    memory = callback.memory
    with pytest.raises(ConfigurationError, match=condition):
        trainer.unlearn(RemovalDataModule(data, [1, 2]), certificate=ONE)
    assert callback.memory is memory
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


class Ball(L2Ball):
    """A user's own."""


def _smooth(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.softplus((1 - 2.0 * targets) * outputs.squeeze(1))


class Behind(Linear):
    """A linear model behind a frozen map."""

    def __init__(self) -> None:
        super().__init__("logistic")
        self.frozen = torch.nn.Linear(4, 4)
        torch.nn.init.constant_(self.frozen.bias, 0.1)
        torch.nn.init.eye_(self.frozen.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(x))


def test_a_frozen_network_gets_a_number_and_its_features_a_certificate() -> None:
    trainer, _, model, data = fit_linear(module=Behind())
    removals = RemovalDataModule(data, [1, 2])
    with pytest.raises(ConfigurationError, match="compute the features once"):
        trainer.unlearn(removals, certificate=ONE)
    x, y = data.dataset.tensors
    plain = trainer.unlearn(RemovalDataModule(data, [1]), bound=True)
    assert plain.bound is not None
    assert plain.certificate.startswith("no certificate: the maximiser is not known to be global")
    wide = trainer.unlearn(RemovalDataModule(data, [2]), bound=True, inner_gap=0.01)
    assert wide.bound is not None and wide.bound > plain.bound
    assert "inner gap of at most 0.01" in wide.certificate and wide.publication is None
    embedded = LinearData("logistic")
    with torch.no_grad():
        embedded.dataset = TensorDataset(model.frozen(x), y)
    other = fit_linear(data=embedded)[0]
    assert other.unlearn(RemovalDataModule(embedded, [1]), certificate=ONE).publication


def test_a_radius_that_is_not_reached_changes_nothing(tmp_path: Path) -> None:
    trainer, callback, model, data = fit_linear(memory_dir=str(tmp_path))
    before, memory = copy.deepcopy(model.state_dict()), callback.memory
    files = {
        path: path.read_bytes() for path in (*tmp_path.glob("base-*"), tmp_path / "model.ckpt")
    }
    newest, state = MemoryStore(tmp_path).newest(), torch.get_rng_state()
    with pytest.raises(SolverError, match="rounding alone.*larger radius"):
        trainer.unlearn(RemovalDataModule(data, [1]), certificate=Certificate(1.0, 1e-5, 1e-16))
    assert callback.memory is memory and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert {path: path.read_bytes() for path in files} == files
    assert MemoryStore(tmp_path).newest() == newest


def test_rows_that_changed_are_no_evidence() -> None:
    trainer, _, _, data = fit_linear()
    data.dataset.tensors[0][20] = 0.0
    with pytest.raises(RemovalError, match=r"\[20\]"):
        trainer.unlearn(RemovalDataModule(data, [1]), certificate=ONE)
    x, y = data.dataset.tensors
    with pytest.raises(ConfigurationError, match="RemovalDataModule"):
        trainer.unlearn(DataLoader(TensorDataset(x[:1], y[:1])), certificate=ONE)


# --- what is published, and what is kept --------------------------------------------------------


def test_the_model_has_the_noise_and_the_store_keeps_the_rest_apart(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    trainer, callback, model, data = fit_linear(memory_dir=str(folder))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    result = trainer.unlearn(RemovalDataModule(data, [1, 5], 1), certificate=ONE, note="§17")
    assert torch.equal(torch.get_rng_state(), state)  # no seed of the user's has a part in it
    memory = memory_of(callback)
    assert memory.private is not None and result.publication is not None
    torch.testing.assert_close(callback.settings.view(model).get(), memory.omega, rtol=0, atol=0)
    saved = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(saved["head.weight"].flatten(), memory.omega[:4], rtol=0, atol=0)
    length = float((memory.omega - memory.private).norm())
    assert ONE.sigma / 10 < length < 10 * ONE.sigma
    again = UnlearningMemory.load(folder)
    assert again.private is not None
    torch.testing.assert_close(again.private, memory.private, rtol=0, atol=0)
    torch.testing.assert_close(again.omega, memory.omega, rtol=0, atol=0)
    known = evidence(MemoryStore(folder))
    lines = [entry["publication"] for entry in known["requests"]]
    assert [line["first"] for line in lines] == [1, 1] and lines[0]["noise"] == "system"
    assert known["certified"]["publications"] == 1
    page = " ".join(html(known).split())
    assert "(1, 1e-05)-indistinguishable" in page and "Not covered" in page
    assert json.loads(json.dumps(result.to_dict()))["publication"]["radius"] == 1e-5
    # an uncertified request takes the word back, and says which
    trainer.unlearn(RemovalDataModule(data, [9]))
    assert memory_of(callback).private is None and UnlearningMemory.load(folder).private is None
    known = evidence(MemoryStore(folder))
    assert known["certified"]["uncertified"] == [3]
    assert "after the requests 3 were published without" in " ".join(html(known).split())


def test_a_rebase_keeps_the_published_model(tmp_path: Path) -> None:
    trainer, callback, _, data = fit_linear(memory_dir=str(tmp_path))
    trainer.unlearn(RemovalDataModule(data, [1, 5]), certificate=ONE)
    before = memory_of(callback)
    trainer.rebase(data)
    after = UnlearningMemory.load(tmp_path)
    torch.testing.assert_close(after.omega, before.omega, rtol=0, atol=0)
    assert after.private is not None and before.private is not None
    torch.testing.assert_close(after.private, after.omega_star, rtol=0, atol=0)
    torch.testing.assert_close(after.private, before.private, rtol=0, atol=ONE.radius)
    with pytest.warns(UserWarning, match="new since training"):  # forgotten rows are there still
        result = trainer.unlearn(RemovalDataModule(data, [9]), certificate=ONE)
    assert result.publication is not None and result.publication.spent.publications == 2


def test_a_tests_noise_is_said_to_protect_nobody(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        trainer, callback, _, data = fit_linear(memory_dir=str(tmp_path), overwrite=True)
        with seeded(3):
            result = trainer.unlearn(RemovalDataModule(data, [1]), certificate=ONE)
        assert result.publication is not None and result.publication.noise == "test"
        found.append(memory_of(callback).omega)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    assert "protects nobody" in html(evidence(MemoryStore(tmp_path)))


def test_precision_of_the_module_does_not_matter_to_the_proof() -> None:
    module, data = Linear("logistic"), LinearData("logistic")
    x, y = data.dataset.tensors
    data.dataset = TensorDataset(x.float(), y)
    callback = MUterCallback(L2, head="head", loss="logistic", newton_steps=12, attack_steps=3)
    trainer = Trainer(max_epochs=1, callbacks=[callback], **{**QUIET, "precision": "32-true"})
    trainer.fit(module, data)
    trainer.unlearn(RemovalDataModule(data, [2]), certificate=ONE)
    keep = [i for i in range(N) if i != 2]
    private = memory_of(callback).private
    assert private is not None
    x = x.float().double()
    assert float((private - l2_optimum("logistic", x[keep], y[keep], private)).norm()) <= 1e-5


class Counted(Dataset[Any]):
    """Counts how often each row is read."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.reads = data, Counter[int]()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        return self.data[index]


def test_a_request_reads_each_remaining_row_once() -> None:
    trainer, _, _, loader = fit_linear()
    counted = Counted(loader.dataset)
    trainer.unlearn(RemovalDataModule(counted, [3, 7]), certificate=ONE)
    assert {counted.reads[i] for i in range(N) if i not in (3, 7)} == {1}


@pytest.mark.parametrize("order", ["as it was", "another", "with new rows", "without gone ones"])
def test_rows_may_have_moved_but_the_proof_is_of_the_right_ones(order: str) -> None:
    trainer, callback, _, loader = fit_linear()
    x, y = loader.dataset.tensors
    trainer.unlearn(RemovalDataModule(loader.dataset, [5]), certificate=ONE)
    rows = torch.arange(N)
    if order == "another":
        rows = rows.flip(0)
    if order == "without gone ones":
        rows = rows[rows != 5]
    data = TensorDataset(x[rows], y[rows])
    if order == "with new rows":
        data = TensorDataset(torch.cat([torch.ones_like(x[:1]), x]), torch.cat([y[:1], y]))
    place = int((data.tensors[0] == x[9]).all(dim=1).nonzero()[0])
    said = pytest.warns(UserWarning, match="new since training") if len(data) > N else nullcontext()
    with said:
        trainer.unlearn(RemovalDataModule(data, [place]), certificate=ONE)
    keep = torch.ones(N, dtype=torch.bool)
    keep[[5, 9]] = False
    private = memory_of(callback).private
    assert private is not None
    assert float((private - l2_optimum("logistic", x[keep], y[keep], private)).norm()) <= 1e-5


def test_the_command_line_takes_the_three_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-muter"])
    monkeypatch.chdir(tmp_path)
    fit_linear(memory_dir=str(tmp_path / "memory"))
    classes = ["--model", "linear_cases.Linear", "--model.loss", "logistic"]
    classes += ["--data", "linear_cases.LinearData", "--data.loss", "logistic"]
    asked = ["--memory", "memory", "--indices", "[3]", "--trainer.logger", "false"]
    numbers = ["--certificate.epsilon", "1", "--certificate.delta", "1e-5"]
    main(["unlearn", *classes, *asked, *numbers, "--certificate.radius", "1e-5"])
    assert "(1, 1e-05)-indistinguishable" in caplog.text
    assert UnlearningMemory.load("memory").private is not None
    preset = tmp_path / "certificate.yaml"
    preset.write_text("certificate: {epsilon: 2.0, delta: 1.0e-5, radius: 1.0e-5}")
    for publication, config in ((2, str(preset)), (3, "certificate")):
        index = f"[{publication + 2}]"
        again = ["--memory", "memory", "--indices", index, "--trainer.logger", "false"]
        main(["unlearn", *classes, "-c", config, *again])
        assert f"{publication} publications so far" in caplog.text
    assert "(2, 1e-05)-indistinguishable" in caplog.text
    radii = [entry["publication"]["radius"] for entry in UnlearningMemory.load("memory").ledger]
    assert radii == [1e-5, 1e-5, 1e-5]


def test_a_memory_of_rows_is_certified_as_a_dense_one() -> None:
    found = []
    for representation in ("dense", "rows"):
        trainer, callback, _, data = fit_linear("cross_entropy", representation=representation)
        result = trainer.unlearn(RemovalDataModule(data, [3, 7]), certificate=ONE)
        assert result.publication is not None and result.publication.rebuilds == 0
        found.append(memory_of(callback).private)
    assert float((found[0] - found[1]).norm()) <= 2 * ONE.radius
