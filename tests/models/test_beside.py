"""What forward takes beside x: handed on, sliced with the points, a part of what a point is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import people
import pytest
import pytorch_lightning as pl
import torch
from cases import QUIET
from pipelines import EPS, Points, padding
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    TRADES,
    L2Ball,
    LinfBall,
    MUterCallback,
    RemovalDataModule,
    RemovalError,
    Trainer,
    UnlearningMemory,
    adversarial_influence,
    influence_on_losses,
    total_hessian,
)
from lightning_muter.memory.points import digests_of
from lightning_muter.models import BatchForm, Beside
from lightning_muter.models.logits import LogitsForm

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*")
X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
MASK, SCALE = X > 0, 0.5


class Baked(nn.Module):
    """One point's module with its other entries inside."""

    def __init__(self, module: nn.Module, *entries: Tensor) -> None:
        super().__init__()
        self.module, self.entries = module, entries

    def forward(self, x: Tensor) -> Any:
        return self.module(x, *self.entries)


def batch_of(n: int = 4) -> dict[str, Tensor]:
    """Sequences with masks and token types, in float64."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    types = torch.randint(0, 2, (n, 4), generator=generator)
    masks = torch.stack([padding(i) for i in range(n)])
    return {"x": x, "y": torch.arange(n) % 3, "padding": masks, "types": types}


def padded() -> people.Padded:
    torch.manual_seed(0)
    return people.Padded().double().eval()


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "where", "taken", "found"),
    [
        ({"x": X, "y": Y, "mask": MASK}, None, ("mask",), {"mask"}),
        ({"x": X, "y": Y, "mask": MASK}, None, (), set()),
        ({"x": X, "y": Y, "mask": MASK}, None, ("y", "x", "mask", "other"), {"mask"}),
        ({"x": X, "y": Y, "mask": MASK, "s": SCALE}, None, ("s",), {"s"}),
        ({"x": X, "y": Y, "mask": MASK}, ("x", "y", "mask"), (), {"mask"}),
        ([X, Y, MASK], (0, 1, 2), (), {0}),
        ([MASK, X, Y, SCALE], (1, 2, 3, 0), (), {0, 1}),
        ([X, Y, MASK], None, ("mask",), set()),
        ([X, Y, MASK], lambda b: b, (), {0}),
        ([X, Y, {"mask": MASK}], lambda b: (b[0], b[1], b[2]), (), {"mask"}),
    ],
)
def test_entries_are_found_by_name_or_said(
    batch: Any, where: Any, taken: tuple[str, ...], found: set[Any]
) -> None:
    x, y, beside = BatchForm.of(where).taking(taken).read(batch)
    assert x is X and y is Y and set(beside.entries()) == found
    held = batch.values() if isinstance(batch, dict) else batch
    own = [one for one in held if isinstance(one, dict)]
    values = [*held, *(one for part in own for one in part.values())]
    assert all(any(one is v for v in values) for one in beside.entries().values())


def test_positions_are_handed_over_in_the_order_in_which_they_were_said() -> None:
    _, _, beside = BatchForm((1, 2, 3, 0)).read([MASK, X, Y, SCALE])
    assert beside.call(lambda x, s, m: (x, s, m), X) == (X, SCALE, MASK)


def test_some_of_the_points_have_their_own_rows_and_what_all_share() -> None:
    beside = Beside.of({"mask": MASK, 0: ["a", "b", "c", "d"], "s": SCALE, "all": X[:3]}, 4)
    some = beside.part([2, 0])
    assert some.rows[0] == ["c", "a"] and torch.equal(some.rows["mask"], MASK[[2, 0]])
    assert some.fixed["s"] == SCALE and some.fixed["all"].shape == (3, 3)
    moved = Beside.of({"mask": MASK, "x": X}, 4).to(None, torch.float64)
    assert moved.rows["mask"].dtype == torch.bool and moved.rows["x"].dtype == torch.float64


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (None, ("padding", "types")),
        ("forward", ("padding", "types")),
        (lambda module, x, mask, *rest, flag=True, **more: x, ("mask", "flag")),
        (lambda module, x: x, ()),
    ],
)
def test_names_of_what_forward_takes(forward: Any, names: tuple[str, ...]) -> None:
    assert LogitsForm(forward).takes(padded()) == names


def test_another_mask_is_another_point() -> None:
    key, beside = bytes(16), Beside.of({"mask": MASK}, 4)
    before, other = digests_of(key, X, Y, beside), Beside.of({"mask": ~MASK}, 4)
    assert not set(before) & set(digests_of(key, X, Y, other))
    assert not set(before) & set(digests_of(key, X, Y))
    assert digests_of(key, X[1:], Y[1:], beside.part(slice(1, None))) == before[1:]


# --- derivatives -----------------------------------------------------------------------------


def objective(module: nn.Module, batch: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Σ_i max_δ l at a head's weight, a point at a time, its maximiser found anew."""
    total = torch.zeros((), dtype=torch.float64)
    bias = module.head.bias
    values = {"head.weight": weight, "head.bias": bias}
    for i in range(len(batch["x"])):
        one = {name: value[i : i + 1] for name, value in batch.items()}

        def loss(x: Tensor, one: dict[str, Tensor] = one) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                logits = torch.func.functional_call(
                    module, values, (x, one["padding"], one["types"])
                )
            return nn.functional.cross_entropy(logits, one["y"])

        delta = torch.zeros_like(one["x"])
        for _ in range(200):
            at = (one["x"] + delta).requires_grad_(True)
            (g,) = torch.autograd.grad(loss(at), at)
            delta = (0.3 * delta + 0.7 * EPS * g / g.norm()).detach()
            delta = EPS * delta / delta.norm()
        total = total + loss(one["x"] + delta)
    return total


