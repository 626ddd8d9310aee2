"""Everything that says what a memory is a memory of, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from lightning_muter.arguments import number, optional, whole
from lightning_muter.curvature.base import CurvatureSum
from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.rows import RowsOptions
from lightning_muter.curvature.rows_sum import RowsSum
from lightning_muter.curvature.sharded import ShardedSum
from lightning_muter.errors import ConfigurationError, MemoryFormatError
from lightning_muter.identity import fingerprint_of, identify, import_path
from lightning_muter.models import BatchForm, LogitsForm, ModelView, view_of
from lightning_muter.objectives.losses import LOSSES, LossFunction, PointLoss
from lightning_muter.objectives.module_loss import ModuleLoss
from lightning_muter.objectives.resolve import as_value, resolve_objective
from lightning_muter.objectives.torch_losses import TorchLoss
from lightning_muter.objectives.trades import TRADES
from lightning_muter.responses import resolve_response
from lightning_muter.threats import L2Ball, LinfBall, Threat
from lightning_muter.unlearning.cost import free_bytes
from lightning_muter.unlearning.methods import resolve_method
from lightning_muter.unlearning.point_problem import PointProblem

__all__ = ["Settings"]

_THREATS: dict[str, type[Threat]] = {"L2Ball": L2Ball, "LinfBall": LinfBall}
_FORMS = ("batch", "taken", "forward", "output")
_SOLVERS = ("auto", "direct", "schur")
_REPRESENTATIONS = ("auto", "dense", "sharded", "rows")
_ROW_DTYPES = {"float64": torch.float64, "float32": torch.float32}
#: how a sum is kept and solved, not which one it is; and what training's batches decided
_MANNER = {"solver", "representation", "row_dtype", "solver_tol", "taken"}
#: of these what a memory's tensors decide
_KEPT = ("representation", "row_dtype")
#: of the free memory that a preconditioner may take
_SHARE = 0.25
_BUDGET = 1 << 30  # bytes, where free memory is not known


class _ByPath(ConfigurationError):
    """A memory's loss, threat, or a function that reads batches or outputs is the user's own."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Method, threat, trained parameters, loss, response, λ and horizon of a memory.

    ``horizon`` is the time of the gradient flow after which training stopped, Σ lr / n; None where
    it converged. ``representation`` is how D_i are summed: "dense", "sharded", "rows", or "auto"
    until the sizes are known. ``objective`` is what training minimised, None for adversarial
    training. What is left out is as the callback's arguments have it, but for "dense".
    """

    method: str
    threat: Threat
    head: str | None = None
    parameters: tuple[str, ...] | None = None
    loss: str | LossFunction | TorchLoss | ModuleLoss = "cross_entropy"
    response: str = "constrained"
    inverse: str = "neumann"
    neumann_order: int = 3
    space: str = "input"
    damping: float = 0.0
    solver: str = "auto"
    weight_decay: float = 0.0
    sketch: int | str = 0
    horizon: float | None = None
    representation: str = "dense"
    row_dtype: str = "float64"
    solver_tol: float | None = None
    objective: TRADES | None = None
    batch: BatchForm = BatchForm()
    logits: LogitsForm = LogitsForm()

    def __post_init__(self) -> None:
        resolve_method(self.method)
        if not isinstance(self.loss, ModuleLoss):  # which is looked up when there is a module
            object.__setattr__(self, "loss", as_value(self.loss))
            resolve_objective(self.objective, self.loss)
        self._as_numbers()
        resolve_response(self.response, self.inverse, self.neumann_order, self.probes)
        if not isinstance(self.threat, Threat):
            raise ConfigurationError(f"threat={self.threat!r} must be a Threat: L2Ball(eps=0.5)")
        if (self.head is None) == (self.parameters is None):
            raise ConfigurationError(
                f"head={self.head!r} and parameters={self.parameters!r}: give exactly one, the "
                "name of the linear layer that is trained (head='classifier'; beside a preset "
                "--trainer.callbacks.head=classifier) or names of parameters"
            )
        if not isinstance(self.head, (str, type(None))):
            raise ConfigurationError(
                f"head={self.head!r} must be the name under which the module holds its linear "
                "layer, as head='classifier'"
            )
        if self.sketch and self.head is None:
            raise ConfigurationError(
                f"sketch={self.sketch} needs a linear head: give head=..., or sketch=0"
            )
        if self.horizon is not None and self.solver == "schur":
            raise ConfigurationError(
                f"solver='schur' with horizon={self.horizon}: a horizon's step is no linear "
                "system; use solver='direct', or no horizon"
            )
        if self.representation not in _REPRESENTATIONS or self.row_dtype not in _ROW_DTYPES:
            raise ConfigurationError(
                f"representation={self.representation!r} must be one of {_REPRESENTATIONS} and "
                f"row_dtype={self.row_dtype!r} one of {list(_ROW_DTYPES)}"
            )
        if self.solver_tol is not None and not self.solver_tol < 1:
            raise ConfigurationError(
                f"solver_tol={self.solver_tol} must be between 0 and 1, or None: it is the "
                "relative residual at which a solve with rows stops"
            )
        if self.solver not in _SOLVERS:
            raise ConfigurationError(f"solver={self.solver!r} is unknown; expected {_SOLVERS}")

    def _as_numbers(self) -> None:
        """Numbers of Python's own in the place of numpy's and torch's."""
        found: dict[str, Any] = {"neumann_order": whole("neumann_order", self.neumann_order)}
        if self.sketch != "auto":
            found["sketch"] = whole("sketch", self.sketch)
        found |= {name: number(name, getattr(self, name)) for name in ("damping", "weight_decay")}
        for name in ("horizon", "solver_tol"):
            found[name] = optional(name, getattr(self, name), positive=True)
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def trained(self, weight_decay: float, horizon: float | None) -> Settings:
        """The same settings with the λ and the horizon of the training behind the memory."""
        return replace(self, weight_decay=weight_decay, horizon=horizon)

    def of(self, module: nn.Module) -> Settings:
        """The same settings with what only the module says.

        Its own loss, where it was named by its attribute, and the entries that forward takes.
        """
        loss, batch = self._loss_of(module), self.batch.taking(self.logits.takes(module))
        known = loss is self.loss and batch == self.batch
        return self if known else replace(self, loss=loss, batch=batch)

    def _loss_of(self, module: nn.Module) -> Any:
        """The loss, which is no attribute's name any more."""
        return self.loss.of(module) if isinstance(self.loss, ModuleLoss) else self.loss

    def robust(self) -> Settings:
        """The settings of the robust objective itself: ω* is every method's, its optimum."""
        return replace(self, method="muter", response="constrained", space="input")

    @property
    def probes(self) -> int:
        """Probes a point of the sketch: 0 for none, and 1 until "auto" is replaced by a number."""
        return 1 if self.sketch == "auto" else int(self.sketch)

    @property
    def sketched(self) -> bool:
        """Whether points' responses are sketched, one maximiser each."""
        total = resolve_method(self.method).curvature == "total"
        return total and self.probes > 0 and self.threat.temperature is None

    def view(self, module: nn.Module) -> ModelView:
        """The trained parameters of ``module``."""
        return view_of(
            module,
            self._loss_of(module),
            self.head,
            self.parameters,
            self.space,
            self.threat.scaling,
            self.objective,
            self.logits,
        )

    def problem(self) -> PointProblem:
        """What a point contributes under these settings."""
        response = resolve_response(self.response, self.inverse, self.neumann_order, self.probes)
        return PointProblem(self.method, self.threat, response, self.weight_decay)

    def rows_options(self, device: torch.device) -> RowsOptions:
        """How rows are kept and solved on a device."""
        free = free_bytes(device)
        budget = _BUDGET if free is None else int(_SHARE * free)
        dtype = _ROW_DTYPES[self.row_dtype]
        return RowsOptions(dtype, self.solver_tol, budget=budget, probes=self.probes)

    def empty_sum(self, view: ModelView) -> CurvatureSum:
        """What the points' curvature is summed in."""
        if self.representation == "rows":
            return RowsSum(self.rows_options(view.device), view.p)
        if self.representation == "sharded":
            return ShardedSum(view.get())
        return DenseCurvature.zeros(view.p, view.device)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest.

        The package's own losses and threats by name; the user's own by import path and a
        fingerprint of their code.
        """
        names = [one.name for one in fields(self) if one.name not in ("batch", "logits")]
        data = {name: _plain(getattr(self, name)) for name in names} | self._forms()
        data["loss"] = _loss_identity(self.loss)
        data["threat"] = _threat_identity(self.threat)
        if self.objective is None:  # as in every memory from before there was a choice
            del data["objective"]
        else:
            data["objective"] = {"own": "TRADES", "beta": float(self.objective.beta)}
        return data

    def _forms(self) -> dict[str, Any]:
        """How batches and outputs are read, as far as it was said."""
        said = {
            "batch": self.batch.where,
            "taken": self.batch.taken or None,
            "forward": self.logits.forward,
            "output": self.logits.output,
        }
        return {
            name: identify(one) if callable(one) else _plain(one)
            for name, one in said.items()
            if one is not None
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """Settings from a manifest; no class or function is looked up by what the file says.

        Raises:
            ConfigurationError: the threat, the loss, or a function that reads batches or outputs is
                the user's own, which no name rebuilds; put the MUterCallback that made the memory
                into the trainer.
            MemoryFormatError: the data are no settings.
        """
        try:
            threat, loss = dict(data["threat"]), dict(data["loss"])
            forms = {name: data[name] for name in _FORMS if name in data}
            own = (threat, loss, *(one for one in forms.values() if isinstance(one, Mapping)))
            if users := [one["path"] for one in own if "path" in one]:
                raise _ByPath(
                    f"{' and '.join(map(str, users))}: no class or function of this package, and "
                    "a file's word is not enough to run one: give the trainer the MUterCallback "
                    "that built this memory"
                )
            values = {
                **{name: one for name, one in data.items() if name not in _FORMS},
                "batch": BatchForm.of(forms.get("batch")).taking(forms.get("taken", ())),
                "logits": LogitsForm(forms.get("forward"), forms.get("output")),
                "threat": _THREATS[threat.pop("own")](**threat),
                "loss": _loss_of(loss),
                "objective": _objective_of(data.get("objective")),
            }
            if values["parameters"] is not None:
                values["parameters"] = tuple(values["parameters"])
            found = cls(**values)
            if found.sketch == "auto" or found.to_dict() != dict(data):
                raise ValueError(f"{dict(data)} reads back as {found.to_dict()}")
        except _ByPath:
            raise
        except (AttributeError, ConfigurationError, KeyError, TypeError, ValueError) as error:
            raise MemoryFormatError(
                f"the memory's settings cannot be read ({type(error).__name__}: {error}): restore "
                "a backup, or rebuild the memory"
            ) from error
        return found

    def differences(self, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Where these settings are not those of a manifest: field -> (the memory's, these).

        How a system is kept and solved may differ, and "auto" may have chosen any number of probes.
        """
        given = self.to_dict()
        names = (given.keys() | saved.keys()) - _MANNER
        if self.sketch == "auto" and saved.get("sketch"):
            names -= {"sketch"}
        pairs = {name: (saved.get(name), given.get(name)) for name in sorted(names)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _loss_identity(loss: str | LossFunction | PointLoss | TorchLoss | ModuleLoss) -> dict[str, Any]:
    if isinstance(loss, str):
        return {"own": loss}
    if isinstance(loss, TorchLoss):
        return loss.to_dict()
    if isinstance(loss, ModuleLoss):
        return {"attribute": loss.attribute}
    own = [name for name, one in LOSSES.items() if one is loss]
    return {"own": own[0]} if own else {**identify(loss)}


def _loss_of(data: Mapping[str, Any]) -> str | TorchLoss:
    """The inverse of `_loss_identity`, for losses that no code of the user's makes."""
    name: str | TorchLoss = TorchLoss.from_dict(data) if "torch" in data else data["own"]
    return name


def _objective_of(data: Mapping[str, Any] | None) -> TRADES | None:
    """The objective of a manifest; None where it says nothing: adversarial training."""
    return None if data is None else TRADES(beta=data["beta"])


def _threat_identity(threat: Threat) -> dict[str, Any]:
    kind = type(threat)
    values = {**vars(threat)}
    plain = {name: _plain(values[name]) for name in sorted(values)}
    for later in ("mean", "std"):  # None in every memory from before there were pixel threats
        if plain.get(later) is None:
            plain.pop(later, None)
    if _THREATS.get(kind.__name__) is kind:
        return {"own": kind.__name__, **plain}
    return {**identify(kind), "fields": plain}


def _plain(value: Any) -> Any:
    """A setting as JSON keeps it; what JSON cannot keep, by what it is."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and not math.isnan(value):
        return float(value)
    return {"is": import_path(type(value)), "fingerprint": fingerprint_of(value)}


def agreed(saved: dict[str, Any], given: Settings | None) -> Settings:
    """The settings of a memory on disk, by the callback's own where those are given.

    Raises:
        ConfigurationError: the two differ.
        MemoryFormatError: what was saved is no setting.
    """
    if given is None:
        return Settings.from_dict(saved)
    decay: Any = given.weight_decay or saved.get("weight_decay")
    horizon = saved.get("horizon") if given.horizon is None else given.horizon
    try:
        trained = given.trained(decay, horizon)
    except ConfigurationError as error:
        raise MemoryFormatError(
            f"the memory says weight_decay={decay!r} and horizon={horizon!r} ({error}): restore a "
            "backup"
        ) from error
    different = trained.differences(saved)
    if different:
        said = "; ".join(
            f"{name}: {before!r} (memory), {now!r} (callback)"
            for name, (before, now) in different.items()
        )
        raise ConfigurationError(
            f"the callback is not the one that built the memory: {said}. Use the memory's "
            "settings, with functions and classes whose code is as it was, in the same Python "
            "version; or rebuild the memory"
        )
    form = trained.batch.taking(saved.get("taken", ()))
    return replace(trained, batch=form, **{name: saved[name] for name in _KEPT if name in saved})
