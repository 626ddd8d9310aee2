"""`MUterCLI`: LightningCLI with the verb ``unlearn``."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import DataLoader

from lightning_muter.errors import ConfigurationError
from lightning_muter.evaluation.commands import COMMANDS
from lightning_muter.lightning.data import RemovalDataModule
from lightning_muter.lightning.flavour import pl
from lightning_muter.lightning.keeper import keeper_of
from lightning_muter.lightning.memory_commands import (
    MEMORY_COMMANDS,
    check_target,
    write_checkpoint,
)
from lightning_muter.lightning.removals import points_in
from lightning_muter.lightning.trainer import Trainer
from lightning_muter.memory import model_file
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.kept_model import bring_model_up_to_date
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.unlearning.certificate import Certificate
from lightning_muter.unlearning.result import RebaseResult, UnlearningResult

__all__ = ["CLITrainer", "MUterCLI", "main"]


if TYPE_CHECKING:
    from pytorch_lightning.cli import ArgsType, LightningCLI
else:
    _cli = importlib.import_module(f"{pl.__name__}.cli")
    ArgsType, LightningCLI = _cli.ArgsType, _cli.LightningCLI


class CLITrainer(Trainer):
    """`Trainer` whose ``unlearn`` reads like the other verbs of a command line."""

    def unlearn(  # type: ignore[override]
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        memory: str,
        indices: list[int] | int | None = None,
        ids: list[str] | str | None = None,
        points: str | None = None,
        already: Literal["error", "skip"] = "error",
        ckpt_path: str | None = None,
        batch_size: int | None = None,
        noise_std: float = 0.0,
        note: str = "",
        output: str | None = None,
        certificate: Certificate | None = None,
    ) -> UnlearningResult:
        """Forget training points of a checkpoint with the memory that was built for it.

        Args:
            model: the module of the config.
            datamodule: the datamodule that training used.
            memory: the memory's folder.
            indices: positions in today's data set of the points to forget.
            ids: keys whose points to forget, in the place of indices.
            points: a safetensors file of the points themselves, tensors "x" and "target" as
                training received them, in the place of indices.
            already: "skip" passes over points that were forgotten earlier.
            ckpt_path: checkpoint of the trained (or last unlearned) model; the memory's own
                ``model.ckpt`` by default, which is the unlearned model afterwards.
            batch_size: points a request; all at once by default.
            noise_std: sigma of Gaussian noise on the parameters.
            note: who or what asked, for the ledger and the report.
            output: a copy of the checkpoint of the unlearned model.
            certificate: publish the model with a proof that it cannot be told from a Retrain's:
                epsilon, delta and radius.
        """
        target = None if output is None else Path(output)
        check_target(target)
        checkpoint = _load(model, memory, ckpt_path)
        removals: pl.LightningDataModule | DataLoader[Any]
        if points is None:
            some = [indices] if isinstance(indices, int) else indices
            removals = RemovalDataModule(datamodule, some, batch_size, ids)
        elif indices is None and ids is None:
            removals = points_in(Path(points), batch_size)
        else:
            raise ConfigurationError("give one of --indices, --ids and --points")
        result = super().unlearn(
            removals,
            model=model,
            memory=memory,
            noise_std=noise_std,
            already=already,
            note=note,
            certificate=certificate,
        )
        if self.is_global_zero:
            _report(result)
            if target is not None:
                write_checkpoint({**checkpoint, "state_dict": model.state_dict()}, target)
        return result

    def build_memory(  # type: ignore[override]
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        ckpt_path: str | None = None,
    ) -> UnlearningMemory:
        """Build the memory of a model that is trained already; the config's callback says how.

        Args:
            model: the module of the config.
            datamodule: the data that it was trained on.
            ckpt_path: its checkpoint.
        """
        if ckpt_path is None:
            raise ConfigurationError(
                "the config's model has random weights: say --ckpt_path, the checkpoint of the "
                "trained model"
            )
        keeper = keeper_of(self)
        if keeper is not None and keeper.memory_dir is None:
            raise ConfigurationError(
                "the memory would be lost when the command ends: give the config's MUterCallback "
                "a memory_dir"
            )
        return super().build_memory(model, datamodule, ckpt_path)

    def rebase(  # type: ignore[override]
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        memory: str,
        newton_steps: int = 10,
        ckpt_path: str | None = None,
        openings: str | None = None,
    ) -> RebaseResult:
        """Make the unlearned model a memory's new start, and erase what it knew of the forgotten.

        Args:
            model: the module of the config.
            datamodule: the training data, as it is today.
            memory: the memory's folder.
            newton_steps: the most that are taken to the optimum of the remaining points.
            ckpt_path: checkpoint of the unlearned model; the memory's own ``model.ckpt`` by
                default.
            openings: a JSON file, outside the folder, for what proves which points the ledger's
                commitments are of; it is not written by default, and cannot be computed later.
        """
        target = None if openings is None else Path(openings)
        check_target(target)
        _load(model, memory, ckpt_path)
        result = super().rebase(datamodule, model, memory, newton_steps)
        if self.is_global_zero:
            _report(result)
            if target is not None:
                target.write_text(json.dumps([asdict(one) for one in result.openings], indent=2))
                print(f"saved: {target}")
        return result


def _load(model: pl.LightningModule, memory: str, ckpt_path: str | None) -> dict[str, Any]:
    """Put a checkpoint, the memory's own by default, into the model; and the checkpoint."""
    folder = Path(memory)
    if ckpt_path is None:
        bring_model_up_to_date(MemoryStore(folder))
    source = folder / model_file.NAME if ckpt_path is None else Path(ckpt_path)
    if not source.is_file():
        raise ConfigurationError(f"there is no checkpoint {source}: say --ckpt_path")
    checkpoint: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True)
    model.load_state_dict(checkpoint["state_dict"], assign=True)  # in training's precision
    return checkpoint


