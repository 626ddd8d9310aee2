"""The step of a Retrain that stops early: closed forms, and trainings that were really run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import QUIET
from early import ROWS, Early, data, fit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_muter import (
    ConfigurationError,
    L2Ball,
    MUterCallback,
    RemovalDataModule,
    SolverError,
    Trainer,
    UnlearningMemory,
)
from lightning_muter.linalg.lanczos import TimeAverage, flow
from lightning_muter.unlearning.flow import flow_rate, retrace
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.stage_one import build_memories


def _symmetric(values: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(noise)
    return (q * values) @ q.T


@pytest.mark.parametrize("decay", [0.0, 0.9999, None])
def test_an_average_over_a_quadratic_training_is_retraced_exactly(decay: float | None) -> None:
    """Exponential averages (0: the last weights), and an even one over the second half."""
    p, steps, rate = 5, 20_000, 1e-5
    whole = _symmetric(torch.logspace(-1, 2, p, dtype=torch.float64), 3)
    part = whole - _symmetric(torch.linspace(0, 0.09, p, dtype=torch.float64), 4)
    pull, gone = (torch.linspace(-1, 1, p).double(), torch.linspace(0.5, -0.2, p).double())

    def average(matrix: Tensor, b: Tensor) -> Tensor:
        omega = torch.ones(p, dtype=torch.float64)
        mean = omega.clone()
        for k in range(steps):
            omega = omega - rate * (matrix @ omega - b)
            if decay is None:
                mean = omega if k < steps // 2 else mean + (omega - mean) / (k - steps // 2 + 1)
            else:
                mean = decay * mean + (1 - decay) * omega
        return mean

    shares = torch.zeros(steps + 1, dtype=torch.float64)
    if decay is None:
        shares[steps // 2 + 1 :] = 2.0 / steps
    else:
        shares[1:] = (1 - decay) * decay ** torch.arange(steps - 1, -1, -1).double()
        shares[0] = decay**steps
    times = (torch.arange(steps + 1).double() * rate).tolist()
    horizon = TimeAverage(times, shares.tolist())
    trained, retrained = average(whole, pull), average(part, pull - gone)
    gradient = whole @ trained - pull
    rhs = gradient - (part @ trained - (pull - gone))
    offset = torch.ones(p, dtype=torch.float64) - trained
    back = retrace(lambda v: whole @ v, gradient, offset, horizon).value
    torch.testing.assert_close(back, -offset, rtol=1e-3, atol=1e-3 * float(offset.norm()))
    there = retrace(lambda v: part @ v, gradient - rhs, offset, horizon).value
    torch.testing.assert_close(there - back, retrained - trained, rtol=2e-3, atol=1e-6)


def test_a_quadratic_training_is_retraced_exactly() -> None:
    """Gradient descent in many small steps on a quadratic F, with and without some points."""
    p, steps, rate = 5, 20_000, 1e-5
    whole = _symmetric(torch.logspace(-1, 2, p, dtype=torch.float64), 3)
    part = whole - _symmetric(torch.linspace(0, 0.09, p, dtype=torch.float64), 4)
    pull = torch.linspace(-1, 1, p, dtype=torch.float64)
    gone = torch.linspace(0.5, -0.2, p, dtype=torch.float64)

    def descend(matrix: Tensor, b: Tensor) -> Tensor:
        omega = torch.ones(p, dtype=torch.float64)
        for _ in range(steps):
            omega = omega - rate * (matrix @ omega - b)
        return omega

    trained, retrained = descend(whole, pull), descend(part, pull - gone)
    gradient = whole @ trained - pull  # of all points at ω*
    rhs = (whole @ trained - pull) - (part @ trained - (pull - gone))  # of the ones that go
    offset, horizon = torch.ones(p, dtype=torch.float64) - trained, steps * rate
    step = retrace(lambda v: part @ v, gradient - rhs, offset, horizon).value
    step = step - retrace(lambda v: whole @ v, gradient, offset, horizon).value
    error = torch.linalg.vector_norm(trained + step - retrained)
    assert error < 2e-3 * torch.linalg.vector_norm(trained - retrained)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), exponent=st.floats(-6, 3))
def test_flow_is_the_solution_of_its_differential_equation(seed: int, exponent: float) -> None:
    """exp of the augmented matrix [[-A, b], [0, 0]] holds the flow in its last column."""
    matrix = _symmetric(torch.logspace(-1, 3, 12, dtype=torch.float64), seed)
    b, horizon = torch.linspace(-1, 2, 12, dtype=torch.float64), 10.0**exponent
    augmented = torch.zeros(13, 13, dtype=torch.float64)
    augmented[:12, :12], augmented[:12, 12] = -matrix, b
    expected = torch.linalg.matrix_exp(horizon * augmented)[:12, 12]
    found = flow(lambda v: matrix @ v, b, horizon)
    assert found.status == "converged" and found.residual < 1e-9
    assert torch.allclose(found.value, expected, rtol=1e-6, atol=1e-9 * float(expected.norm()))


def test_a_long_flow_solves_and_a_short_one_follows_the_gradient() -> None:
    matrix = _symmetric(torch.logspace(0, 2, 9, dtype=torch.float64), 0)
    b = torch.linspace(1, 2, 9, dtype=torch.float64)
    assert torch.allclose(flow(lambda v: matrix @ v, b, 1e3).value, torch.linalg.solve(matrix, b))
    assert torch.allclose(flow(lambda v: matrix @ v, b, 1e-9).value, 1e-9 * b)
    assert not bool(flow(lambda v: matrix @ v, 0 * b, 1.0).value.any())


def test_an_indefinite_matrix_is_reported_and_an_overflow_refused() -> None:
    matrix = _symmetric(torch.tensor([-1.0, 2.0, 5.0, 7.0]).double(), 1)
    b = torch.ones(4, dtype=torch.float64)
    assert flow(lambda v: matrix @ v, b, 0.1).status == "indefinite"
    with pytest.raises(SolverError, match="not finite"):
        flow(lambda v: matrix @ v, b, 1e6)


def test_steps_that_do_not_suffice_are_said() -> None:
    matrix = _symmetric(torch.logspace(-4, 4, 60, dtype=torch.float64), 2)
    found = flow(lambda v: matrix @ v, torch.ones(60, dtype=torch.float64), 1e5, max_iter=5)
    assert found.status == "max_iterations" and found.residual > 1e-8


def test_the_rate_of_optimizers() -> None:
    w, v = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    assert flow_rate(torch.optim.SGD([w], lr=0.3)) == pytest.approx(0.3)
    heavy = torch.optim.SGD([w], lr=0.3, momentum=0.9, dampening=0.5)
    assert flow_rate(heavy) == pytest.approx(1.5)
    assert flow_rate(torch.optim.Adam([w], lr=0.3)) is None
    assert flow_rate(torch.optim.SGD([{"params": [w]}, {"params": [v], "lr": 1.0}], lr=0.3)) is None


GONE = [4, 5, 14, 15]  # whole batches


def _distance(horizon: object, optimizer: str) -> tuple[float, float]:
    trainer, model = fit(horizon=horizon, optimizer=optimizer)
    before = model.head.weight.detach().clone()
    trainer.unlearn(RemovalDataModule(data(), GONE))
    _, retrained = fit([i for i in range(ROWS) if i not in GONE], optimizer)
    target = retrained.head.weight.detach()
    none = float((before - target).norm())
    return float((model.head.weight.detach() - target).norm()) / none, none


@pytest.mark.parametrize("optimizer", ["sgd", "momentum and a schedule"])
def test_the_step_of_the_training_s_own_length_is_near_a_retrain_that_stops_early(
    optimizer: str,
) -> None:
    full, none = _distance(None, optimizer)
    early, _ = _distance("training", optimizer)
    assert none > 1e-3
    assert full > 1  # the full step overshoots: worse than doing nothing
    assert early < 0.2


def test_the_horizon_is_that_of_training_and_stays_with_the_memory(tmp_path: object) -> None:
    trainer, model = fit(horizon="training", memory_dir=str(tmp_path))
    memory = UnlearningMemory.load(str(tmp_path))
    assert memory.settings.horizon == pytest.approx(20 * 20 * 0.02 / ROWS)
    again = MUterCallback(L2Ball(0.1), head="head", loss="logistic", horizon="training")
    result = Trainer(callbacks=[again], **QUIET).unlearn(
        RemovalDataModule(data(), [3]), model=model, memory=str(tmp_path), bound=True
    )
    assert result.bound is None and "stops early" in result.certificate
    assert result.iterations > 0 and result.residual < 1e-8


def test_training_that_did_not_converge_is_said_with_the_ways_out() -> None:
    with pytest.warns(UserWarning, match="newton_steps=..., or horizon='training'"):
        fit()
    for options in ({"horizon": "training"}, {"newton_steps": 20}):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "training stopped about.*")
            fit(**options)


def test_the_distance_to_the_optimum_is_that_of_newton_s_step() -> None:
    trainer, model = fit()
    (callback,) = (c for c in trainer.callbacks if isinstance(c, MUterCallback))
    _, optimum = fit(newton_steps=20)
    found = callback.memory.summary["distance_to_optimum"]
    apart = (model.head.weight - optimum.head.weight).detach().norm()
    assert found == pytest.approx(float(apart), rel=0.5)


def test_requests_of_any_split_end_at_the_same_model() -> None:
    models = []
    for size in (None, 1):
        trainer, model = fit(horizon="training")
        trainer.unlearn(RemovalDataModule(data(), GONE, batch_size=size))
        models.append(model.head.weight.detach())
    assert torch.allclose(models[0], models[1], rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*")
def test_what_has_no_horizon_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="newton_steps"):
        MUterCallback(L2Ball(0.1), head="head", horizon="training", newton_steps=3)
    with pytest.raises(ConfigurationError, match="finite number > 0"):
        MUterCallback(L2Ball(0.1), head="head", horizon=-1.0)
    with pytest.raises(ConfigurationError, match="schur"):
        MUterCallback(L2Ball(0.1), head="head", horizon=1.0, solver="schur")
    callback = MUterCallback(L2Ball(0.1), head="head", loss="logistic", horizon="training")
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    model = Early("adam")
    before = model.head.weight.detach().clone()
    with pytest.raises(ConfigurationError, match="SGD"):
        trainer.fit(model, DataLoader(data(), batch_size=8))
    assert torch.equal(before, model.head.weight)  # refused before the first step
    trainer, model = fit(horizon="training")
    with pytest.raises(ConfigurationError, match="corrector_steps"):
        trainer.unlearn(RemovalDataModule(data(), [3]), corrector_steps=1)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """From another start, as a new process has it: ω_0 and the time come with the checkpoint."""

    def train(model: Early, epochs: int, **options: Any) -> tuple[Trainer, MUterCallback]:
        callback = MUterCallback(L2Ball(0.1), head="head", loss="logistic", horizon="training")
        trainer = Trainer(max_epochs=epochs, callbacks=[callback], **QUIET)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*log_every_n_steps.*|.*is not writable.*")
            trainer.fit(model, DataLoader(data(), batch_size=2), **options)
        return trainer, callback

    stopped, _ = train(Early(), 8)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    other = Early()
    with torch.no_grad():
        other.head.weight.add_(3.0)
    _, resumed = train(other, 20, ckpt_path=str(tmp_path / "stopped.ckpt"))
    _, whole = train(Early(), 20)
    assert resumed.memory is not None and whole.memory is not None
    assert resumed.memory.settings.horizon == pytest.approx(whole.memory.settings.horizon)
    assert torch.equal(resumed.memory.start.initial, whole.memory.start.initial)


def test_a_memory_with_a_horizon_needs_the_start_of_training() -> None:
    callback = MUterCallback(L2Ball(0.1), head="head", loss="logistic", horizon=0.1)
    x, y = data().tensors
    digests = torch.zeros(ROWS, 16, dtype=torch.uint8)
    with pytest.raises(ConfigurationError, match="started"):
        build_memories(Early(), [callback.settings], [unweighted(x, y)], digests, bytes(16))
