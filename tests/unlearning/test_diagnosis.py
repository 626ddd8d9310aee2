"""What is in doubt is said in words, in the memory and in every result."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import reference
import torch
import torch.nn.functional as F
from cases import QUIET, Data, fit, memory_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import L2Ball, MUterCallback, RemovalDataModule, Trainer, UnlearningResult
from lightning_muter.linalg.solution import Solution, Status
from lightning_muter.unlearning.diagnosis import request_warnings


class Logistic(pl.LightningModule):
    """Logistic regression of two features, by SGD."""

    def __init__(self, lr: float, weight_decay: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(2, 1, dtype=torch.float64)
        self.lr, self.weight_decay = lr, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]).squeeze(1), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


def separable(gap: float = 2.0) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    y = (torch.arange(40) % 2).double()
    x = 0.3 * torch.randn(40, 2, generator=generator, dtype=torch.float64)
    x[:, 0] += gap * (2 * y - 1)
    return TensorDataset(x, y)


def run(
    data: TensorDataset, lr: float, weight_decay: float, epochs: int, **options: Any
) -> tuple[MUterCallback, UnlearningResult]:
    model = Logistic(lr, weight_decay)
    muter = MUterCallback(L2Ball(0.1), head="head", loss="logistic", attack_steps=3, **options)
    trainer = Trainer(max_epochs=epochs, callbacks=[muter], **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, DataLoader(data, batch_size=20, shuffle=True))
        return muter, trainer.unlearn(RemovalDataModule(data, [0, 3]))


@pytest.mark.parametrize("weight_decay", [0.0, 1e-6])
@pytest.mark.parametrize("newton_steps", [0, 10])
def test_separable_data_without_weight_decay_has_no_optimum_to_step_from(
    weight_decay: float, newton_steps: int
) -> None:
    """Either it is said, or the request really lowers the remaining points' gradient."""
    for gap in (1.0, 2.0, 6.0):
        data = separable(gap)
        muter, result = run(data, 0.5, weight_decay, 2, newton_steps=newton_steps)
        memory = memory_of(muter)
        keep = [i for i in range(40) if i not in (0, 3)]
        x, y = (t[keep] for t in data.tensors)

        def left(omega: Tensor, x: Tensor = x, y: Tensor = y) -> float:
            w = omega.clone().requires_grad_(True)
            robust = reference.robust_logistic(w, x, y, 0.1, weight_decay)
            return float(torch.autograd.grad(robust, w)[0].norm())

        good = left(memory.omega) < 0.5 * left(memory.omega_star)
        said = any("optimum" in sentence for sentence in result.warnings)
        assert said if not good else said or result.status == "converged", (gap, result)
        assert said or weight_decay > 0


def test_an_sgd_beyond_its_stability_limit_is_in_doubt() -> None:
    data = Data()
    x, y = data.dataset.tensors
    wide = TensorDataset(6 * x[:, :2], (y == 0).double())
    muter, result = run(wide, 3.0, 1e-2, 6, horizon="training")
    assert memory_of(muter).summary["retrace_error"] > 0.3
    assert result.status == "doubtful"
    assert any("retrace_error" in sentence for sentence in result.warnings)


def test_a_good_memory_has_nothing_to_say() -> None:
    trainer, callback, _, data = fit()
    result = trainer.unlearn(RemovalDataModule(data, [1, 2]))
    assert result.warnings == () == memory_of(callback).warnings
    assert result.status == "converged"


def test_training_that_stopped_early_without_a_horizon_is_said_in_every_result() -> None:
    with pytest.warns(UserWarning, match="training stopped about"):
        trainer, callback, _, data = fit(newton_steps=0)
    assert len(memory_of(callback).warnings) == 1
    for index in (3, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = trainer.unlearn(RemovalDataModule(data, [index]))
        assert result.status == "doubtful" and "newton_steps" in result.warnings[0]
        assert result.to_dict()["warnings"] == list(result.warnings)


@pytest.mark.parametrize("inverse", ["neumann", "exact"])
def test_an_unconstrained_response_that_does_not_exist_is_in_doubt(inverse: str) -> None:
    data = separable(1.0)
    muter, result = run(
        data, 0.5, 1e-2, 2, newton_steps=20, response="unconstrained", inverse=inverse
    )
    memory = memory_of(muter)
    keep = [i for i in range(40) if i not in (0, 3)]
    x, y = (t[keep] for t in data.tensors)

    def left(omega: Tensor) -> float:
        w = omega.clone().requires_grad_(True)
        robust = reference.robust_logistic(w, x, y, 0.1, 1e-2)
        return float(torch.autograd.grad(robust, w)[0].norm())

    constrained, right = run(data, 0.5, 1e-2, 2, newton_steps=20)
    assert right.status == "converged"
    # as little of the gradient is left by neither of the paper's inverses
    assert left(memory.omega) > 2 * left(memory_of(constrained).omega)
    assert memory.summary["usable_response"] == 0 and result.status != "converged"
    assert "unconstrained response" in " ".join(memory.warnings)


def test_an_indefinite_memory_is_in_doubt_until_damping_mends_it() -> None:
    def said(**options: Any) -> tuple[float, str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, callback, _, _ = fit(response="unconstrained", neumann_order=20, **options)
        memory = memory_of(callback)
        return memory.summary["smallest_eigenvalue"], " ".join(memory.warnings)

    smallest, sentences = said()
    assert smallest < 0 and "indefinite" in sentences
    _, sentences = said(damping=1.5 * abs(smallest))
    assert "indefinite" not in sentences


def test_a_request_says_what_its_own_numbers_are() -> None:
    def sentences(
        status: Status, update: float, stationary: float, distance: float = 0.0
    ) -> tuple[str, ...]:
        solution = Solution(torch.zeros(1), 0.0, 0, status)
        return request_warnings(solution, update, 1.0, stationary, distance)

    assert sentences(Status.CONVERGED, 0.5, 1.0) == ()
    assert sentences(Status.MINIMUM_NORM, 0.5, 1.0) == ()
    assert "saddle" in sentences(Status.INDEFINITE, 0.5, 1.0)[0]
    assert "no solution" in sentences(Status.INCONSISTENT, 0.5, 1.0)[0]
    assert "solver_tol" in sentences(Status.MAX_ITERATIONS, 0.5, 1.0)[0]
    (far,) = sentences(Status.CONVERGED, 1.5, 1.0)
    assert "corrector_steps (which a memory with a horizon does not take)" in far
    assert "newton_steps" in sentences(Status.CONVERGED, 0.5, 1.0, 0.4)[0]
    (moving,) = sentences(Status.CONVERGED, 0.5, 0.2)
    assert "20%" in moving and "of a LinfBall" in moving  # an L2Ball has no smoothing
    solution = Solution(torch.zeros(1), 0.0, 0, Status.CONVERGED)
    (said,) = request_warnings(solution, 0.5, 1.0, 1.0, 0.0, emptied=range(3, 10))
    assert "class 3, 4, 5, 6, 7, ...:" in said and "corrector_steps" in said
