"""Each pipeline of docs/pipelines.md: right by the module's own loss, or refused in time.

What is right is judged by code that shares nothing with the package: the gradient of the module's
own loss, at its own adversary, on the points that are left.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import EPS, GONE, PIPELINES, N, Pipeline
from torch import Tensor
from torch.utils.data import default_collate

from lightning_muter import RemovalDataModule, Trainer

DOCS = Path(__file__).parents[2] / "docs" / "pipelines.md"
RIGHT = [one for one in PIPELINES if one.outcome == "right"]
REFUSED = [one for one in PIPELINES if one.outcome != "right"]
NOISE = (
    "ignore:.*log_every_n_steps.*|.*is no L2 term.*|.*ReduceLROnPlateau.*|.*lr_scheduler.step.*",
    "ignore:.*Precision .* is not supported.*|.*Swapping scheduler.*|.*fewer.*",
    "ignore:.*nested tensors is in prototype.*",
    "ignore:.*find_unused_parameters.*|.*batch_size.*ambiguous.*|.*NoneType.*batch size.*",
)
pytestmark = [pytest.mark.filterwarnings(one) for one in NOISE]


@pytest.fixture(autouse=True)
def _no_process_group() -> Iterator[None]:
    """What ddp starts in this process ends with its test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def named(pipelines: list[Pipeline]) -> Any:
    names = [re.sub(r"\W+", "-", f"{k} {one.name}") for k, one in enumerate(pipelines)]
    return pytest.mark.parametrize("pipeline", pipelines, ids=names)


def own_loss(pipeline: Pipeline, model: Any, batch: Any) -> Tensor:
    """The module's own, of a batch in the user's shape."""
    if pipeline.own is not None:
        return pipeline.own(model, batch)
    found = model.training_step(batch, 0)
    loss: Tensor = found["loss"] if isinstance(found, dict) else found
    return loss


def swapped(value: Any, old: Tensor, new: Tensor) -> Any:
    """A copy of a batch with one tensor in the place of another."""
    if value is old:
        return new
    if isinstance(value, dict):
        return {k: swapped(v, old, new) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(swapped(v, old, new) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(swapped(v, old, new) for v in value)
    if hasattr(value, "__dict__") and not isinstance(value, Tensor):
        other = copy.copy(value)
        other.__dict__.update(swapped(vars(value), old, new))
        return other
    return value


def images(value: Any) -> list[Tensor]:
    """The tensors in a batch that look like its images, the first one first."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.shape[1:] == (1, 4, 4) else []
    inside = value.values() if isinstance(value, dict) else value
    inside = vars(value).values() if hasattr(value, "__dict__") else inside
    if isinstance(inside, (str, int, float)) or inside is None:
        return []
    return [one for part in inside for one in ([] if isinstance(part, str) else images(part))]


def robust_gradient(
    pipeline: Pipeline, model: Any, names: list[str], left: list[int], inside: bool
) -> float:
    """‖∇F‖ of the points left: own loss at x + δ, δ = ε g/‖g‖ found by iterating it, and λ."""
    model = copy.deepcopy(model).double().eval()
    model._compiled_call_impl = None  # it is the original's
    model.log = model.log_dict = lambda *args, **kwargs: None
    if not model.automatic_optimization:
        model.training_step = lambda batch, idx: model.loss(model(batch[0]), batch[1])
    dataset = pipeline.dataset()
    batch = (pipeline.collate or default_collate)([dataset[i] for i in left])
    old = images(batch)[0]
    x = old.double()
    delta = torch.zeros_like(x)
    torch.backends.mha.set_fastpath_enabled(False)
    for _ in range(80):
        at = (x + delta).requires_grad_(True)
        (g,) = torch.autograd.grad(own_loss(pipeline, model, swapped(batch, old, at)), at)
        if inside:  # within [0, 1]: the coordinates at a bound that g pushes out stay there
            out = ((x + delta >= 1) & (g > 0)) | ((x + delta <= 0) & (g < 0))
            g = g.masked_fill(out, 0.0)
            fixed = (delta * out).flatten(1).square().sum(1)
            radius = (EPS**2 - fixed).clamp(min=0).sqrt()[:, None, None, None]
            step = delta * out + radius * g / g.flatten(1).norm(dim=1)[:, None, None, None]
            delta = (x + 0.5 * delta + 0.5 * step).clamp(0, 1) - x
        else:
            step = EPS * g / g.flatten(1).norm(dim=1)[:, None, None, None]
            delta = 0.5 * delta + 0.5 * step
    parameters = [dict(model.named_parameters())[name] for name in names]
    for one in parameters:
        one.requires_grad_(True)
    loss = own_loss(pipeline, model, swapped(batch, old, (x + delta).detach()))
    total = sum(
        (g + pipeline.weight_decay * p).square().sum()
        for g, p in zip(torch.autograd.grad(loss, parameters), parameters, strict=True)
    )
    return len(left) * float(torch.as_tensor(total).detach().sqrt())


LEFT = [i for i in range(N) if i not in GONE]


def forget(pipeline: Pipeline, trainer: Trainer, model: Any, folder: str) -> None:
    """Two points, and a third one as another process would: from the folder."""
    trainer.unlearn(RemovalDataModule(pipeline.datamodule(), GONE[:2]))
    again, _ = pipeline.trainer_of()
    again.unlearn(RemovalDataModule(pipeline.datamodule(), GONE[2:]), model=model, memory=folder)


@named([one for one in RIGHT if one.judge == "gradient"])
def test_right_by_the_modules_own_loss(pipeline: Pipeline, tmp_path: Path) -> None:
    trainer, model, callback = pipeline.fit(memory_dir=str(tmp_path))
    names, inside = callback.settings.view(model).names, callback.threat.data_range is not None
    before = robust_gradient(pipeline, model, names, LEFT, inside)
    forget(pipeline, trainer, model, str(tmp_path))
    after = robust_gradient(pipeline, model, names, LEFT, inside)
    assert after < pipeline.tolerance * before, (before, after)


@named([one for one in RIGHT if one.judge == "retrain"])
def test_right_by_a_retrain(pipeline: Pipeline, tmp_path: Path) -> None:
    trainer, model, callback = pipeline.fit(memory_dir=str(tmp_path))
    view = callback.settings.view(model)
    _, retrained, _ = pipeline.fit(LEFT)
    target, trained = callback.settings.view(retrained).get(), view.get()
    forget(pipeline, trainer, model, str(tmp_path))
    assert (view.get() - target).norm() < pipeline.tolerance * (trained - target).norm()


@named(REFUSED)
def test_refused_before_the_second_epoch(pipeline: Pipeline) -> None:
    assert pipeline.outcome in pipeline.refusal()


def test_the_table_in_the_docs_is_this_one() -> None:
    rows = DOCS.read_text().splitlines()
    missing = [one.row() for one in PIPELINES if one.row() not in rows]
    assert not missing, "docs/pipelines.md lacks:\n" + "\n".join(missing)
