"""A test image with the training images that made it robust, and those that made it fragile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.evaluation.plots import pyplot
from lightning_muter.unlearning.influence import TopInfluences

__all__ = ["plot_influences"]


def plot_influences(
    found: TopInfluences, train: Tensor, test: Tensor, path: str | os.PathLike[str]
) -> Path:
    """Draw what `top_influences` found; under each image how its removal changes the robust loss.

    Args:
        found: positions among ``train``.
        train: images (m, H, W), grey.
        test: the test image (H, W).
        path: the image to write.

    Raises:
        ConfigurationError: these are no grey images.
    """
    if train.ndim != 3 or test.shape != train.shape[1:]:
        raise ConfigurationError(
            f"train of shape {tuple(train.shape)} and test of shape {tuple(test.shape)}: grey "
            "images (m, H, W) and (H, W) are drawn"
        )
    plt = pyplot()
    rows = (
        ("made it robust", list(zip(found.robust, found.gains, strict=True))),
        ("made it fragile", list(zip(found.fragile, found.losses, strict=True))),
    )
    width = 1 + max(1, *(len(shown) for _, shown in rows))
    figure, axes = plt.subplots(2, width, figsize=(1.3 * width, 3.4), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    _draw(axes[0, 0], test, "test image")
    for line, (kind, shown) in zip(axes, rows, strict=True):
        for axis, (position, change) in zip(line[1:], shown, strict=False):
            _draw(axis, train[position], f"{position}\n{change:+.2g}")
        line[1].text(0.0, 1.45, kind, transform=line[1].transAxes, fontsize=8, weight="bold")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return Path(path)


def _draw(axis: Any, image: Tensor, label: str) -> None:
    axis.imshow(image.detach().cpu().numpy(), cmap="gray_r")
    axis.set_title(label, fontsize=7)
