"""AutoAttack and peak memory against closed forms and known sizes."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_muter import L2Ball, LinfBall, Threat
from lightning_muter.errors import ConfigurationError
from lightning_muter.evaluation import Experiment
from lightning_muter.evaluation.judge import autoattack_accuracy
from lightning_muter.evaluation.peak_memory import peak_memory

CLASSES = 4


@pytest.mark.parametrize("threat", [L2Ball(0.05), LinfBall(0.01)], ids=["l2", "linf"])
def test_autoattack_of_a_linear_model_is_the_closed_form(threat: Threat) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, 36, generator=generator)
    weight -= weight.mean(dim=1, keepdim=True)  # a margin comes from the pattern, not the level
    x = 0.4 + 0.2 * torch.rand(60, 1, 6, 6, generator=generator)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES, bias=False))
    net[1].weight.data.copy_(weight)  # type: ignore[union-attr]
    y = net(x).argmax(dim=1).detach()
    y[:5] = (y[:5] + 1) % CLASSES
    order = 2 if threat.norm == "L2" else 1
    z = x.flatten(1) @ weight.T
    apart = torch.linalg.vector_norm(weight.unsqueeze(0) - weight.unsqueeze(1), order, dim=2)
    gap = (z.gather(1, y[:, None]) - z) / apart[y].clamp(min=1e-9)
    gap[torch.arange(60), y] = torch.inf
    margin = gap.amin(dim=1)
    clear = (margin - threat.eps).abs() > 0.05 * threat.eps  # an attack ends short of the boundary
    expected = float((margin > threat.eps)[clear].double().mean())
    assert 0.1 < expected < 0.9
    assert autoattack_accuracy(net, threat, (x[clear], y[clear])) == pytest.approx(expected)


def test_autoattack_is_for_classifiers() -> None:
    with pytest.raises(ConfigurationError, match="autoattack_points=5"):
        Experiment(
            name="no",
            module=lambda: None,  # type: ignore[arg-type,return-value]
            datamodule=lambda: None,  # type: ignore[arg-type,return-value]
            threat=L2Ball(1.0),
            head="head",
            loss="squared",
            autoattack_points=5,
        )


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_sees_what_was_freed_again() -> None:
    with peak_memory(torch.device("cpu")) as before:
        pass
    with peak_memory(torch.device("cpu")) as peak:
        held = torch.ones(2**26, dtype=torch.uint8)  # 64 MiB
        del held
    assert before.bytes is not None and before.bytes < 2**23
    assert peak.bytes is not None and 0.9 * 2**26 < peak.bytes < 1.5 * 2**26
