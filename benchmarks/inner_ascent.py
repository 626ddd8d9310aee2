"""How many passes the inner maximiser takes on a network, with and without acceleration.

    python benchmarks/inner_ascent.py --data PATH

Needs the backbone of `python examples/experiments/pretrain.py wrn-10-1-silu-linf --norm linf
--eps 0.0314`; its head is finetuned here. Prints passes a point and the share that is stationary.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, LinfBall
from lightning_muter.adversary import maximiser as inner
from lightning_muter.adversary.maximiser import maximise
from lightning_muter.models import measuring, view_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.experiments.data import CIFAR10, VARIABLE
from examples.experiments.models import WideResNet


def main(data: str | None = None, points: int = 60, eps: float = 0.0314) -> None:
    """Compare for three bandwidths.

    Args:
        data: the folder of data files.
        points: how many images.
        eps: radius of the L-infinity ball on the scale [0, 1].
    """
    if data is not None:
        os.environ[VARIABLE] = data
    pl.seed_everything(0, verbose=False)
    source = CIFAR10([5, 6, 7, 8, 9], points=points)
    source.setup("fit")
    x, y = source.train_dataloader().dataset.tensors
    model = WideResNet(pretrained="wrn-10-1-silu-linf", weight_decay=0.01)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    attack = AdversarialTraining(LinfBall(eps, (0, 1)), attack_steps=3)
    trainer = pl.Trainer(max_epochs=8, callbacks=[attack], enable_model_summary=False, **quiet)
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True))
    view = view_of(model, "cross_entropy", "head")
    plain_passes = inner._PLAIN
    for bandwidth in (1e-3, 3e-4, 1e-4):
        for name, passes in (("plain", 10**9), ("accelerated", plain_passes)):
            inner._PLAIN = passes
            seen = 0

            def gradient(at: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
                nonlocal seen
                seen += len(at)
                return view.ascent(at.reshape(-1, *x.shape[1:]).to(x), y[which])

            threat = LinfBall(eps, (0, 1), bandwidth=bandwidth)
            with measuring(model):
                found = maximise(
                    gradient,
                    x.flatten(1).double(),
                    threat,
                    dtype=torch.float32,
                    link=view.loss.link,
                )
            share = float(found.stationary.double().mean())
            print(f"{bandwidth:.0e} {name}: {seen / points:.0f} passes, {share:.0%} stationary")


if __name__ == "__main__":
    auto_cli(main)
