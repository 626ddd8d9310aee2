"""Running an experiment: train once a seed, one pass for all memories, a Retrain a removal."""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_muter.errors import ConfigurationError
from lightning_muter.evaluation.experiment import Experiment, Row
from lightning_muter.evaluation.judge import Judge, Points, Shadows, gaps
from lightning_muter.evaluation.peak_memory import peak_memory
from lightning_muter.evaluation.results_table import Cell, Table
from lightning_muter.evaluation.run_folder import claim
from lightning_muter.lightning.callback import MUterCallback
from lightning_muter.lightning.data import RemovalDataModule, training_points
from lightning_muter.lightning.flavour import pl
from lightning_muter.lightning.trainer import Trainer
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.points import digest
from lightning_muter.models import measuring
from lightning_muter.spec import Settings
from lightning_muter.unlearning.objective import RobustObjective
from lightning_muter.unlearning.points import unweighted
from lightning_muter.unlearning.stage_one import build_memories

__all__ = ["run"]

_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


#: how the sentences begin that say what is in doubt of a memory or a request
_DOUBTS = (
    "the system of the remaining points ended.*",
    "training stopped about.*",
    "the update is .* long.*",
    "only .* perturbations are stationary.*",
    "only .* strict inner maximum.*",
    "only .* unconstrained response.*",
    "the curvature is indefinite.*",
    "retrace_error is.*",
    "the curvature is singular.*",
)


