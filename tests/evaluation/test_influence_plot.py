"""The picture of influences has an image for each point that is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muter import ConfigurationError, TopInfluences
from lightning_muter.evaluation import influence_plot


def test_every_named_image_is_drawn_with_its_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, str]] = []

    def note(axis: Any, image: torch.Tensor, label: str) -> None:
        drawn.append((float(image[0, 0]), label))

    monkeypatch.setattr(influence_plot, "_draw", note)
    train = torch.arange(9.0).reshape(9, 1, 1).expand(9, 4, 4)
    found = TopInfluences(robust=(7, 2), gains=(0.5, 0.25), fragile=(3,), losses=(-0.125,))
    path = influence_plot.plot_influences(
        found, train, torch.full((4, 4), 99.0), tmp_path / "a.png"
    )
    assert drawn == [(99.0, "test image"), (7.0, "7\n+0.5"), (2.0, "2\n+0.25"), (3.0, "3\n-0.12")]
    assert path.stat().st_size > 1000
    with pytest.raises(ConfigurationError, match="grey"):
        influence_plot.plot_influences(found, train[0], train[0], tmp_path / "b.png")
