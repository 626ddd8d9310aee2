"""`build_memory`: Stage I for a model that is trained already, or for a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, SubsetRandomSampler

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.after_training import AfterTraining, refuse_spawned, report
from lightning_muter.lightning.borrowed import RandomState, borrowed
from lightning_muter.lightning.data import TrainingPoints, training_points
from lightning_muter.lightning.fidelity.averaging import Updates
from lightning_muter.lightning.fidelity.decay import decay_of
from lightning_muter.lightning.fidelity.difference import tolerances
from lightning_muter.lightning.fidelity.flow import holds, horizon_of
from lightning_muter.lightning.fidelity.outputs import head_outputs
from lightning_muter.lightning.fidelity.own_loss import check_own_loss
from lightning_muter.lightning.fidelity.points import sampling_of
from lightning_muter.lightning.flavour import pl, refuse_other
from lightning_muter.lightning.folder import check_free, create, model_path
from lightning_muter.lightning.keeper import MemoryKeeper, forgotten, keeper_of, refuse_relearning
from lightning_muter.lightning.kept_state import KeptState, untouched
from lightning_muter.lightning.point_ids import ids_of
from lightning_muter.lightning.process_group import process_group
from lightning_muter.lightning.progress import blocks
from lightning_muter.lightning.rescue import Rescue
from lightning_muter.linalg.lanczos import TimeAverage
from lightning_muter.memory.blocks import BLOCK, block_digest, rows_of_digests
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.memory.points import digests_of
from lightning_muter.memory.start import TrainingFlow
from lightning_muter.models import ModelView, measuring
from lightning_muter.objectives.targets import check_targets
from lightning_muter.parallel import Group
from lightning_muter.unlearning.cost import Cost

__all__ = ["build_memory", "read_checkpoint"]

_SLACK = 1e-2  # outputs that are the head's own differ by rounding alone, in any precision
_UNSEEN = (
    "the memory is of a model that was trained already: that its training used these points, each "
    "as often as its loader draws it,{} perturbations of this threat, and nothing but the trained "
    "parameters, could not be compared"
)
_COMPARED = 16  # points whose loss is the module's own


def build_memory(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule | Dataset[Any],
    ckpt_path: str | os.PathLike[str] | None = None,
) -> UnlearningMemory:
    """`Trainer.build_memory` for any trainer."""
    refuse_other(model=model, datamodule=datamodule)
    keeper = keeper_of(trainer)
    if keeper is None:
        raise ConfigurationError(
            "build_memory needs a MUterCallback in the trainer, which says what the model was "
            "trained with: Trainer(callbacks=[MUterCallback(threat, head=...)])"
        )
    refuse_spawned(trainer)
    refuse_relearning(forgotten(keeper.memory), keeper.overwrite)
    check_free(keeper.memory_dir, keeper.overwrite)
    group, checkpoint = process_group(trainer), _checkpoint(trainer, ckpt_path)
    with _weights_of(model, checkpoint), RandomState.now(group.device).kept():
        keeper.settings = keeper.settings.of(model)
        view = keeper.settings.view(model)
        points = training_points(datamodule, keeper.settings.batch).settled()
        keeper.settings = replace(keeper.settings, batch=points.form)
        points.check()
        past = _Past.of(keeper, trainer, view, checkpoint)
        kept = KeptState(model)
        try:
            kept.train_only(model, set(view.names))
            with borrowed(view, group.device):
                memory, cost = _built(trainer, model, keeper, points, past, group)
        finally:
            kept.restore()
        trainer.strategy.connect(model)  # the model that trainer.unlearn means
        rescue = Rescue(trainer, model_path(keeper.memory_dir))
        rescue.keep()
        create(memory, keeper.memory_dir, rescue, keeper.overwrite)
        rescue.done()
    keeper.memory, keeper.folder, keeper.initial = memory, keeper.memory_dir, past.initial
    report(memory, cost, keeper.folder)
    return memory


def _built(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    keeper: MemoryKeeper,
    points: TrainingPoints,
    past: _Past,
    group: Group,
) -> tuple[UnlearningMemory, Cost | None]:
    """The memory at the model's parameters, after Newton's steps where they are asked for.

    With it comes what a request will take.
    """
    key: bytes = group.broadcast(os.urandom(16))
    texts = ids_of(points.dataset, keeper.ids)
    after = AfterTraining(
        trainer,
        model,
        points,
        keeper.settings,
        keeper.newton_steps,
        keeper.batch_size,
        flows=keeper.horizon is not None,
    )
    after.rehearse()
    digests, together = _read(keeper, keeper.settings.view(model), points, key)
    weights = _drawn(points)
    horizon, flow = horizon_of(keeper.horizon, past.flow, weights)
    settings = keeper.settings.trained(past.weight_decay, horizon)
    compared = check_own_loss(
        model, settings, _batch(trainer, model, points), trainer.precision_plugin.train_step_context
    )
    if keeper.newton_steps:
        after.newton(settings, weights)
    memory = after.stage_one(settings, weights, digests, key, past.initial, flow)
    unseen = _UNSEEN.format("" if compared else " this loss,")
    findings = (*past.findings, unseen)
    finished = after.finished(memory, texts, findings, keeper.rebase_policy, together)
    return finished, after.cost


def _drawn(points: TrainingPoints) -> Tensor:
    """How much each point (n,) counted, as far as the sampler of their loader says it."""
    even = torch.ones(len(points), dtype=torch.float64)
    if points.loader is None:
        return even
    sampler: Any = points.loader.sampler
    if type(sampler) is not SubsetRandomSampler:
        return sampling_of(points.loader, len(points)).weights
    left_out = set(range(len(points))) - {int(i) for i in sampler.indices}
    even[sorted(left_out)] = 0.0
    return even


def _batch(trainer: pl.Trainer, model: pl.LightningModule, points: TrainingPoints) -> Any:
    """Some points as training's loader gives them, in training's precision."""
    batch = points.collated(range(min(_COMPARED, len(points))))
    x = points.form.read(batch)[0]
    batch = trainer.precision_plugin.convert_input(batch)
    moved = trainer.strategy.batch_to_device(batch)
    points.form.put(moved, points.form.read(moved)[0], x.to(next(model.parameters())))
    return moved


def _read(
    keeper: MemoryKeeper, view: ModelView, points: TrainingPoints, key: bytes
) -> tuple[Tensor, Tensor]:
    """Digests of all points (n, 16) and of their blocks (k, 16).

    Range, targets and outputs are what the callback says.
    """
    module, head = view.module, keeper.settings.head
    rows: list[bytes] = []
    together: list[bytes] = []
    layer = None if head is None else module.get_submodule(head)
    for block in blocks(range(len(points)), BLOCK):
        x, targets, beside = points.finite(block)
        keeper.settings.threat.check_inputs(x)
        with untouched(module), measuring(module), torch.no_grad():
            few = x[:2].to(view.device, view.dtype)
            logits = view.beside(beside.part(slice(2)).to(view.device, view.dtype)).logits
            width = head_outputs(logits, layer, few, _SLACK).numel() // len(few)
        check_targets(view.loss, targets, width)
        rows += digests_of(key, x, targets, beside)
        together.append(block_digest(key, x, targets, beside))
    return rows_of_digests(rows), rows_of_digests(together)


# --- what is known of the training ------------------------------------------------------------


@dataclass(frozen=True)
class _Past:
    """λ of a training that is over, and where and for how long it went, as far as it is known."""

    weight_decay: float
    initial: Tensor | None
    flow: TrainingFlow | None
    findings: tuple[str, ...]

    @classmethod
    def of(
        cls,
        keeper: MemoryKeeper,
        trainer: pl.Trainer,
        view: ModelView,
        checkpoint: Mapping[str, Any],
    ) -> _Past:
        """From the callback's arguments, the checkpoint, or a fit of this very trainer.

        Raises:
            ConfigurationError: something is needed that none of them says.
        """
        state = checkpoint.get("callbacks", {}).get(keeper.state_key, {})
        refuse_relearning(state.get("forgotten", 0), keeper.overwrite)
        initial = state.get("initial", keeper.initial)
        if keeper.horizon is not None and initial is None:
            raise ConfigurationError(
                f"horizon={keeper.horizon!r} needs the parameters that training started from, "
                "which only a checkpoint of a fit with the MUterCallback holds: give ckpt_path= of "
                "one, or newton_steps= in the place of a horizon"
            )
        flow = _flow(state, view, checkpoint) if keeper.horizon == "training" else None
        if keeper.horizon == "training" and flow is None:
            raise ConfigurationError(
                "horizon='training' needs the time that training took, which only a checkpoint of "
                "a fit with MUterCallback(horizon='training') holds: give ckpt_path= of one, a "
                "number for horizon=, or newton_steps="
            )
        decay = _decay(keeper, trainer, view, checkpoint)
        return cls(decay, initial, flow, tuple(state.get("findings", ())))


def _flow(
    state: Mapping[str, Any], view: ModelView, checkpoint: Mapping[str, Any]
) -> TrainingFlow | None:
    """How long the training of a checkpoint went by the callback's ``state``, if that says so.

    Raises:
        ConfigurationError: its weights are an average that nothing followed.
    """
    time = float(state.get("flow_time", 0.0))
    if not time > 0:
        return None
    times = TimeAverage.end(time)
    if "averaging_state" in checkpoint:  # WeightAveraging's: the weights are the averaged ones
        if "average" not in state:
            raise ConfigurationError(
                "horizon='training', but the checkpoint's weights are averaged, and its "
                "MUterCallback did not follow the average: give a number for horizon=, or "
                "newton_steps="
            )
        slack, _ = tolerances("32")
        times = Updates(**state["average"]).averaged(view.get(), slack, "the checkpoint")
    return TrainingFlow(times, state.get("pace", "epochs"))


def _decay(
    keeper: MemoryKeeper, trainer: pl.Trainer, view: ModelView, checkpoint: Mapping[str, Any]
) -> float:
    """λ as declared, or the one weight decay of the optimizers that are known of."""
    if keeper.weight_decay is not None:
        return keeper.weight_decay
    optimizers = [one for one in trainer.optimizers if holds(one, view.parameters)]
    if optimizers and not checkpoint and not view.loss.summed:
        return decay_of(optimizers, view.parameters, None, keeper.newton_steps)
    states = checkpoint.get("optimizer_states", [])
    found = {
        float(group.get("weight_decay", 0.0)) for one in states for group in one["param_groups"]
    }
    if len(found) != 1 or (view.loss.summed and found != {0.0}):
        seen = f"has {sorted(found)}" if found else "says none"
        seen += ", and the points a batch of a sum are not known" * view.loss.summed
        raise ConfigurationError(
            f"the weight decay of the training is not known (the checkpoint {seen}): say which λ "
            "its objective had by MUterCallback(weight_decay=...), 0.0 for none"
        )
    return found.pop()


# --- checkpoints --------------------------------------------------------------------------------


def _checkpoint(trainer: pl.Trainer, ckpt_path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """A checkpoint, read without running what is in it; empty where the model is taken as it is."""
    if ckpt_path is None:
        return {}
    path = Path(ckpt_path)
    if str(ckpt_path) == "best":
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not best:
            raise ConfigurationError(
                "ckpt_path='best', but this trainer's ModelCheckpoint has no best model: give the "
                "checkpoint's path, or fit with ModelCheckpoint(monitor=...) first"
            )
        path = Path(best)
    if not path.is_file():
        raise ConfigurationError(f"ckpt_path={str(ckpt_path)!r}: there is no file {path}")
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, read without running what is in it.

    Raises:
        ConfigurationError: it has no state_dict, or holds objects that are not loaded unasked.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found["state_dict"], dict):
            raise TypeError("state_dict is no dictionary")
    except Exception as error:
        raise ConfigurationError(
            f"{path} is no checkpoint with a state_dict that torch.load(weights_only=True) reads "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}): load it yourself and "
            "give the model as it is"
        ) from error
    return dict(found)


@contextmanager
def _weights_of(model: pl.LightningModule, checkpoint: Mapping[str, Any]) -> Iterator[None]:
    """The model with a checkpoint's weights; with its own again where anything fails."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        if checkpoint:
            _load(model, checkpoint["state_dict"])
        yield
    except BaseException:
        _load(model, before)
        raise


def _load(model: pl.LightningModule, state: Mapping[str, Any]) -> None:
    """Weights in their own precision: in place where it is the model's."""
    now = model.state_dict()
    same = all(name not in now or now[name].dtype == one.dtype for name, one in state.items())
    try:
        model.load_state_dict(state, assign=not same)
    except RuntimeError as error:
        raise ConfigurationError(
            f"the checkpoint's weights are not the model's: {' '.join(str(error).split())[:600]}"
        ) from error
