"""What cannot work is said at fit's start: two training points through all that comes later."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import QUIET, Data, Net, memory_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_muter import (
    ConfigurationError,
    L2Ball,
    MUterCallback,
    Trainer,
    UnlearningMemory,
    total_hessian,
)
from lightning_muter.curvature import dense
from lightning_muter.curvature.base import Curvature
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.point_sample import PointSample
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.lightning import preflight
from lightning_muter.lightning.preflight import Preflight
from lightning_muter.models import measuring
from lightning_muter.models.names import suggest
from lightning_muter.unlearning import cost, representation, request, stage_one
from lightning_muter.unlearning.cost import Cost
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.stage_one import build_memories

BATCHES: list[int] = []


class Watched(Net):
    """Counts the batches that it was trained on."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        BATCHES.append(batch_idx)
        outputs = self.logits(batch[0])
        return F.cross_entropy(outputs, batch[1])

    def logits(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone(x))


def refused(
    match: str, model: pl.LightningModule, data: Any = None, quiet: Any = None, **options: Any
) -> None:
    """Fit is refused with a ConfigurationError before the first batch, and leaves the flags."""
    BATCHES.clear()
    flags = [p.requires_grad for p in model.parameters()]
    callback = MUterCallback(**{"threat": L2Ball(0.5), "head": "classifier", **options})
    trainer = Trainer(max_epochs=1, callbacks=[callback], **{**QUIET, **(quiet or {})})
    with pytest.raises(ConfigurationError, match=match):
        trainer.fit(model, data or Data())
    assert not BATCHES
    assert flags == [p.requires_grad for p in model.parameters()]


def with_forward(forward: Callable[[Any, Tensor], Any]) -> pl.LightningModule:
    model = Watched()
    model.forward = forward.__get__(model)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda self, x: {"z": self.logits(x), "h": x}, r"dict with the keys.*z.*output="),
        (lambda self, x: (None, self.logits(x)), r"tuple of .*NoneType.*Tensor.*output="),
        (lambda self, x: [], r"list of .*output="),
        (lambda self, x: SimpleNamespace(z=self.logits(x)), "SimpleNamespace .*z.*output="),
        (lambda self, x: None, "None.*output=.*forward="),
        (lambda self, x: self.logits(x).sum(), r"shape \(\)"),
        (lambda self, x: self.logits(x).squeeze(), r"shape \(3,\).*point"),
        (lambda self, x: self.logits(x).argmax(1), "int64"),
        (lambda self, x: self.logits(x) / 0, "NaN or infinite outputs"),
        (lambda self, x: self.logits(F.dropout(x, 0.5)), "other outputs when it is called again"),
        (lambda self, x: self.logits(x) - self.logits(x).mean(0), "another point is in the batch"),
        (lambda self, x: self.logits(x.detach()), "no gradient of the loss reaches the input"),
        (lambda self, x: self.missing(x), "forward.* failed with AttributeError"),
        (lambda self, x, mask: self.logits(x), "failed with TypeError.*mask.*forward="),
        (
            lambda self, x: self.logits(x.reshape(len(x), 2, 2)),
            "failed with RuntimeError.*forward=",
        ),
        (lambda self, x: self.logits(x.numpy() and x), "failed with"),
    ],
    ids=[
        *("dict", "tuple", "list", "object", "none", "sum", "squeeze", "labels", "infinite"),
        *("dropout", "mixing", "detached", "missing", "signature", "shape", "numpy"),
    ],
)
def test_a_forward_that_cannot_serve(forward: Callable[[Any, Tensor], Any], match: str) -> None:
    refused(match, with_forward(forward))


