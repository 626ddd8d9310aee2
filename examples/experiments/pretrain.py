"""Pretrain a WideResNet adversarially on CIFAR-10's core classes; keep its backbone's weights.

One ascent step from a random start (Wong et al., Fast is better than free, 2020):

    python examples/experiments/pretrain.py wrn-10-1-silu --data PATH --depth 10 --width 1

The weights go to ``~/.cache/lightning-muter`` or to the folder of MUTER_WEIGHTS.
"""

from __future__ import annotations

import os

import pytorch_lightning as pl
from data import CIFAR10, VARIABLE
from jsonargparse import auto_cli
from models import WideResNet, weights_file
from safetensors.torch import save_model

from lightning_muter import AdversarialTraining, L2Ball, LinfBall, Threat

#: the classes of pretraining; finetuning takes the other five
CORE = (0, 1, 2, 3, 4)


def main(
    name: str,
    data: str | None = None,
    depth: int = 10,
    width: int = 1,
    activation: str = "SiLU",
    norm: str = "l2",
    eps: float = 0.5,
    epochs: int = 15,
    lr: float = 0.2,
    seed: int = 0,
) -> None:
    """Pretrain and save.

    Args:
        name: of the weights, as `WideResNet(pretrained=...)` asks for them.
        data: the folder of data files; torchvision downloads without one.
        depth: of the network, 6k + 4.
        width: its widening factor.
        activation: a class of torch.nn.
        norm: "l2" or "linf".
        eps: radius on the scale [0, 1].
        epochs: over the 25,000 images of the core classes.
        lr: the highest learning rate.
        seed: of weights and batches.
    """
    pl.seed_everything(seed, verbose=False)
    if data is not None:
        os.environ[VARIABLE] = data
    threats: dict[str, type[Threat]] = {"l2": L2Ball, "linf": LinfBall}
    threat = threats[norm](eps, data_range=(0, 1))
    model = WideResNet(depth, width, len(CORE), activation, lr)
    datamodule = CIFAR10(CORE, flip=True)
    training = AdversarialTraining(threat, attack_steps=1, attack_step_size=1.25 * eps)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[training], logger=False, enable_checkpointing=False
    )
    trainer.fit(model, datamodule)
    testing = AdversarialTraining(threat, attack_steps=20)
    tester = pl.Trainer(callbacks=[testing], logger=False)
    tester.validate(model, datamodule.test_dataloader())
    path = weights_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model.backbone, path)
    print(path)


if __name__ == "__main__":
    auto_cli(main)
