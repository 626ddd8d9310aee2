"""`MUterCLI`: LightningCLI with the verb ``unlearn``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import ArgsType, LightningCLI

from lightning_muter.errors import ConfigurationError
from lightning_muter.evaluation.commands import COMMANDS
from lightning_muter.lightning.callback import MODEL_FILE
from lightning_muter.lightning.data import RemovalDataModule
from lightning_muter.lightning.trainer import Trainer
from lightning_muter.unlearning.result import UnlearningResult

__all__ = ["CLITrainer", "MUterCLI", "main"]


class CLITrainer(Trainer):
    """`Trainer` whose ``unlearn`` reads like the other verbs of a command line."""

    def unlearn(  # type: ignore[override]
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        indices: list[int],
        memory: str,
        ckpt_path: str | None = None,
        batch_size: int | None = None,
        noise_std: float = 0.0,
        output: str | None = None,
    ) -> UnlearningResult:
        """Forget training points of a checkpoint with the memory that was built for it.

        Args:
            model: the module of the config.
            datamodule: the datamodule that training used.
            indices: training points to forget.
            memory: the memory's folder.
            ckpt_path: checkpoint of the trained (or last unlearned) model; the memory's own
                ``model.ckpt`` by default.
            batch_size: points a request; all at once by default.
            noise_std: sigma of Gaussian noise on the parameters.
            output: where to save the checkpoint of the unlearned model; ``unlearned.ckpt`` in the
                memory's folder by default.
        """
        folder = Path(memory)
        source = folder / MODEL_FILE if ckpt_path is None else Path(ckpt_path)
        if not source.is_file():
            raise ConfigurationError(f"there is no checkpoint {source}: say --ckpt_path")
        target = folder / "unlearned.ckpt" if output is None else Path(output)
        _check_target(target)
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["state_dict"], assign=True)  # in training's precision
        removals = RemovalDataModule(datamodule, indices, batch_size)
        result = super().unlearn(removals, model=model, memory=memory, noise_std=noise_std)
        if self.is_global_zero:
            _report(result)
            checkpoint["state_dict"] = model.state_dict()
            _write(checkpoint, target)
        return result


def _check_target(target: Path) -> None:
    """Refuse a place that cannot be written, before the points are forgotten."""
    folder = target.parent
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigurationError(
            f"the unlearned model cannot be saved as {target}: say --output with a file in a "
            "folder that exists and can be written"
        )


def _report(result: UnlearningResult) -> None:
    numbers = result.to_dict()
    numbers.pop("warnings")
    for name, value in numbers.items():
        print(f"{name}: {value}")
    for message in result.warnings:
        print(f"warning: {message}")


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    partial = target.with_suffix(target.suffix + ".new")
    try:
        torch.save(checkpoint, partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    print(f"saved: {target}")


class MUterCLI(LightningCLI):
    """``LightningCLI`` with our Trainer and the subcommand ``unlearn``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("trainer_class", CLITrainer)
        if not issubclass(kwargs["trainer_class"], CLITrainer):
            raise ConfigurationError("trainer_class must derive from MUterCLI's own Trainer")
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs and ours, with the arguments that the CLI fills in itself."""
        return {**LightningCLI.subcommands(), "unlearn": {"model", "datamodule"}}


def main(args: ArgsType = None) -> None:
    """The console script: Lightning's verbs and ``unlearn``, or a command of the evaluation."""
    sys.path.insert(0, os.getcwd())  # the user's own classes
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and words and words[0] in COMMANDS:
        COMMANDS[words[0]](words[1:])
        return
    MUterCLI(
        save_config_kwargs={"overwrite": True},
        subclass_mode_model=True,
        subclass_mode_data=True,
        model_class=pl.LightningModule,
        datamodule_class=pl.LightningDataModule,
        args=args,
        parser_kwargs={
            "description": "Also: evaluate -c EXPERIMENT --output DIR, plot RESULTS, tables FILES."
        },
    )
