"""What a GPU computes is what the processor computes; skipped where there is none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import QUIET, Data, Net, Traded, memory_of
from linear_cases import L2, LINF, Linear, LinearData
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    TRADES,
    Certificate,
    L2Ball,
    LinfBall,
    MUterCallback,
    RemovalDataModule,
    RemovalError,
    Rows,
    Trainer,
    UnlearningMemory,
    adversarial_influence,
    influence_on_losses,
    total_hessian,
)
from lightning_muter.curvature.rows import RowsCurvature
from lightning_muter.evaluation.margins import margins, robust_margins
from lightning_muter.evaluation.peak_memory import peak_memory
from lightning_muter.models import measuring

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

CPU = {**QUIET, "accelerator": "cpu"}
GPU = {**QUIET, "accelerator": "gpu", "devices": 1}
GONE = [3, 17, 40]
TIGHT = Rows(tol=1e-12)
ROWS: dict[str, Any] = {"representation": TIGHT, "sketch": 2, "newton_steps": 60}
NAMED: dict[str, Any] = {"head": None, "parameters": ("classifier.weight", "classifier.bias")}

CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "rows": ROWS,
    "rows in float32": {**ROWS, "representation": Rows(tol=1e-12, dtype="float32")},
    "dense sketches": {"sketch": 2, "newton_steps": 60},
    "named parameters": NAMED,
    "linf": {"threat": LinfBall(0.1, bandwidth=0.02)},
    "a data range": {"threat": L2Ball(0.5, data_range=(-4.0, 4.0))},
    "TRADES": {"objective": TRADES(beta=4.0), "threat": L2Ball(0.2)},
    "TRADES rows": {"objective": TRADES(beta=4.0), "threat": L2Ball(0.2), **ROWS},
    "unconstrained": {"response": "unconstrained", "inverse": "neumann", "neumann_order": 3},
    "schur": {"solver": "schur"},
    "damping": {"damping": 0.5},
    **{
        one: {"method": one}
        for one in ("newton", "influence", "fisher", "newton_delta", "influence_delta")
    },
}


def fitted(
    trainer_options: dict[str, Any],
    make: Callable[[], Any] = Net,
    data: Any = None,
    **options: Any,
) -> tuple[Trainer, MUterCallback, Any, Any]:
    pl.seed_everything(0, verbose=False)
    model, data = make(), data or Data()
    own = {"threat": L2Ball(0.5), "head": "classifier", "newton_steps": 15, **options}
    callback = MUterCallback(**own)
    trainer = Trainer(**trainer_options, max_epochs=2, callbacks=[callback])
    trainer.fit(model, data)
    return trainer, callback, model, data


def products(memory: UnlearningMemory) -> Tensor:
    """M v of some v, on the processor."""
    assert memory.curvature is not None
    v = torch.linspace(-1, 1, memory.p, dtype=torch.float64)
    device = memory.omega.device
    return memory.curvature.matvec(v.to(device)).cpu()


def close(found: Tensor, expected: Tensor, share: float = 1e-9) -> None:
    size = float(expected.norm())
    assert float((found.cpu() - expected.cpu()).norm()) <= share * size


@pytest.mark.parametrize("case", CASES)
def test_memory_and_request_are_those_of_the_processor(case: str) -> None:
    steps: list[list[Tensor]] = []
    for options in (CPU, GPU):
        own = CASES[case]
        make = partial(Traded, own["objective"]) if "objective" in own else Net
        trainer, callback, model, data = fitted(options, make, **own)
        memory = memory_of(callback)
        found = [memory.omega_star, products(memory)]
        result = trainer.unlearn(RemovalDataModule(data, GONE), corrector_steps=1, bound=True)
        assert result.indices == tuple(GONE)
        memory = memory_of(callback)
        found += [memory.omega, products(memory), memory.settings.view(model).get()]
        trainer.unlearn(RemovalDataModule(data, [5]))
        found.append(memory_of(callback).omega)
        steps.append([one.cpu() for one in found])
    sketched = memory.settings.sketched  # by Lanczos, which ends at a tolerance of 1e-6
    for one, other in zip(*steps, strict=True):
        close(other.double(), one.double(), 1e-6 if sketched else 1e-8)


def test_training_with_an_attack_and_its_flow_are_those_of_the_processor() -> None:
    found = []
    for options in (CPU, GPU):
        flow = {"newton_steps": 0, "horizon": "training", "random_start": False}
        trainer, callback, _, data = fitted(options, **flow)
        trainer.unlearn(RemovalDataModule(data, GONE))
        found.append((memory_of(callback).omega_star.cpu(), memory_of(callback).omega.cpu()))
    for one, other in zip(*found, strict=True):
        close(other, one, 1e-8)


def test_a_folder_written_by_a_gpu_is_served_by_a_processor(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    trainer, callback, model, data = fitted(GPU, memory_dir=str(folder))
    other = copy.deepcopy(model).cpu()
    start = UnlearningMemory.load(folder)
    assert start.omega.device.type == "cpu"
    torch.testing.assert_close(start.omega, memory_of(callback).omega.cpu(), rtol=0, atol=0)
    Trainer(**CPU).unlearn(RemovalDataModule(data, GONE), model=other, memory=start)
    trainer.unlearn(RemovalDataModule(data, GONE))
    close(model.classifier.weight.detach(), other.classifier.weight.detach())
    # and the other way round
    Trainer(**CPU).unlearn(RemovalDataModule(data, [7]), model=model.cpu(), memory=folder)
    Trainer(**GPU).unlearn(RemovalDataModule(data, [8]), model=model.cuda(), memory=folder)
    assert model.classifier.weight.is_cuda
    removed = torch.nonzero(UnlearningMemory.load(folder).removed).flatten()
    assert removed.tolist() == [3, 7, 8, 17, 40]


def test_rows_too_large_for_the_gpu_are_read_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear models, whose rows are exact."""
    linear = {"make": partial(Linear, "cross_entropy"), "data": LinearData("cross_entropy")}
    linear = {**linear, "threat": L2, "head": "head", "representation": TIGHT}
    expected = fitted(CPU, **linear)
    monkeypatch.setattr("lightning_muter.curvature.rows._RESIDENT", 0.0)
    trainer, callback, _, data = fitted(GPU, **linear)
    moved = memory_of(callback).to("cuda")
    assert isinstance(moved.curvature, RowsCurvature)
    assert all(one.points.r.is_pinned() for one in moved.curvature.blocks)
    close(products(moved), products(memory_of(expected[1])))
    expected[0].unlearn([3, 17])
    trainer.unlearn([3, 17])
    close(memory_of(callback).omega, memory_of(expected[1]).omega)
    trainer.unlearn(RemovalDataModule(data, [5]), corrector_steps=1)
    expected[0].unlearn(RemovalDataModule(data, [5]), corrector_steps=1)
    close(memory_of(callback).omega, memory_of(expected[1]).omega)


