"""What goes between devices; meta tensors stand for an accelerator's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muter.curvature.base import PointFacts
from lightning_muter.curvature.head import HeadHessian, HeadPoints, HeadTotal
from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.objectives.output_curvature import Categorical
from lightning_muter.responses import DiagonalLowRank

N, F, C = 3, 5, 4


def points(device: str = "cpu") -> HeadPoints:
    q = torch.full((N, C), 1.0 / C, dtype=torch.float64, device=device)
    return HeadPoints(
        features=torch.ones(N, F + 1, dtype=torch.float64, device=device),
        r=q - 0.5,
        s=Categorical(q),
        weight=torch.ones(C, F, dtype=torch.float64, device=device),
        weights=torch.ones(N, dtype=torch.float64, device=device),
    )


def total() -> HeadTotal:
    response = DiagonalLowRank(
        torch.zeros(N, F, dtype=torch.float64),
        torch.ones(N, 1, F, dtype=torch.float64),
        torch.ones(N, 1, dtype=torch.float64),
    )
    return HeadTotal(points(), response, torch.ones(N, dtype=torch.bool))


def facts() -> PointFacts:
    everyone = torch.ones(N, dtype=torch.bool)
    return PointFacts(torch.arange(N), everyone, torch.zeros(N, dtype=torch.float64))


def rows() -> PointRows:
    return PointRows.of(total(), facts(), torch.float64)


def test_rows_know_their_points_where_they_are() -> None:
    """Probes are chosen by them: an index on the host would not go with an accelerator's rows."""
    usable = torch.ones(N, dtype=torch.bool, device="meta")
    own = PointRows.of(HeadHessian(points("meta"), usable), facts(), torch.float64)
    assert all(one.is_meta for one in own.tensors().values())


def test_factors_of_forgotten_points_are_multiplied_where_they_were_moved() -> None:
    removed = RemovedPoints.of([total()], 0.1)
    omega = torch.zeros(C * (F + 1), dtype=torch.float64, device="meta")
    moved = removed.to("meta", omega)
    assert all(one.is_meta for one in moved.tensors().values())
    assert moved.subtracted(omega, omega).is_meta and moved.shift == removed.shift


def test_rows_are_multiplied_where_they_were_moved() -> None:
    moved = rows().on("meta")
    v = torch.zeros(C * (F + 1), dtype=torch.float64, device="meta")
    assert moved.matvec(v).is_meta and moved.gradient().is_meta
    assert moved.diagonal_of_sum().is_meta


@pytest.mark.parametrize(("device", "ahead"), [("meta", True), ("cpu", False)])
def test_a_copy_to_the_host_is_waited_for(
    device: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not would hand out memory that the accelerator has not written yet."""
    asked: list[bool] = []
    one = rows() if device == "meta" else rows().on("meta")

    def to(tensor: Tensor, *args: Any, non_blocking: bool = False) -> Tensor:
        asked.append(non_blocking)
        return torch.empty_like(tensor, device=args[0])

    monkeypatch.setattr(torch.Tensor, "to", to)
    one.on(device)
    assert len(asked) > 5 and any(asked) == ahead
