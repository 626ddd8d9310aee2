"""TRADES through fit, its checks, the memory, requests, corrector, influence, and a Retrain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import QUIET, Data, Net, Traded, memory_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    TRADES,
    Attack,
    ConfigurationError,
    L2Ball,
    MUterCallback,
    RemovalDataModule,
    Trainer,
    UnlearningMemory,
    adversarial_influence,
)
from lightning_muter.models import measuring
from lightning_muter.unlearning.points import unweighted

BETA = 3.0


class Own(Traded):
    """A training step with the objective's own loss."""

    def __init__(self) -> None:
        super().__init__(TRADES(beta=BETA))


class Written(Net):
    """The loss as the paper's code writes it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, adversarial = batch
        divergence = F.kl_div(
            F.log_softmax(self(adversarial), dim=1),
            F.softmax(self(x), dim=1),
            reduction="batchmean",
        )
        return F.cross_entropy(self(x), y) + BETA * divergence


class Other(Net):
    """Adversarial training's loss on batches that TRADES made."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[2]), batch[1])


def fitted(
    module: type[Net], data: Any = None, epochs: int = 1, **options: Any
) -> tuple[Any, MUterCallback]:
    pl.seed_everything(0, verbose=False)
    model = module()
    options = {"newton_steps": 12, "objective": TRADES(beta=BETA), **options}
    callback = MUterCallback(**{"threat": L2Ball(0.5), "head": "classifier", **options})
    trainer = Trainer(max_epochs=epochs, callbacks=[callback], **QUIET)
    trainer.fit(model, data or Data())
    return trainer, callback


@pytest.mark.parametrize("module", [Own, Written])
def test_fit_unlearn_reload_unlearn(module: type[Net], tmp_path: Path) -> None:
    data, folder = Data(), tmp_path / "memory"
    threat = L2Ball(0.5, temperature=0.02)  # see the test of the two sides below
    trainer, callback = fitted(module, data, memory_dir=str(folder), threat=threat)
    model = trainer.lightning_module
    memory = memory_of(callback)
    assert callback.findings == []
    assert memory.summary["residual_gradient"] < 1e-7
    result = trainer.unlearn(RemovalDataModule(data, [3, 17]), bound=True, corrector_steps=0)
    assert result.bound is None and "TRADES need not be convex" in result.certificate
    again = UnlearningMemory.load(folder)
    assert again.settings.objective == TRADES(beta=BETA)
    other = module().double()
    other.load_state_dict(model.state_dict())
    result = Trainer(**QUIET).unlearn(
        RemovalDataModule(data, [5]), model=other, memory=str(folder), corrector_steps=6
    )
    rest = [i for i in range(41) if i not in (3, 5, 17)]
    _, fresh = fitted(module, Data(keep=rest), threat=threat)
    optimum = memory_of(fresh).omega_star
    reached = UnlearningMemory.load(folder).omega
    assert float((reached - optimum).norm()) <= 1e-4 * float((memory.omega_star - optimum).norm())


def test_another_loss_is_found_out() -> None:
    with pytest.raises(ConfigurationError, match=r"not that of TRADES\(beta=3\).loss"):
        fitted(Other)
    with pytest.raises(ConfigurationError, match="gradient"):
        fitted(Own, objective=TRADES(beta=2 * BETA))
    with pytest.raises(ConfigurationError, match="gradient"):
        fitted(Own, loss=nn.CrossEntropyLoss(label_smoothing=0.2))


def test_the_memory_is_not_adversarial_trainings(tmp_path: Path) -> None:
    trainer, _ = fitted(Own, newton_steps=1, memory_dir=str(tmp_path / "memory"))
    other = MUterCallback(L2Ball(0.5), "classifier", memory_dir=str(tmp_path / "memory"))
    with pytest.raises(ConfigurationError, match=r"objective.*TRADES.*None"):
        Trainer(callbacks=[other], **QUIET).unlearn(
            RemovalDataModule(Data(), [1]),
            model=trainer.lightning_module,
            memory=str(tmp_path / "memory"),
        )


