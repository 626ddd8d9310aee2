"""A pixel threat on normalised inputs through fit, memory, request and robust accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import QUIET, memory_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    Attack,
    ConfigurationError,
    L2Ball,
    LinfBall,
    MUterCallback,
    RemovalDataModule,
    Threat,
    Trainer,
)
from lightning_muter.lightning.cli import main

MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.2, 0.1)
N, SIDE = 40, 5


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=x.dtype).reshape(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


class Net(pl.LightningModule):
    """A convolutional network whose normalisation is in the data set, or in ``forward``."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Softplus(), nn.Flatten())
        self.head = nn.Linear(54, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(normalised(x) if self.inside else x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=0.05)


def points(inside: bool) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (N,), generator=generator)
    x = torch.rand(N, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    x[torch.arange(N), y] = 0.5 + 0.5 * x[torch.arange(N), y]
    return TensorDataset(x if inside else normalised(x), y)


def run(
    inside: bool, threat: Threat, **options: Any
) -> tuple[MUterCallback, Any, dict[str, float]]:
    pl.seed_everything(0, verbose=False)
    model, data = Net(inside), points(inside)
    callback = MUterCallback(threat, "head", **options)
    trainer = Trainer(max_epochs=2, callbacks=[callback], **QUIET)
    trainer.fit(model, DataLoader(data, batch_size=8))
    result = trainer.unlearn(RemovalDataModule(data, indices=[3, 17]))
    (logged,) = trainer.test(model, DataLoader(data, batch_size=8), verbose=False)
    return callback, result, dict(logged)


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*")
@pytest.mark.parametrize(
    "threat",
    [L2Ball(0.3), L2Ball(0.3, (0, 1)), LinfBall((0.03, 0.02, 0.05), (0, 1), bandwidth=0.01)],
    ids=str,
)
def test_is_the_run_with_the_normalisation_inside(threat: Threat) -> None:
    kind, known = type(threat), {k: v for k, v in vars(threat).items() if k not in ("mean", "std")}
    options: dict[str, Any] = {"newton_steps": 12}
    inner, asked, scores = run(False, kind(**known, mean=MEAN, std=STD), **options)
    outer, expected, reference = run(True, threat, **options)
    one, two = memory_of(inner), memory_of(outer)
    assert one.curvature is not None and two.curvature is not None
    same = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(one.omega_star, two.omega_star, **same)
    scale = float(two.curvature.matrix.abs().max())
    torch.testing.assert_close(
        one.curvature.matrix, two.curvature.matrix, rtol=0, atol=1e-10 * scale
    )
    torch.testing.assert_close(one.omega, two.omega, **same)
    assert asked.update_norm == pytest.approx(expected.update_norm, rel=1e-8)
    assert scores["test_robust_acc"] == reference["test_robust_acc"]
    assert scores["loss"] == pytest.approx(reference["loss"], rel=1e-8)


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*")
def test_a_librarys_attack_takes_the_threats_scale() -> None:
    arguments = {"eps": 0.03, "steps": 3, "random_start": False}
    attack = Attack("torchattacks.PGD", init_args=arguments)
    options: dict[str, Any] = {"attack": attack, "method": "none"}
    threat = LinfBall(0.03, (0, 1), mean=MEAN, std=STD, bandwidth=0.01)
    _, _, scores = run(False, threat, **options)
    _, _, reference = run(True, LinfBall(0.03, (0, 1), bandwidth=0.01), **options)
    assert scores["test_robust_acc"] == reference["test_robust_acc"]
    assert scores["loss"] == pytest.approx(reference["loss"], rel=1e-5)  # it computes in float32
    own = Attack("torchattacks.PGD", mean=MEAN, std=[0.2, 0.2, 0.2], init_args=arguments)
    with pytest.raises(ConfigurationError, match="the threat alone"):
        MUterCallback(threat, "head", attack=own)


def test_a_first_batch_outside_the_range_is_told_of_mean_and_std() -> None:
    model = Net(False)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = Trainer(max_epochs=1, callbacks=[MUterCallback(L2Ball(0.3, (0, 1)), "head")], **QUIET)
    with pytest.raises(ConfigurationError, match=r"channel 1.*mean=\[.*std=\["):
        trainer.fit(model, DataLoader(points(False), batch_size=8))
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_a_preset_can_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-muter"])
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    preset = tmp_path / "pixels.yaml"
    preset.write_text(
        "trainer:\n  callbacks+:\n    - class_path: lightning_muter.MUterCallback\n"
        "      init_args:\n        head: classifier\n        threat:\n"
        "          class_path: lightning_muter.LinfBall\n          init_args:\n"
        "            {eps: [0.1, 0.2], data_range: [0.0, [1.0, 0.9]], mean: 0.5, std: [0.2, 0.1]}\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "examples/digits.yaml", "-c", str(preset), "--print_config"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert "mean: 0.5" in printed and "- 0.9" in printed
