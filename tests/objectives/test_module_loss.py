"""The loss that a module carries: taken with its arguments, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_muter import ConfigurationError, L2Ball, MUterCallback, total_hessian
from lightning_muter.objectives.module_loss import ModuleLoss, asked_loss, loss_in
from lightning_muter.objectives.resolve import resolve_loss
from lightning_muter.objectives.targets import check_targets


class Model(nn.Module):
    def __init__(self, criterion: Any) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.part = nn.Module()
        self.part.criterion = criterion

    def forward(self, x: Any) -> Any:
        return self.head(x)


@pytest.mark.parametrize(
    ("criterion", "target"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([0, 2])),
        (nn.CrossEntropyLoss(label_smoothing=0.2), torch.tensor([0, 2])),
        (F.cross_entropy, torch.tensor([0, 2])),
        (nn.BCEWithLogitsLoss(), torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
        (F.binary_cross_entropy_with_logits, torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
        (nn.MSELoss(), torch.randn(2, 3)),
        (F.mse_loss, torch.randn(2, 3)),
    ],
)
def test_its_mean_is_the_objects_own_value(criterion: Any, target: torch.Tensor) -> None:
    model = Model(criterion)
    loss = resolve_loss(loss_in("part.criterion", model))
    z = torch.randn(2, 3)
    torch.testing.assert_close(loss(z, target).mean(), criterion(z, target))


def test_the_hessian_is_that_of_the_same_loss_by_its_arguments() -> None:
    loss = nn.CrossEntropyLoss(label_smoothing=0.2)
    model = Model(loss).double()
    batch = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    found = total_hessian(model, batch, L2Ball(0.1), head="head", loss="part.criterion")
    torch.testing.assert_close(
        found, total_hessian(model, batch, L2Ball(0.1), head="head", loss=loss)
    )


@pytest.mark.parametrize(
    ("criterion", "match"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "'part.criterion'.*weight.*no sum over points"),
        (nn.NLLLoss(), "'part.criterion'.*NLLLoss.*expected one of"),
        (Model(None), "is a Model of the module's own.*per-point losses"),
        (lambda z, y: z.sum(), "is a function of the module's own.*per-point losses"),
        (3.0, "is a float of the module's own"),
    ],
)
def test_a_loss_that_is_no_sum_over_points(criterion: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        loss_in("part.criterion", Model(criterion))


def test_an_attribute_that_is_not_there_comes_with_those_that_are() -> None:
    model = Model(nn.CrossEntropyLoss())
    with pytest.raises(ConfigurationError, match=r"no.* an attribute of Model.*'part.criterion'"):
        loss_in("criterion", model)
    with pytest.raises(ConfigurationError, match="no loss module"):
        loss_in("cross_entropi", nn.Linear(2, 2))
    assert asked_loss("criterion") == ModuleLoss("criterion")
    assert MUterCallback(L2Ball(0.1), head="head", loss="criterion").settings.to_dict()["loss"] == {
        "attribute": "criterion"
    }


def test_an_ignored_class_is_refused_where_a_point_has_it() -> None:
    loss = resolve_loss(nn.CrossEntropyLoss(ignore_index=2))
    check_targets(loss, torch.tensor([0, 1]), 3)
    with pytest.raises(ConfigurationError, match="ignore_index=2.*1 .*leave"):
        check_targets(loss, torch.tensor([0, 2]), 3)
    far = resolve_loss(nn.CrossEntropyLoss(ignore_index=255))
    check_targets(far, torch.tensor([0, 1, 2]), 3)