@pytest.mark.parametrize("random_start", [True, False])
def test_the_attack_raises_the_divergence_and_the_batch_keeps_its_clean_points(
    random_start: bool,
) -> None:
    torch.manual_seed(0)
    model, data = Net().double().eval(), Data()
    x, y = data.dataset.tensors
    callback = MUterCallback(
        L2Ball(0.5), "classifier", objective=TRADES(beta=BETA), random_start=random_start
    )
    moved = callback.perturb(model, x, y)
    assert bool(((moved - x).norm(dim=1) > 0.45).all())
    with torch.no_grad():
        log_p, log_q = (model(z).log_softmax(dim=1) for z in (x, moved))
        reached = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        for _ in range(20):
            noise = F.normalize(torch.randn_like(x), dim=1) * 0.5
            log_q = model(x + noise).log_softmax(dim=1)
            other = (log_p.exp() * (log_p - log_q)).sum(dim=1)
            assert float(other.mean()) <= 0.8 * float(reached.mean())


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*")
def test_robust_accuracy_is_of_an_attack_on_the_label() -> None:
    trainer, _ = fitted(Own, method="none", newton_steps=0)
    model = trainer.lightning_module
    (scores,) = trainer.test(model, Data(), verbose=False)
    plain = MUterCallback(L2Ball(0.5), "classifier")
    (expected,) = Trainer(callbacks=[plain], **QUIET).test(model, Data(), verbose=False)
    assert scores["test_robust_acc"] == pytest.approx(expected["test_robust_acc"], abs=0.03)
    assert scores["test_clean_acc"] == expected["test_clean_acc"]


def test_influence_is_of_the_objectives_gradient() -> None:
    data = Data()
    trainer, callback = fitted(Own, data, newton_steps=1)
    memory, model = memory_of(callback), trainer.lightning_module
    x, y = (t[:4] for t in data.dataset.tensors)
    found = adversarial_influence(memory, model, (x, y))
    settings = memory.settings
    view, problem = settings.view(model), settings.problem()
    with measuring(model), view.at(memory.omega_star):
        delta = problem.perturb(view, unweighted(x, y)).delta
        rows = []
        for i in range(4):
            clean, moved = model(x[[i]]), model(x[[i]] + delta[[i]])
            log_p, log_q = clean.log_softmax(dim=1), moved.log_softmax(dim=1)
            divergence = (log_p.exp() * (log_p - log_q)).sum()
            loss = F.cross_entropy(clean, y[[i]]) + BETA * divergence
            rows.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, view.parameters)])
            )
    assert memory.curvature is not None
    expected = -41 * torch.linalg.solve(memory.curvature.matrix, torch.stack(rows).T).T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_horizon_and_the_other_methods_run() -> None:
    data = Data()
    trainer, callback = fitted(Own, data, newton_steps=0, horizon="training", method="muter")
    assert memory_of(callback).summary["retrace_error"] < 1.0
    trainer.unlearn(RemovalDataModule(data, [2]))
    for method in ("newton", "fisher_delta", "influence"):
        trainer, _ = fitted(Own, data, method=method, newton_steps=1)
        trainer.unlearn(RemovalDataModule(data, [2]))


def test_an_optimum_where_two_sides_tie_and_a_temperature_that_has_none() -> None:
    """Here the optimum sits on the kink of a point whose two maxima are equally high."""
    _, hard = fitted(Own, newton_steps=6)
    assert memory_of(hard).summary["residual_gradient"] > 1e-3
    _, soft = fitted(Own, newton_steps=6, threat=L2Ball(0.5, temperature=0.02))
    assert memory_of(soft).summary["residual_gradient"] < 1e-7


def test_what_cannot_be_is_refused_with_what_to_write() -> None:
    with pytest.raises(ConfigurationError, match="TPGD"):
        MUterCallback(L2Ball(0.5), "head", objective=TRADES(), attack=Attack("torchattacks.PGD"))
    MUterCallback(L2Ball(0.5), "head", objective=TRADES(), attack=Attack("torchattacks.TPGD"))
    with pytest.raises(ConfigurationError, match="beta"):
        TRADES(beta=0.0)
    with pytest.raises(ConfigurationError, match=r"TRADES\(beta"):
        MUterCallback(L2Ball(0.5), "head", objective="trades")  # type: ignore[arg-type]

    with pytest.raises(ConfigurationError, match="Fisher information of TRADES"):
        fitted(Own, representation="rows", method="fisher_delta")

    class OneOutput(Own):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(6, 1)

    x, y = Data().dataset.tensors
    binary = DataLoader(TensorDataset(x, y % 2), batch_size=16)
    with pytest.raises(ConfigurationError, match="one output a class"):
        fitted(OneOutput, binary, loss="logistic")