@pytest.mark.parametrize("loss", ["logistic", "cross_entropy", "squared"])
@pytest.mark.parametrize("threat", [L2, LINF], ids=["l2", "linf"])
def test_certificates(loss: str, threat: Any) -> None:
    found = []
    for options in (CPU, GPU):
        trainer, callback, _, data = fitted(
            options,
            partial(Linear, loss),
            LinearData(loss),
            threat=threat,
            head="head",
            loss=loss,
            newton_steps=12,
        )
        certificate = Certificate(1.0, 1e-5, 1e-8)
        result = trainer.unlearn(RemovalDataModule(data, [1, 5]), certificate=certificate)
        private = memory_of(callback).private
        assert private is not None and result.bound is not None and result.bound <= 1e-8
        found.append(private.cpu())
    assert float((found[0] - found[1]).norm()) <= 2e-8


def test_influences_and_margins() -> None:
    found: list[list[Tensor]] = []
    for device, options in (("cpu", CPU), ("cuda", GPU)):
        _, callback, model, data = fitted(options)
        memory, model = memory_of(callback).to(device), model.to(device)
        batch = tuple(t[:6].to(device) for t in data.dataset.tensors)
        view = memory.settings.view(model)
        problem = memory.settings.problem()
        own = [
            adversarial_influence(memory, model, batch),
            influence_on_losses(memory, model, batch, batch),
            margins(view, *batch),
            robust_margins(view, problem, *batch),
        ]
        found.append([one.detach().cpu() for one in own])
    for one, other in zip(*found, strict=True):
        close(other, one, 1e-8)


def test_a_model_on_the_gpu_and_points_on_the_host() -> None:
    _, callback, model, data = fitted(CPU)
    batch = tuple(t[:6] for t in data.dataset.tensors)
    expected = adversarial_influence(memory_of(callback), model, batch)
    hessian = total_hessian(model, batch, L2Ball(0.5), head="classifier", weight_decay=1e-2)
    model.cuda()
    found = adversarial_influence(memory_of(callback), model, batch)
    close(found, expected, 1e-8)
    on_device = total_hessian(model, batch, L2Ball(0.5), head="classifier", weight_decay=1e-2)
    close(on_device, hessian, 1e-8)