def _report(result: UnlearningResult | RebaseResult) -> None:
    numbers = result.to_dict()
    numbers.pop("warnings")
    for name, value in numbers.items():
        print(f"{name}: {value}")
    for message in result.warnings:
        print(f"warning: {message}")


class MUterCLI(LightningCLI):
    """``LightningCLI`` with our Trainer's verbs ``unlearn``, ``rebase``, ``build_memory``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("trainer_class", CLITrainer)
        if not issubclass(kwargs["trainer_class"], CLITrainer):
            raise ConfigurationError("trainer_class must derive from MUterCLI's own Trainer")
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs and ours, with the arguments that the CLI fills in itself."""
        ours = {"model", "datamodule"}
        verbs = ("unlearn", "rebase", "build_memory")
        return {**LightningCLI.subcommands(), **dict.fromkeys(verbs, ours)}

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it is: a checkpoint's word imports no class and sets no argument.

        Lightning takes the model's class and arguments from a checkpoint's hyperparameters, and has
        no public switch for it.
        """


def main(args: ArgsType = None) -> None:
    """The console script: Lightning's verbs and ``unlearn``, or a command of the evaluation."""
    sys.path.insert(0, os.getcwd())  # the user's own classes
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and words[:1] == ["build-memory"]:  # a method's name has no hyphen
        words = ["build_memory", *words[1:]]
    commands = {**COMMANDS, **MEMORY_COMMANDS}
    if isinstance(words, list) and words and words[0] in commands:
        commands[words[0]](words[1:])
        return
    MUterCLI(
        save_config_kwargs={"config_filename": "muter_config.yaml", "overwrite": True},
        subclass_mode_model=True,
        subclass_mode_data=True,
        model_class=pl.LightningModule,
        datamodule_class=pl.LightningDataModule,
        args=words,
        parser_kwargs={
            "description": "Also: export --memory DIR --output CKPT, report DIR, verify DIR; "
            "evaluate -c EXPERIMENT --output DIR, plot RESULTS, tables FILES."
        },
    )
