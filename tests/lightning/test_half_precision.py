"""Modules kept in half precision: differentiated in single, rounded when they are written."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET, Data, Net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    ConfigurationError,
    L2Ball,
    MUterCallback,
    RemovalDataModule,
    RemovalError,
    Trainer,
    UnlearningMemory,
    total_hessian,
)
from lightning_muter.lightning.half_precision import rounding_of
from lightning_muter.models import measuring

EPS, DECAY, GONE = 0.1, 1e-2, [3, 7, 20]


def data() -> TensorDataset:
    x, y = Data().dataset.tensors
    return TensorDataset(x.float(), y)


def fitted(precision: str, **options: Any) -> tuple[Trainer, Net, UnlearningMemory]:
    pl.seed_everything(0, verbose=False)
    model, own = Net(), {"head": "classifier", "newton_steps": 12, **options}
    callback = MUterCallback(L2Ball(EPS), **own)
    trainer = Trainer(**{**QUIET, "precision": precision}, max_epochs=2, callbacks=[callback])
    trainer.fit(model, DataLoader(data(), batch_size=16))
    assert callback.memory is not None
    return trainer, model, callback.memory


def gradient(model: nn.Module, left: list[int]) -> float:
    """‖∇F‖ at the head in float64, by a loop that shares nothing with the package."""
    model = copy.deepcopy(model).double().eval()
    x, y = (tensor[left] for tensor in data().tensors)
    x, head = x.double(), list(model.classifier.parameters())
    for one in head:
        one.requires_grad_(True)
    delta = torch.zeros_like(x)
    for _ in range(80):
        at = (x + delta).requires_grad_(True)
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(at), y), at)
        delta = 0.5 * delta + 0.5 * EPS * g / g.norm(dim=1, keepdim=True)
    loss = nn.functional.cross_entropy(model((x + delta).detach()), y, reduction="sum")
    found = torch.autograd.grad(loss, head)
    rest = [g + len(left) * DECAY * p for g, p in zip(found, head, strict=True)]
    return float(torch.cat([one.flatten() for one in rest]).detach().norm())


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_stage_one_is_that_of_the_same_weights_in_single_precision(precision: str) -> None:
    _, model, memory = fitted(precision)
    kind = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    assert all(one.dtype == kind for one in model.parameters())
    assert memory.summary["stationary"] == 1.0
    x, y = data().tensors
    wide = copy.deepcopy(model).double()
    expected = total_hessian(
        wide, (x.double(), y), L2Ball(EPS), head="classifier", weight_decay=DECAY
    )
    assert memory.curvature is not None
    found = memory.curvature.matvec(torch.eye(memory.p, dtype=torch.float64)[0])
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_module_is_what_it_was_after_a_pass(kind: torch.dtype) -> None:
    model = Net().to(kind)
    model.register_buffer("table", torch.randn(3, dtype=kind))
    x = torch.randn(2, 8, dtype=kind)
    model(x).sum().backward()
    before, gradients = kept(model), [one.grad for one in model.parameters()]
    places = [one.data_ptr() for one in model.parameters()]
    with measuring(model):
        assert all(one.dtype == torch.float32 for one in model.state_dict().values())
        assert model(x.float()).dtype == torch.float32
        model.classifier.bias.data += 1.0
    assert [one.data_ptr() for one in model.parameters()] == places
    for name, value in model.state_dict().items():
        if name != "classifier.bias":
            assert torch.equal(value, before[name])
    torch.testing.assert_close(model.classifier.bias.detach(), before["classifier.bias"] + 1)
    assert all(a is b for a, b in zip(gradients, (p.grad for p in model.parameters()), strict=True))


def test_a_request_in_half_precision_lowers_the_gradient_as_far_as_rounding_lets_it() -> None:
    trainer, model, memory = fitted("bf16-true")
    left = [i for i in range(memory.n) if i not in GONE]
    before = gradient(model, left)
    result = trainer.unlearn(RemovalDataModule(data(), GONE), corrector_steps=1)
    assert model.classifier.weight.dtype == torch.bfloat16
    assert gradient(model, left) < 0.2 * before
    kept_omega = trainer.callbacks[-1].memory.omega  # type: ignore[attr-defined]
    rounding = (kept_omega.bfloat16().double() - kept_omega).norm()
    assert 0 < float(rounding) < 0.1 * result.update_norm


def view_of(model: nn.Module, memory: UnlearningMemory) -> Any:
    return memory.settings.view(model)


def test_what_rounding_takes_of_an_update_is_said_or_refused() -> None:
    _, model, memory = fitted("bf16-true")
    view = view_of(model, memory)
    now = view.get()
    omega = now + 2.0**-11 * now.abs() + 1e-5  # a tenth of what bfloat16 tells apart
    moved = float((omega.bfloat16().double() - omega).norm())
    (said,) = rounding_of(omega, view, 5 * moved)
    assert "kept in bfloat16" in said and "20% of the update" in said
    assert rounding_of(omega, view, 20 * moved) == () == rounding_of(now, view, 1e-9)
    with pytest.raises(RemovalError, match="most of it would be lost.*more points.*bf16-mixed"):
        rounding_of(omega, view, float((omega - now).norm()))
    assert rounding_of(omega, view_of(copy.deepcopy(model).float(), memory), 1e-9) == ()


def test_an_update_that_rounding_would_drown_changes_nothing() -> None:
    trainer, model, memory = fitted("bf16-true", newton_steps=0, horizon=1e-5)
    before, folder = kept(model), trainer.callbacks[-1].memory  # type: ignore[attr-defined]
    with pytest.raises(RemovalError, match="most of it would be lost"):
        trainer.unlearn(RemovalDataModule(data(), [3]))
    assert trainer.callbacks[-1].memory is folder is memory  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_distributed_strategy_is_refused_before_training() -> None:
    model, callback = Net(), MUterCallback(L2Ball(EPS), head="classifier", newton_steps=1)
    options = {**QUIET, "precision": "bf16-true", "strategy": "ddp", "devices": 1}
    before = dict(os.environ)
    try:
        with pytest.raises(ConfigurationError, match="distributed strategy.*bf16-mixed"):
            Trainer(**options, max_epochs=1, callbacks=[callback]).fit(
                model, DataLoader(data(), batch_size=16)
            )
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.distributed.destroy_process_group()


def test_nothing_is_proved_of_weights_that_are_rounded() -> None:
    trainer, model, _ = fitted("bf16-true")
    before = kept(model)
    with pytest.raises(ConfigurationError, match=r"not rounded.*bfloat16.*bf16-mixed"):
        trainer.unlearn(RemovalDataModule(data(), GONE), bound=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