def test_a_call_that_fails_leaves_the_generators_alone() -> None:
    trainer, callback, _, data = fitted(GPU)
    trainer.unlearn(RemovalDataModule(data, [3]))
    host, device = torch.get_rng_state(), torch.cuda.get_rng_state()
    with pytest.raises(RemovalError):
        trainer.unlearn(RemovalDataModule(data, [3]))
    assert torch.equal(host, torch.get_rng_state())
    assert torch.equal(device, torch.cuda.get_rng_state())
    trainer.unlearn(RemovalDataModule(data, [4]))
    assert torch.equal(device, torch.cuda.get_rng_state())


# --- single and half precision ------------------------------------------------------------------


class Convolutions(pl.LightningModule):
    """A small residual network of images, in float32."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.classifier.parameters(), lr=0.1, weight_decay=1e-2)


class Images(pl.LightningDataModule):
    def __init__(self, n: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        y = torch.randint(0, 4, (n,), generator=generator)
        x = torch.rand(n, 3, 16, 16, generator=generator)
        x[torch.arange(n), y.clamp(max=2)] += 0.4
        self.dataset = TensorDataset(x, y)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=16, shuffle=True)


@pytest.fixture
def short_products() -> Any:
    """Matrix products and convolutions in TF32, as Lightning's own hint asks for."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.usefixtures("short_products")
def test_short_products_of_training_are_not_those_of_stage_one(precision: str) -> None:
    """In TF32 the memory would be off by 1e-3, and points would never be stationary."""
    options = {**GPU, "precision": precision}
    trainer, callback, model, data = fitted(
        options, Convolutions, Images(), threat=L2Ball(0.3), sketch=0
    )
    memory = memory_of(callback)
    assert memory.summary["stationary"] == 1.0
    wide = copy.deepcopy(model).cpu().double()
    memory.settings.view(wide).set(memory.omega_star.cpu())
    x, y = data.dataset.tensors
    expected = total_hessian(
        wide, (x.double(), y), L2Ball(0.3), head="classifier", weight_decay=1e-2
    )
    found = torch.stack(
        [memory.curvature.matvec(v.to(memory.omega)) for v in torch.eye(memory.p).double()]  # type: ignore[union-attr]
    )
    close(found, expected, 2e-5)
    trainer.unlearn(RemovalDataModule(data, [3, 5]))
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32


def test_recurrent_layers_have_second_derivatives() -> None:
    class Recurrent(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.LSTM(4, 8, batch_first=True)
            self.classifier = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.body(x.unflatten(1, (2, 4)))[0][:, -1])

        training_step = Net.training_step
        configure_optimizers = Net.configure_optimizers

    found = []
    for options in (CPU, GPU):
        trainer, callback, _, data = fitted(options, Recurrent, threat=L2Ball(0.1))
        trainer.unlearn(RemovalDataModule(data, GONE))
        found.append((products(memory_of(callback)), memory_of(callback).omega.cpu()))
    for one, other in zip(*found, strict=True):
        close(other, one, 1e-8)
    assert torch.backends.cudnn.enabled


def test_a_full_gpu_is_said_with_the_way_out() -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(8, 60_000), nn.Tanh())
            self.classifier = nn.Linear(60_000, 3)

    with pytest.raises(Exception, match="memory|sketch") as caught:
        fitted(GPU, Wide, representation="dense")
    assert type(caught.value).__module__.startswith("lightning_muter")


def test_measuring_is_what_it_says_on_the_gpu() -> None:
    a = torch.randn(256, 256, device="cuda")
    torch.set_float32_matmul_precision("high")
    try:
        with warnings.catch_warnings(), measuring(nn.Identity()):
            exact = float((a @ a - (a.double() @ a.double())).abs().max())
        short = float((a @ a - (a.double() @ a.double())).abs().max())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert exact < 1e-3 < short


def test_a_frozen_encoder_of_float64_passes_its_check() -> None:
    """Training takes PyTorch's fused path through it, which keeps fewer digits on a GPU."""

    class Encoder(Net):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu")
            self.backbone = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.TransformerEncoder(layer, 1))
            self.backbone.append(nn.Flatten())
            self.classifier = nn.Linear(8, 3)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.classifier.parameters(), lr=0.1, weight_decay=1e-2)

    _, callback, _, _ = fitted(GPU, Encoder, threat=L2Ball(0.1), newton_steps=1, sketch=1)
    assert callback.findings == []


def test_a_peak_is_the_gpus() -> None:
    with peak_memory(torch.device("cuda")) as peak:
        torch.ones(2**26, dtype=torch.uint8, device="cuda")
    assert peak.bytes is not None and 0.9 * 2**26 < peak.bytes < 1.5 * 2**26