@pytest.mark.parametrize("how", [{"head": "head"}, {"parameters": ["head.weight", "head.bias"]}])
def test_the_total_hessian_is_that_of_finite_differences(how: dict[str, Any]) -> None:
    module, batch = padded(), batch_of(2)
    fast = torch.backends.mha.get_fastpath_enabled()
    found = total_hessian(module, batch, L2Ball(EPS), **how)[:12, :12]
    assert torch.backends.mha.get_fastpath_enabled() is fast
    torch.backends.mha.set_fastpath_enabled(False)
    weight = module.head.weight.detach()

    def slope(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(objective(module, batch, at), at)
        return g.reshape(-1)

    try:
        h, rows = 1e-4, []
        for k in range(12):
            step = torch.zeros(12, dtype=torch.float64)
            step[k] = h
            moved = step.reshape(weight.shape)
            rows.append((slope(weight + moved) - slope(weight - moved)) / (2 * h))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", [{"head": "head"}, {"parameters": ["head.weight", "head.bias"]}])
@pytest.mark.parametrize("threat", [L2Ball(EPS), LinfBall(EPS)])
@pytest.mark.parametrize("trades", [None, TRADES(beta=2.0)])
def test_a_batch_is_the_sum_of_its_points_with_their_entries_baked_in(
    how: dict[str, Any], threat: Any, trades: TRADES | None
) -> None:
    module, batch = padded(), batch_of(5)
    found = total_hessian(module, batch, threat, objective=trades, **how)
    total = torch.zeros_like(found)
    inside: dict[str, Any] = {"head": "module.head"}
    if "parameters" in how:
        inside = {"parameters": [f"module.{name}" for name in how["parameters"]]}
    for i in range(5):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        baked = Baked(module, one["padding"], one["types"])
        total += total_hessian(baked, (one["x"], one["y"]), threat, objective=trades, **inside)
    torch.testing.assert_close(found, total, rtol=1e-7, atol=1e-8)


# --- from fit to requests --------------------------------------------------------------------


def data(masks: Callable[[int], Tensor] = padding) -> Points:
    return Points(lambda x, y, i: {"x": x, "y": y, "padding": masks(i), "path": f"{i}.png"})


class Sequence(people.Padded):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert set(batch) == {"x", "y", "padding", "path"}
        return self.loss(self(batch["x"], batch["padding"]), batch["y"])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The metrics are the callback's."""


def fitted(**options: Any) -> tuple[Trainer, Sequence, MUterCallback]:
    pl.seed_everything(0, verbose=False)
    model = Sequence()
    options = {"head": "head", "newton_steps": 12, **options}
    callback = MUterCallback(L2Ball(EPS), **options)
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    trainer.fit(model, DataLoader(data(), batch_size=10))
    return trainer, model, callback


def test_requests_by_index_by_content_and_from_a_folder(tmp_path: Any) -> None:
    trainer, model, callback = fitted(memory_dir=str(tmp_path))
    start = callback.memory
    assert start is not None and start.settings.batch.taken == ("padding",)
    together, again, _ = fitted()
    together.unlearn(RemovalDataModule(data(), [3, 4, 11]), corrector_steps=1, bound=False)
    result = trainer.unlearn(RemovalDataModule(data(), [3]), corrector_steps=0)
    assert result.indices == (3,)
    # the points themselves, in another process: the folder knows what forward takes
    rows = [data()[i] for i in (4, 11)]
    Trainer(**QUIET).unlearn(DataLoader(rows, batch_size=2), model=model, memory=str(tmp_path))
    kept = UnlearningMemory.load(tmp_path)
    assert torch.nonzero(kept.removed).flatten().tolist() == [3, 4, 11]
    before, other = model.head.weight, again.head.weight
    assert (before - other).norm() < 0.1 * (before - fitted()[1].head.weight).norm()
    found = trainer.test(model, DataLoader(data(), batch_size=30), verbose=False)
    assert set(found[0]) == {"test_clean_acc", "test_robust_acc"}
    assert trainer.rebase(data(), model=model, memory=str(tmp_path)).points == 27


def test_a_point_with_another_mask_is_refused() -> None:
    trainer, model, _ = fitted()
    before = model.head.weight.clone()
    others = data(lambda i: padding(i + 1))
    with pytest.raises(RemovalError, match="not what the memory was built on"):
        trainer.unlearn(RemovalDataModule(others, [3]))
    bare = TensorDataset(data().x, data().y)
    with pytest.raises(RemovalError, match="never trained on"):
        trainer.unlearn(DataLoader(bare, batch_size=1, sampler=[3]))
    assert torch.equal(model.head.weight, before)


def test_influence_sees_what_training_saw() -> None:
    _, model, callback = fitted()
    memory = callback.memory
    assert memory is not None
    model.double()
    batch = torch.utils.data.default_collate([data()[i] for i in range(4)])
    batch["x"] = batch["x"].double()
    found = adversarial_influence(memory, model, batch)
    one = {name: value[2:3] for name, value in batch.items()}
    torch.testing.assert_close(adversarial_influence(memory, model, one), found[2:3])
    other = {**batch, "padding": batch["padding"].flip(0)}
    assert not torch.allclose(adversarial_influence(memory, model, other), found, rtol=1e-3)
    losses = influence_on_losses(memory, model, batch, one)
    assert losses.shape == (4, 1) and bool(losses[2] > 0)