def run(
    experiment: Experiment,
    output: str | os.PathLike[str],
    on_cells: Callable[[list[Cell]], None] | None = None,
) -> Table:
    """Run what is missing of an experiment and return its whole table.

    Trained and retrained heads are kept in ``output/heads`` and metrics in ``output/results.csv``:
    a run that was stopped goes on where it was.

    Args:
        experiment: what to run.
        output: a folder of this experiment's own.
        on_cells: called with every group of new cells, to log them live.

    Raises:
        ConfigurationError: the folder holds another experiment.
    """
    folder = Path(output)
    claim(folder, experiment)
    table = Table(folder / "results.csv")
    with _quiet():
        for seed in range(experiment.seeds):
            _Seed.start(experiment, seed, folder).run(table, on_cells or (lambda cells: None))
    return table


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger(pl.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*number of training batches.*")
            for doubt in _DOUBTS:  # the comparison's rows are measured against a Retrain instead
                warnings.filterwarnings("ignore", doubt)
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class _Seed:
    """One seed's data, initial module and folder."""

    experiment: Experiment
    seed: int
    folder: Path
    initial: pl.LightningModule
    train: Points
    test: Points
    wrong: Tensor  # which labels (n,) were made wrong
    train_batch: int

    @classmethod
    def start(cls, experiment: Experiment, seed: int, folder: Path) -> _Seed:
        pl.seed_everything(seed, verbose=False)
        datamodule, module = experiment.datamodule(), experiment.module()
        points = training_points(datamodule)
        x, y, _ = points.batch(range(len(points)))  # no form is asked: nothing is beside them
        datamodule.setup("test")
        loader = datamodule.test_dataloader()
        tests = [batch[:2] for batch in loader]
        test = (torch.cat([b[0] for b in tests]), torch.cat([b[1] for b in tests]))
        batch = getattr(datamodule.train_dataloader(), "batch_size", None) or 128
        dtype = torch.float64 if experiment.precision == "64-true" else torch.float32
        x, test = x.to(dtype), (test[0].to(dtype), test[1])
        wrong = torch.zeros(len(x), dtype=torch.bool)
        kind, _, value = experiment.selection.partition(":")
        if kind == "mislabelled":
            wrong = torch.rand(len(x)) < float(value)
            y = _mislabel(y, wrong)
        return cls(experiment, seed, folder, module.to(dtype), (x, y), test, wrong, batch)

    def run(self, table: Table, on_cells: Callable[[list[Cell]], None]) -> None:
        experiment, n = self.experiment, len(self.train[0])
        counts = experiment.counts(n)
        labels = ["none", "retrain", *(row.label for row in experiment.rows)]
        missing = [m for m in counts if not all(table.has(self.seed, m, k) for k in labels)]
        if not missing:
            return
        everyone = torch.arange(n)
        trained, seconds = self.head("trained", everyone)
        start = time.perf_counter()
        with peak_memory(trained.device) as peak:
            memories = self.memories(trained)
        stage_one = time.perf_counter() - start
        disk = {label: _disk_bytes(memory) for label, memory in memories.items()}
        order = self.order(trained)
        shadows = self.shadows()
        for m in tqdm(missing, f"{experiment.name}, seed {self.seed}", leave=False):
            gone, keep = order[:m], order[m:].sort().values
            retrained, retrain_seconds = self.head(f"without-{m}", keep)
            judge = self.judge(trained, retrained, gone, keep, shadows)
            target = judge.measure(retrained, memories["reference"].without(gone.tolist()))
            for row in (None, *experiment.rows):
                label = "none" if row is None else row.label
                if table.has(self.seed, m, label):
                    continue
                found = self.unlearn(row, memories, trained, gone, judge)
                if row is not None:
                    found["seconds_stage_one"] = stage_one / len(experiment.rows)
                    found["disk_bytes"] = disk[label]
                    if peak.bytes is not None:
                        found["peak_bytes_stage_one"] = float(peak.bytes)
                self._record(table, on_cells, m, label, {**found, **gaps(found, target)})
            if not table.has(self.seed, m, "retrain"):
                found = {**target, **gaps(target, target), "seconds": retrain_seconds}
                self._record(table, on_cells, m, "retrain", found)

    def _record(
        self,
        table: Table,
        on_cells: Callable[[list[Cell]], None],
        m: int,
        label: str,
        found: dict[str, float],
    ) -> None:
        share = m / len(self.train[0])
        cells = [Cell(self.seed, m, share, label, name, value) for name, value in found.items()]
        table.add(cells)
        on_cells(cells)

    # --- training ---------------------------------------------------------------------------

    def head(self, name: str, keep: Tensor) -> tuple[Tensor, float]:
        """ω (p,) trained on the points ``keep`` from the seed's initial weights, and seconds."""
        path = self.folder / "heads" / f"seed-{self.seed}-{name}.safetensors"
        if path.exists():
            saved = load_file(path)
            return saved["omega"], float(saved["seconds"])
        start = time.perf_counter()
        omega = self._fit(copy.deepcopy(self.initial), keep)
        seconds = time.perf_counter() - start
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"omega": omega, "seconds": torch.tensor(seconds, dtype=torch.float64)}, path)
        return omega, seconds

    def _fit(self, module: pl.LightningModule, keep: Tensor) -> Tensor:
        experiment = self.experiment
        pl.seed_everything(self.seed, verbose=False)
        callback = MUterCallback(
            experiment.threat,
            head=experiment.head,
            loss=experiment.loss,
            objective=experiment.objective,
            method="none",
            newton_steps=experiment.newton_steps,
            sketch=experiment.sketch,
            weight_decay=experiment.weight_decay,
            batch_size=experiment.batch_size,
            attack_steps=experiment.attack_steps,
            attack_step_size=experiment.attack_step_size,
            random_start=experiment.random_start,
            horizon="training" if experiment.needs_horizon else None,
        )
        trainer = Trainer(
            max_epochs=experiment.max_epochs,
            callbacks=[callback],
            precision=experiment.precision,  # type: ignore[arg-type]
            **_QUIET,
        )
        dataset = TensorDataset(self.train[0][keep], self.train[1][keep])
        trainer.fit(module, DataLoader(dataset, batch_size=self.train_batch, shuffle=True))
        memory = callback.memory
        if memory is None:
            raise ConfigurationError("training ended without a memory: max_epochs must be >= 1")
        if len(keep) == len(self.train[0]):  # what the memories are of
            known = {k: getattr(memory.settings, k) for k in ("weight_decay", "horizon")}
            self._training_file().parent.mkdir(parents=True, exist_ok=True)
            self._training_file().write_text(json.dumps(known))
        return memory.omega_star.cpu()

    def _training_file(self) -> Path:
        return self.folder / "heads" / f"seed-{self.seed}-training.json"

    def _settings(self, row: Row) -> Settings:
        """A row's settings, with the λ and the horizon of training."""
        training = json.loads(self._training_file().read_text())
        return self.experiment.settings(row, training["weight_decay"], training["horizon"])

    def shadows(self) -> Shadows | None:
        """Heads trained on random halves of the training points."""
        if self.experiment.shadows == 0:
            return None
        n = len(self.train[0])
        generator = torch.Generator().manual_seed(self.seed)
        halves = [torch.randperm(n, generator=generator) for _ in range(self.experiment.shadows)]
        members = torch.zeros(len(halves), n, dtype=torch.bool)
        omegas = []
        for k, half in enumerate(halves):
            keep = half[: n // 2].sort().values
            members[k, keep] = True
            omegas.append(self.head(f"shadow-{k}", keep)[0])
        return Shadows(torch.stack(omegas), members)

    # --- unlearning -------------------------------------------------------------------------

    def at(self, omega: Tensor) -> pl.LightningModule:
        """A copy of the module with its head at ω."""
        module = copy.deepcopy(self.initial)
        reference = self.experiment.settings(Row(label="reference"), 0.0)
        reference.view(module).set(omega)
        return module

    def memories(self, trained: Tensor) -> dict[str, UnlearningMemory]:
        """Every row's memory at ω*, and the one of muter that judges refer to."""
        experiment = self.experiment
        rows = [Row(label="reference", method="none"), *experiment.rows]
        settings = [self._settings(row) for row in rows]
        x, y = self.train
        key = bytes(16)
        rows_of_bytes = [list(digest(key, a, b)) for a, b in zip(x, y, strict=True)]
        digests = torch.tensor(rows_of_bytes, dtype=torch.uint8)
        size = experiment.batch_size
        batches = map(unweighted, torch.split(x, size), torch.split(y, size))
        start = settings[0].view(self.initial).get()
        built = build_memories(self.at(trained), settings, batches, digests, key, initial=start)
        robust = replace(built[0].settings, method="muter")  # what its bound is about
        built[0] = replace(built[0], settings=robust)
        return {row.label: memory for row, memory in zip(rows, built, strict=True)}

    def order(self, trained: Tensor) -> Tensor:
        """The order in which points are forgotten (n,)."""
        n = len(self.train[0])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        kind, _, value = self.experiment.selection.partition(":")
        if kind == "class":
            first = self.train[1][order] == int(value)
        elif kind == "mislabelled":
            first = self.wrong[order]
        elif kind == "highest_loss":
            return self._losses(trained).argsort(descending=True)
        else:
            return order
        return torch.cat([order[first], order[~first]])

    def _losses(self, trained: Tensor) -> Tensor:
        settings = self.experiment.settings(Row(label="reference"), 0.0)
        module = self.at(trained)
        view, problem = settings.view(module), settings.problem()
        size = self.experiment.batch_size
        with measuring(module):
            return torch.cat(
                [
                    problem.perturb(view, unweighted(x, y)).losses
                    for x, y in zip(*(torch.split(t, size) for t in self.train), strict=True)
                ]
            )

    def judge(
        self,
        trained: Tensor,
        retrained: Tensor,
        gone: Tensor,
        keep: Tensor,
        shadows: Shadows | None,
    ) -> Judge:
        """What measures every candidate after the removal of ``gone``."""
        settings = self._settings(Row(label="reference"))
        module = self.at(retrained)
        x, y = self.train[0][keep], self.train[1][keep]
        size = self.experiment.batch_size
        view = settings.view(module)
        objective = RobustObjective(
            view,
            settings.problem(),
            lambda: map(unweighted, torch.split(x, size), torch.split(y, size)),
        )
        return Judge(
            view=view,
            threat=self.experiment.threat,
            retained=(x, y),
            forgotten=(self.train[0][gone], self.train[1][gone]),
            test=self.test,
            retrained=retrained,
            trained=trained,
            attacks=self.experiment.attacks(),
            objective=objective,
            shadows=shadows,
            forgotten_members=None if shadows is None else shadows.members[:, gone],
        )

    def unlearn(
        self,
        row: Row | None,
        memories: dict[str, UnlearningMemory],
        trained: Tensor,
        gone: Tensor,
        judge: Judge,
    ) -> dict[str, float]:
        """Forget ``gone`` through the trainer, and measure; None is the unchanged model."""
        reference = memories["reference"].without(gone.tolist())
        if row is None:
            return judge.measure(trained, reference)
        memory = memories[row.label]
        module = self.at(trained)
        trainer = Trainer(accelerator="auto", devices=1, **_QUIET)
        removals = RemovalDataModule(TensorDataset(*self.train), gone.tolist(), row.request_size)
        pl.seed_everything(self.seed, verbose=False)
        with peak_memory(trainer.strategy.root_device) as peak:
            result = trainer.unlearn(
                removals,
                module,
                memory,
                noise_std=row.noise_std,
                corrector_steps=row.corrector_steps,
            )
        omega = memory.settings.view(module).get().cpu()
        found = judge.measure(omega, reference)
        if peak.bytes is not None:
            found["peak_bytes"] = float(peak.bytes)
        stage = "total" if row.corrector_steps else "maximise_and_solve"
        found["seconds"] = result.seconds[stage]
        found["residual"] = result.residual
        found["memory_bytes"] = float(memory.curvature.nbytes if memory.curvature else 0)
        found["smallest_eigenvalue"] = memory.summary["smallest_eigenvalue"]
        found["usable_response"] = memory.summary["usable_response"]
        return found


def _mislabel(y: Tensor, wrong: Tensor) -> Tensor:
    """Another class at random where ``wrong``; the other sign for targets of regression."""
    if y.is_floating_point():
        return torch.where(wrong, -y, y)
    classes = int(y.max()) + 1
    shift = torch.randint(1, max(classes, 2), y.shape)
    return torch.where(wrong, (y + shift) % max(classes, 2), y)


def _disk_bytes(memory: UnlearningMemory) -> float:
    with tempfile.TemporaryDirectory() as folder:
        memory.save(folder)
        return 1.0 * sum(path.stat().st_size for path in Path(folder).iterdir())