def test_a_backbone_under_no_grad_and_one_in_inference_mode() -> None:
    def no_grad(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.backbone(x)
        return self.classifier(h)

    def inference(self: Any, x: Tensor) -> Tensor:
        with torch.inference_mode():
            h = self.backbone(x)
        return self.classifier(h)

    refused("no gradient of the loss reaches the input.*no_grad", with_forward(no_grad))
    refused("inference|no gradient", with_forward(inference))


def test_no_forward_at_all() -> None:
    class Shared(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(8, 3)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            BATCHES.append(batch_idx)
            return F.cross_entropy(self.classifier(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    refused("define it so, or say by forward=", Shared())


class Cube(torch.autograd.Function):
    """A layer with a first derivative only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@pytest.mark.parametrize("options", [{}, {"method": "none", "newton_steps": 3}])
def test_a_layer_without_a_second_derivative(options: dict[str, Any]) -> None:
    cube = with_forward(lambda self, x: self.classifier(Cube.apply(self.backbone(x))))
    refused("second derivative .* failed.*twice differentiable", cube, **options)


def test_a_second_derivative_that_is_not_finite() -> None:
    def norm(self: Any, x: Tensor) -> Tensor:
        h = self.backbone(x)
        return self.classifier(h + (h - h.detach()).abs().clamp(min=0).sqrt())

    refused("NaN or infinite", with_forward(norm))


@pytest.mark.parametrize("label", [-100, 3, -1])
@pytest.mark.parametrize("subset", [False, True])
def test_labels_that_the_loss_cannot_take(label: int, subset: bool) -> None:
    data = Data()
    x, y = data.dataset.tensors
    y[17] = label
    loader = DataLoader(Subset(TensorDataset(x, y), range(40)) if subset else data.dataset, 16)
    refused(f"classes 0 to 2, .* are others: {label}", Watched(), loader)


class Strings(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return torch.ones(8, dtype=torch.float64) * index, "cat"


def test_targets_that_are_no_tensor_or_not_finite() -> None:
    refused("targets are a (list|tuple)", Watched(), DataLoader(Strings(), 4))
    x, y = Data().dataset.tensors
    targets = y.double()
    targets[5] = torch.nan
    refused("targets are NaN", Watched(), DataLoader(TensorDataset(x, targets), 16))


def test_a_memory_that_does_not_fit_is_refused_with_both_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(representation, "free_bytes", lambda device: 10_000)
    refused("p = 21 .* 0.0 MB as a matrix.* 0.0 MB are free on cpu", Watched())


def test_free_memory_is_that_of_the_smallest_limit() -> None:
    free = cost.free_bytes(torch.device("cpu"))
    assert free is None or 10**6 < free < 10**14


def test_out_of_memory_in_the_rehearsal_says_so() -> None:
    refused("MemoryError.*smaller", with_forward(lambda self, x: self.logits(_no_memory(x))))


def _no_memory(x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise MemoryError("no room")
    return x


def groups(decays: dict[str, float]) -> pl.LightningModule:
    model = Watched()
    named = dict(model.named_parameters())
    settings = [{"params": [named[k]], "weight_decay": v} for k, v in decays.items()]
    sgd = torch.optim.SGD(settings, lr=0.1)
    model.configure_optimizers = lambda: sgd  # type: ignore[method-assign]
    return model


def test_weight_decays_count_where_the_trained_parameters_are() -> None:
    head = {"classifier.weight": 0.01, "classifier.bias": 0.01}
    model = groups({**head, "backbone.0.weight": 0.5})
    callback = MUterCallback(L2Ball(0.5), head="classifier")
    Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(model, Data())
    assert memory_of(callback).settings.weight_decay == 0.01
    refused(r"weight decays \[0.0, 0.01\]", groups({**head, "classifier.bias": 0.0}))
    refused("no optimizer holds .*classifier.bias", groups({"classifier.weight": 0.01}))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"head": "clasifier"}, "did you mean 'classifier'"),
        ({"head": "model.classifier"}, "did you mean 'classifier'"),
        ({"head": "0"}, "did you mean 'backbone.0'"),
        ({"head": "backbone"}, "did you mean 'backbone.0'"),
        ({"head": None, "parameters": ["classifier"]}, "did you mean 'classifier.weight' or"),
        ({"head": None, "parameters": ["wieght"]}, "expected one of|did you mean"),
    ],
)
def test_names_that_are_not_there_come_with_the_nearest(options: Any, match: str) -> None:
    refused(match, Watched(), **options)


def test_one_string_is_no_list_of_parameters() -> None:
    with pytest.raises(ConfigurationError, match=r"parameters=\['classifier.weight'\]"):
        MUterCallback(L2Ball(0.5), parameters="classifier.weight")
    x, y = Data().dataset.tensors
    with pytest.raises(ConfigurationError, match="list of names"):
        total_hessian(Net().double(), (x, y), L2Ball(0.5), parameters="classifier.weight")


def test_suggestions_are_short() -> None:
    known = [f"layer{i}.fc" for i in range(50)]
    assert suggest(["net.fc"], ["net.fc2"]) == ": did you mean 'net.fc2'?"
    assert suggest(["xyz"], known).endswith("and 42 more")


@pytest.mark.parametrize("start_method", ["ddp_spawn", "ddp_fork"])
def test_processes_spawned_within_fit_are_refused(start_method: str) -> None:
    callback = MUterCallback(L2Ball(0.5), head="classifier")
    options = {**QUIET, "strategy": start_method, "devices": 1}
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], **options)

    class Local(Net):
        """Cannot be pickled: a spawned process would not even start."""

    with pytest.raises(ConfigurationError, match="use strategy='ddp'"):
        trainer.fit(Local(), Data())


class Counting(Watched):
    """A buffer that counts calls, in place and anew, and random numbers in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("other", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.other = self.other + 1
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        return self.logits(x)

    def on_train_start(self) -> None:
        found = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        self.seen = [*map(float, found), self.training, self.backbone.training]
        self.counted = float(self.calls), float(self.other)


@pytest.mark.filterwarnings("ignore:.*tensors that are not trained.*|.*calls.*")
def test_the_rehearsal_leaves_no_trace() -> None:
    """Its own forwards change buffers, which the frozen part's check would refuse."""
    seen = []
    for callbacks in ([], [MUterCallback(L2Ball(0.5), head="classifier", strict=False)]):
        pl.seed_everything(3, verbose=False)
        model = Counting()
        Trainer(max_epochs=1, callbacks=callbacks, **QUIET).fit(model, Data())
        seen.append((model.seen, model.counted))
    assert seen[0] == seen[1] and seen[0][1] == (0.0, 0.0)


def test_what_will_come_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    name = "lightning_muter.lightning.after_training.rank_zero_info"
    monkeypatch.setattr(name, lambda message: said.append(message))
    callback = MUterCallback(L2Ball(0.5), head="classifier")
    Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(Net(), Data())
    assert "Stage I will take about" in said[0] and "a request will take about" in said[0]


def test_double_precision_with_single_precision_data() -> None:
    data = Data()
    x, y = data.dataset.tensors
    data.dataset = TensorDataset(x.float(), y)
    callback = MUterCallback(L2Ball(0.5), head="classifier", newton_steps=15)
    Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(Net(), data)
    assert memory_of(callback).summary["residual_gradient"] < 1e-7


class Attentive(nn.Module):
    """A transformer encoder layer below a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor.*")
def test_attention_has_its_total_hessian() -> None:
    """Against finite differences of the envelope gradient, with δ* found again at each ω."""
    torch.manual_seed(0)
    model = Attentive().double()
    x, y = torch.randn(3, 3, 4, dtype=torch.float64), torch.tensor([0, 1, 1])
    threat = L2Ball(0.3)
    for p in model.encoder.parameters():
        p.requires_grad_(False)
    fast = torch.backends.mha.get_fastpath_enabled()
    hessian = total_hessian(model, (x, y), threat, head="head")
    assert torch.backends.mha.get_fastpath_enabled() is fast

    def gradient(omega: Tensor) -> Tensor:
        with torch.no_grad():
            model.head.weight.copy_(omega[:8].reshape(2, 4))
            model.head.bias.copy_(omega[8:])
        delta = torch.zeros_like(x)
        with measuring(model):
            for _ in range(60):  # the ball's own fixed point: δ = ε g / ‖g‖
                inputs = (x + delta).requires_grad_(True)
                (g,) = torch.autograd.grad(
                    F.cross_entropy(model(inputs), y, reduction="sum"), inputs
                )
                delta = 0.5 * delta + 0.15 * g / g.flatten(1).norm(dim=1)[:, None, None]
            loss = F.cross_entropy(model(x + delta), y, reduction="sum")
            found = torch.autograd.grad(loss, list(model.head.parameters()))
        return torch.cat([part.reshape(-1) for part in found])

    omega = torch.cat([model.head.weight.reshape(-1), model.head.bias]).detach().clone()
    for k in (0, 9):
        unit = torch.zeros_like(omega)
        unit[k] = 1e-5
        column = (gradient(omega + unit) - gradient(omega - unit)) / 2e-5
        torch.testing.assert_close(hessian[:, k], column, rtol=1e-5, atol=1e-6)


def _tied(self: Any, x: Tensor) -> Tensor:
    h = self.backbone(x)
    return self.classifier(h + torch.softmax(self.classifier(h), 1) @ self.classifier.weight)


def _attended(self: Any, x: Tensor) -> Tensor:
    h, w = self.backbone(x), self.classifier.weight
    return self.classifier(h + torch.softmax(h @ w.T, 1) @ w)


def _scaled(self: Any, x: Tensor) -> Tensor:
    return self.classifier(self.backbone(x) * self.classifier.bias.detach().cos().sum())


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (_tied, "the head ran 2 times"),
        (_attended, "the head's input moves with the head's own parameters.*parameters="),
        (_scaled, "the head's input moves with the head's own parameters.*parameters="),
    ],
)
def test_a_head_whose_input_moves_with_it(
    forward: Callable[[Any, Tensor], Any], match: str
) -> None:
    refused(match, with_forward(forward))
    model = with_forward(forward).double().eval()
    x, y = Data().dataset[:4]
    with pytest.raises(ConfigurationError, match=match):
        total_hessian(model, (x, y), L2Ball(0.5), head="classifier")


def test_a_head_that_is_called_by_its_arguments_name() -> None:
    named = with_forward(lambda self, x: self.classifier(input=self.backbone(x)))
    callback = MUterCallback(L2Ball(0.5), head="classifier")
    pl.seed_everything(0, verbose=False)
    Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(named, Data())
    x, y = Data().dataset[:4]
    found = total_hessian(named.eval(), (x, y), L2Ball(0.5), head="classifier")
    plain = Watched().double().eval()
    plain.load_state_dict(named.state_dict())
    plain.forward = plain.logits  # type: ignore[method-assign]
    expected = total_hessian(plain, (x, y), L2Ball(0.5), head="classifier")
    torch.testing.assert_close(found, expected)


def test_a_weight_that_is_made_of_others_and_one_without_a_size() -> None:
    model = Watched()
    torch.nn.utils.parametrizations.weight_norm(model.classifier)
    refused(r"'classifier.weight' is made of other parameters.*original0", model, head="classifier")
    lazy = Watched()
    lazy.classifier = nn.LazyLinear(3)
    refused("classifier.weight.*have no size yet", lazy)


def test_batch_statistics_alone_are_named() -> None:
    model = Watched()
    model.norm = nn.BatchNorm1d(6, affine=False, track_running_stats=False)
    model.forward = lambda x: model.classifier(model.norm(model.backbone(x)))
    refused("a point alone, in eval mode.*batch statistics", model)


def kept_with_probes(**options: Any) -> UnlearningMemory:
    """A memory of 400 points at a trained head of 20 classes, with one probe a point."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 20)).double().eval()
    y = torch.arange(400) % 20
    x = torch.randn(20, 20).double()[y] + 0.8 * torch.randn(400, 20).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    callback = MUterCallback(L2Ball(0.4), head="2", sketch=1, weight_decay=1e-3, **options)
    batch = replace(unweighted(x, y), indices=torch.arange(len(x)))
    initial, digests = torch.zeros(20 * 33).double(), torch.zeros(len(x), 16, dtype=torch.uint8)
    settings = [callback.settings]
    (memory,) = build_memories(net, settings, [batch], digests, bytes(16), initial=initial)
    return memory


def said_of(memory: UnlearningMemory) -> Cost:
    """What solves alone take, in the seconds of what tests put in the clock's place."""
    view = memory.settings.view(nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 20)))
    kept = representation.represented(memory.settings, view, 20, 400, torch.device("cpu"))
    flows = memory.settings.horizon is not None
    return Preflight(0.0, 0.0, 0.0).cost(400, view.p, 64, 0, kept, torch.device("cpu"), flows)


def counting(patch: pytest.MonkeyPatch, kind: type[Curvature], found: list[int]) -> None:
    """Add to ``found[-1]`` at every product with curvature of a kind."""
    product = kind.matvec

    def counted(self: Curvature, v: Tensor) -> Tensor:
        found[-1] += 1
        return product(self, v)

    patch.setattr(kind, "matvec", counted)


@pytest.mark.parametrize("horizon", [None, 0.05])
def test_the_noise_of_probes_is_in_the_time_that_is_said_for_rows(
    horizon: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a share of a request's solve, by the products of both; Stage I's likewise."""
    products: list[int] = [0]
    counting(monkeypatch, RowsCurvature, products)
    noises = []
    for module in (stage_one, request):
        own: Any = module.sketch_noise  # type: ignore[attr-defined]

        def noise(*given: Any, own: Any = own) -> Any:
            products.append(0)
            found = own(*given)
            noises.append(products[-1])
            products.append(0)
            return found

        monkeypatch.setattr(module, "sketch_noise", noise)
    memory = kept_with_probes(representation="rows", horizon=horizon)
    products.append(0)
    request.forget_rows(memory, [1, 2, 3])
    solve = products[-3]
    monkeypatch.setattr(preflight, "product_seconds", lambda *_: 1.0 / preflight._PRODUCTS)
    said = said_of(memory)
    share = noises[1] / solve
    assert 1 + share / 2 <= said.request_seconds <= 1 + 2 * share
    exact = said_of(replace(memory, settings=replace(memory.settings, method="newton_delta")))
    assert exact.request_seconds == exact.stage_one_seconds == 1.0
    assert said.stage_one_seconds > 1.0


@pytest.mark.parametrize("large", [False, True])
def test_the_noise_of_probes_is_in_the_time_that_is_said_for_a_matrix(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix's factor is there already; one that is too large for it takes products."""
    products: list[int] = []
    counting(monkeypatch, DenseCurvature, products)
    noise = PointSample.noise

    def counted(self: PointSample, *given: Any) -> Any:
        products.append(0)
        return noise(self, *given)

    monkeypatch.setattr(PointSample, "noise", counted)
    products.append(0)
    if large:
        for limit in ("EIGEN_LIMIT", "FACTOR_LIMIT"):
            monkeypatch.setattr(dense, limit, 100)
            monkeypatch.setattr(preflight, limit, 100)
    memory = kept_with_probes(representation="dense")
    found = products[-1]
    monkeypatch.setattr(preflight, "solve_seconds", lambda *_: 0.0)
    monkeypatch.setattr(preflight, "matrix_product_seconds", lambda *_: 1.0)
    said = said_of(memory)
    assert found / 2 <= said.stage_one_seconds <= 2 * found and large == (found > 0)
    assert said.request_seconds == 0.0  # a request takes the memory's own


def test_a_large_matrix_is_factorised_once_at_the_end_of_stage_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The time that is said is of one factorisation and about as many products as it takes."""
    for module in (dense, preflight):
        monkeypatch.setattr(module, "EIGEN_LIMIT", 100)
    solves: list[int] = []
    products: list[int] = []
    counting(monkeypatch, DenseCurvature, products)
    products.append(0)
    made = dense.DenseSolver

    def factorised(matrix: Any) -> Any:
        solves.append(len(matrix))
        solver = made(matrix)
        inverse = solver.inverse

        def counted(rhs: Any) -> Any:  # two triangular solves read the factor once
            products[-1] += 1
            return inverse(rhs)

        monkeypatch.setattr(solver, "inverse", counted)
        return solver

    monkeypatch.setattr(dense, "DenseSolver", factorised)
    memory = kept_with_probes(representation="dense")
    assert solves == [memory.p] and memory.p > 100
    monkeypatch.setattr(preflight, "solve_seconds", lambda *_: 1000.0)
    monkeypatch.setattr(preflight, "matrix_product_seconds", lambda *_: 1.0)
    said = said_of(memory).stage_one_seconds - 1000.0
    assert products[-1] / 3 <= said <= 3 * products[-1]


@pytest.mark.parametrize(("each", "points"), [(0.001, 16), (0.7, 7), (2.0, 2)])
def test_as_many_dear_points_are_timed_as_take_a_few_seconds(
    each: float, points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two points of a wide network are told to be dearer than they are in a batch."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    settings = MUterCallback(L2Ball(0.4), head="2").settings
    seen: list[int] = []

    def once(settings: Any, view: Any, batch: Any, passes: int) -> Any:
        seen.append(len(batch))
        return preflight._Timing(0.1 + each * len(batch), 0.8, 0.25)

    def read(count: int) -> Any:
        return unweighted(torch.zeros(count, 4).double(), torch.zeros(count).long())

    monkeypatch.setattr(preflight, "_once", once)
    rough = Preflight(0.0, each, 0.9, dear=each > 0.1)
    found = preflight.time_pass(net, settings, read, rough)
    if points == 2:
        assert found is rough and not seen
    else:
        assert max(seen) == points and found.dear == rough.dear
        assert found.fixed == pytest.approx(0.1) and found.per_point == pytest.approx(each)
        assert (found.ascent, found.stationary) == (0.8, 0.25)
