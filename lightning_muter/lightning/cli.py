"""`MUterCLI`: LightningCLI with the verbs ``unlearn`` and ``rebase``."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from torch.utils.data import DataLoader

from lightning_muter.errors import ConfigurationError, MuterError
from lightning_muter.evaluation.commands import COMMANDS
from lightning_muter.lightning.adversarial_training import AdversarialTraining
from lightning_muter.lightning.build import read_checkpoint
from lightning_muter.lightning.callback import MUterCallback
from lightning_muter.lightning.data import RemovalDataModule
from lightning_muter.lightning.flavour import NAME, pl
from lightning_muter.lightning.keeper import keeper_of
from lightning_muter.lightning.memory_commands import (
    MEMORY_COMMANDS,
    check_openings,
    check_target,
    write_checkpoint,
)
from lightning_muter.lightning.parsing import MUterParser, paragraph
from lightning_muter.lightning.presets import with_presets
from lightning_muter.lightning.removals import points_in
from lightning_muter.lightning.trainer import Trainer
from lightning_muter.memory import model_file
from lightning_muter.memory.files import private
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.kept_model import bring_model_up_to_date
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.objectives.module_loss import ModuleLoss
from lightning_muter.spec import Settings
from lightning_muter.unlearning.certificate import Certificate
from lightning_muter.unlearning.result import RebaseResult, UnlearningResult

__all__ = ["CLITrainer", "MUterCLI", "main", "run"]


if TYPE_CHECKING:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
else:
    _cli = importlib.import_module(f"{pl.__name__}.cli")
    ArgsType, LightningCLI = _cli.ArgsType, _cli.LightningCLI
    LightningArgumentParser = _cli.LightningArgumentParser
    MisconfigurationException = pl.utilities.exceptions.MisconfigurationException


class CLITrainer(Trainer):
    """`Trainer` whose ``unlearn`` reads like the other verbs of a command line."""

    def validate(self, *args: Any, memory: str | None = None, **kwargs: Any) -> Any:
        """Run one evaluation epoch over the validation set, under attack where a memory says which.

        Args:
            *args: Lightning's own arguments.
            memory: a memory's folder, whose threat and loss `val_robust_acc` is measured with; that
                of ``ckpt_path`` by default, if there is one.
            **kwargs: Lightning's own.
        """
        kwargs["ckpt_path"] = self._measuring(memory, kwargs.get("ckpt_path"))
        return super().validate(*args, **kwargs)

    def test(self, *args: Any, memory: str | None = None, **kwargs: Any) -> Any:
        """Run one evaluation epoch over the test set, under attack where a memory says which.

        Args:
            *args: Lightning's own arguments.
            memory: a memory's folder, whose threat and loss `test_robust_acc` is measured with;
                that of ``ckpt_path`` by default, if there is one.
            **kwargs: Lightning's own.
        """
        kwargs["ckpt_path"] = self._measuring(memory, kwargs.get("ckpt_path"))
        return super().test(*args, **kwargs)

    def _measuring(self, memory: str | None, ckpt_path: str | None) -> str | None:
        """Have clean and robust accuracy logged as a memory's threat asks; the checkpoint."""
        if memory is None and (ckpt_path is None or Path(ckpt_path).name != model_file.NAME):
            return ckpt_path
        store = MemoryStore(Path(ckpt_path or "").parent if memory is None else memory)
        if memory is None and not store.exists():
            return ckpt_path
        if ckpt_path is None:
            bring_model_up_to_date(store)
        callbacks: list[pl.Callback] = vars(self)["callbacks"]
        if not any(isinstance(one, AdversarialTraining) for one in callbacks):
            settings = Settings.from_dict(store.facts()["settings"])
            loss, form = settings.loss, settings.logits
            callbacks.append(
                AdversarialTraining(
                    settings.threat,
                    loss=loss.attribute if isinstance(loss, ModuleLoss) else loss,
                    batch=settings.batch.where,
                    output=form.output,
                    forward=form.forward,
                )
            )
        return ckpt_path or str(store.folder / model_file.NAME)

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
        if [indices, ids, points].count(None) != 2:
            raise ConfigurationError("give one of --indices, --ids and --points")
        target = None if output is None else Path(output)
        check_target(target)
        checkpoint = _load(model, memory, ckpt_path)
        removals: pl.LightningDataModule | DataLoader[Any]
        if points is None:
            some = [indices] if isinstance(indices, int) else indices
            removals = RemovalDataModule(datamodule, some, batch_size, ids)
        else:
            removals = points_in(Path(points), batch_size)
        result = super().unlearn(
            removals,
            model=model,
            memory=memory,
            noise_std=noise_std,
            already=already,
            note=note,
            certificate=certificate,
        )
        if self.is_global_zero and target is not None:
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
            openings: a new JSON file, outside the folder and readable by its owner alone, for
                what proves which points the ledger's commitments are of; it is not written by
                default, and cannot be computed later.
        """
        target = None if openings is None else Path(openings)
        check_openings(target, memory)
        _load(model, memory, ckpt_path)
        result = super().rebase(datamodule, model, memory, newton_steps)
        if self.is_global_zero and target is not None:
            with private(target) as file:
                file.write(json.dumps([asdict(one) for one in result.openings], indent=2).encode())
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
    checkpoint = read_checkpoint(source)
    try:
        model.load_state_dict(checkpoint["state_dict"], assign=True)  # in training's precision
    except RuntimeError as error:
        raise ConfigurationError(
            f"{source} is no checkpoint of the config's model ({' '.join(str(error).split())}): "
            "give the model that was trained, with the same arguments"
        ) from error
    return checkpoint


class MUterCLI(LightningCLI):
    """``LightningCLI`` with our Trainer, presets by name, and the verbs of ours.

    They are ``unlearn``, ``rebase`` and ``build_memory``.

    Args:
        *args: Lightning's own arguments: model and datamodule class first.
        **kwargs: Lightning's own; ``trainer_class`` is one of ours, or derives from it.

    Raises:
        ConfigurationError: another trainer class, a config that is neither file nor preset, or an
            argument that a class refuses.
    """

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

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with short errors, whose ``-c`` takes a preset's name too."""
        kwargs.setdefault("dump_header", [f"{NAME}=={vars(pl)['__version__']}"])
        parser = MUterParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="a YAML file, or a preset's name"
        )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse a command line, its presets named; a dictionary or namespace as Lightning does."""
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list):
            self.config = parser.parse_args(with_presets(words))
        else:
            super().parse_arguments(parser, words)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; what a class refuses comes without its wrapping.

        Raises:
            ConfigurationError: an argument that a class refuses.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error, MuterError) or "does not validate" not in str(error).lower():
                raise
            raise ConfigurationError(paragraph(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer; its callbacks are at most one of ours.

        Raises:
            ConfigurationError: the config and its presets name two.
        """
        try:
            return super().instantiate_trainer(**kwargs)
        except RuntimeError as error:  # Lightning's own, of callbacks that share a state
            if MUterCallback.__name__ not in str(error):
                raise
            raise ConfigurationError(
                "the config has more than one MUterCallback, and a trainer builds one memory: "
                "give one preset, or the callback in a config of your own and no preset"
            ) from error

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it is: a checkpoint's word imports no class and sets no argument.

        Lightning takes the model's class and arguments from a checkpoint's hyperparameters, and has
        no public switch for it.
        """


def main(args: ArgsType = None) -> None:
    """The console script: `run`, with what it refuses as one paragraph and exit status 1."""
    try:
        run(args)
    except (MuterError, MisconfigurationException) as error:
        sys.stderr.write(f"lightning-muter: {' '.join(str(error).split())}\n")
        sys.exit(1)


def _check_verb(words: ArgsType, verbs: list[str]) -> None:
    """Refuse a first word that is neither an option nor a verb.

    Raises:
        ConfigurationError: with every verb that there is.
    """
    first = words[0] if isinstance(words, list) and words else "-"
    if not first.startswith("-") and first not in verbs:
        raise ConfigurationError(
            f"{first!r} is no verb: give one of {', '.join(verbs)} (lightning-muter VERB --help "
            "says what each takes)"
        )


def run(args: ArgsType = None) -> None:
    """Lightning's verbs, ``unlearn`` and ``rebase``, or a command of their own.

    Raises:
        MuterError: what was asked for cannot be done.
    """
    sys.path.insert(0, os.getcwd())  # the user's own classes
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and words[:1] == ["build-memory"]:  # a method's name has no hyphen
        words = ["build_memory", *words[1:]]
    commands = {**COMMANDS, **MEMORY_COMMANDS}
    if isinstance(words, list) and words and words[0] in commands:
        commands[words[0]](words[1:])
        return
    _check_verb(words, [*MUterCLI.subcommands(), *commands])
    MUterCLI(
        save_config_kwargs={"config_filename": "muter_config.yaml", "overwrite": True},
        subclass_mode_model=True,
        subclass_mode_data=True,
        model_class=pl.LightningModule,
        datamodule_class=pl.LightningDataModule,
        args=words,
        parser_kwargs={
            "prog": "lightning-muter",
            "description": "Also: presets; export --memory DIR --output CKPT, report DIR, verify "
            "DIR; evaluate -c EXPERIMENT --output DIR, plot RESULTS, tables FILES.",
        },
    )
