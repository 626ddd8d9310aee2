"""Adversarial training alone, and what it logs in validation and test."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import QUIET, Data, Net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, L2Ball, LinfBall
from lightning_muter.adversary.ascent import projected_gradient_ascent
from lightning_muter.objectives.resolve import resolve_loss


class Validated(Net):
    """Has a validation step as well."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class ValidatedData(Data):
    """Validates on the training points."""

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.dataset, batch_size=7)


def test_validation_logs_the_accuracies_of_clean_and_attacked_points() -> None:
    pl.seed_everything(0, verbose=False)
    model, data, threat = Validated().double(), ValidatedData(), L2Ball(0.8)
    callback = AdversarialTraining(threat, attack_steps=20, random_start=False)
    trainer = pl.Trainer(max_epochs=2, callbacks=[callback], **QUIET)
    trainer.fit(model, data)
    x, y = data.dataset.tensors
    logged = trainer.validate(model, data, verbose=False)[0]
    model.eval()
    clean = (model(x).argmax(dim=1) == y).double().mean()
    assert logged["val_clean_acc"] == pytest.approx(float(clean))
    adversarial = x + _plain_ascent(model, x, y, 0.8, 20)
    robust = (model(adversarial).argmax(dim=1) == y).double().mean()
    assert logged["val_robust_acc"] == pytest.approx(float(robust))
    assert logged["val_robust_acc"] < logged["val_clean_acc"]


def _plain_ascent(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """Normalised-gradient ascent on a sphere, written out."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        at = (x + delta).requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(model(at), y, reduction="sum"), at)
        delta = delta + 2.5 * eps / steps * g / g.norm(dim=1, keepdim=True)
        delta = delta * (eps / delta.norm(dim=1, keepdim=True)).clamp(max=1)
    return delta.detach()


@pytest.mark.parametrize("threat", [L2Ball(0.5, (0, 1)), LinfBall(0.1, (0, 1))], ids=str)
def test_ascent_serves_any_shape_and_stays_inside(threat: L2Ball | LinfBall) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 1))
    x, y = torch.rand(5, 2, 6), torch.randn(5)
    start = threat.random_start(x.flatten(1))
    moved = projected_gradient_ascent(model, resolve_loss("squared"), threat, x, y, 10, 0.1, start)
    assert moved.shape == x.shape and float(moved.min()) >= 0 and float(moved.max()) <= 1
    delta = (moved - x).flatten(1)
    size = delta.norm(dim=1) if isinstance(threat, L2Ball) else delta.abs().amax(dim=1)
    assert float(size.max()) <= threat.eps * (1 + 1e-6)
    loss = resolve_loss("squared")
    assert bool((loss(model(moved), y) >= loss(model(x), y)).all())


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*")
def test_a_batch_that_is_a_tuple_trains_as_a_list_does() -> None:
    """And the data set's own tensors, which such a batch may hold, are as they were."""
    x, y = torch.randn(4, 8).double(), torch.zeros(4).long()
    before, weights = x.clone(), []
    for shape in (list, tuple):
        loader = DataLoader(
            TensorDataset(x, y), batch_size=4, collate_fn=lambda _, shape=shape: shape((x, y))
        )
        pl.seed_everything(0, verbose=False)
        model = Net()
        trainer = pl.Trainer(max_epochs=2, callbacks=[AdversarialTraining(L2Ball(0.5))], **QUIET)
        trainer.fit(model, loader)
        assert torch.equal(x, before)
        weights.append(model.classifier.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["logistic", "squared"])
@pytest.mark.parametrize("data_range", [None, (0, 1)], ids=str)
@pytest.mark.parametrize("random_start", [True, False])
def test_fgsm_is_the_maximum_of_a_linear_model_and_pgd_ends_there(
    loss: str, data_range: tuple[float, float] | None, random_start: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(12, 1, bias=False).double()
    x, point_loss, eps = torch.rand(40, 12).double(), resolve_loss(loss), 0.1
    y = torch.randint(0, 2, (40,)).double()
    threat = LinfBall(eps, data_range)
    start = threat.random_start(x) if random_start else None
    fgsm = projected_gradient_ascent(model, point_loss, threat, x, y, 1, eps)
    pgd = projected_gradient_ascent(model, point_loss, threat, x, y, 15, eps / 7, start)
    residual_keeps_its_sign = torch.ones(40, dtype=torch.bool)
    if loss == "squared":  # from a random start the residual may turn where it is small
        r = (model(x).squeeze(1) - y).abs()
        residual_keeps_its_sign = r > eps * model.weight.abs().sum()
        assert int(residual_keeps_its_sign.sum()) > 10
    assert torch.equal(pgd[residual_keeps_its_sign], fgsm[residual_keeps_its_sign])
    if data_range is None and loss == "logistic":  # the closed form of the worst margin
        margin = (2 * y - 1) * model(x).squeeze(1) - eps * model.weight.abs().sum()
        assert torch.allclose(point_loss(model(fgsm), y), F.softplus(-margin))
