"""Everything that says what a memory is a memory of, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from lightning_muter.errors import ConfigurationError
from lightning_muter.models import ModelView, view_of
from lightning_muter.objectives.losses import LOSSES, LossFunction, resolve_loss
from lightning_muter.responses import resolve_response
from lightning_muter.threats import L2Ball, LinfBall, Threat
from lightning_muter.unlearning.methods import resolve_method
from lightning_muter.unlearning.point_problem import PointProblem

__all__ = ["Settings"]

_THREATS: dict[str, type[Threat]] = {"L2Ball": L2Ball, "LinfBall": LinfBall}
_SOLVERS = ("auto", "direct", "schur")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Method, threat, trained parameters, loss, response, λ and horizon of a memory.

    ``horizon`` is the time of the gradient flow after which training stopped, Σ lr / n; None where
    it converged.
    """

    method: str
    threat: Threat
    head: str | None
    parameters: tuple[str, ...] | None
    loss: str | LossFunction
    response: str
    inverse: str
    neumann_order: int
    space: str
    damping: float
    solver: str
    weight_decay: float = 0.0
    sketch: int = 0
    horizon: float | None = None

    def __post_init__(self) -> None:
        resolve_method(self.method)
        resolve_loss(self.loss)
        resolve_response(self.response, self.inverse, self.neumann_order, self.sketch)
        if not isinstance(self.threat, Threat):
            raise ConfigurationError(f"threat={self.threat!r} must be a Threat: L2Ball(eps=0.5)")
        if (self.head is None) == (self.parameters is None):
            raise ConfigurationError(
                f"head={self.head!r} and parameters={self.parameters!r}: give exactly one"
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
        if self.horizon is not None and not self.horizon > 0:
            raise ConfigurationError(
                f"horizon={self.horizon} must be positive, or None for training that converged"
            )
        if self.solver not in _SOLVERS:
            raise ConfigurationError(f"solver={self.solver!r} is unknown; expected {_SOLVERS}")
        if self.damping < 0 or self.weight_decay < 0:
            raise ConfigurationError(
                f"damping={self.damping} and weight_decay={self.weight_decay} must be >= 0"
            )

    def trained(self, weight_decay: float, horizon: float | None) -> Settings:
        """The same settings with the λ and the horizon of the training behind the memory."""
        return replace(self, weight_decay=weight_decay, horizon=horizon)

    def view(self, module: nn.Module) -> ModelView:
        """The trained parameters of ``module``."""
        return view_of(module, self.loss, self.head, self.parameters, self.space)

    def problem(self) -> PointProblem:
        """What a point contributes under these settings."""
        response = resolve_response(self.response, self.inverse, self.neumann_order, self.sketch)
        return PointProblem(self.method, self.threat, response, self.weight_decay)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest; a custom loss is kept by its name alone."""
        data: dict[str, Any] = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name != "threat"
        }
        data["loss"] = resolve_loss(self.loss).name
        data["parameters"] = None if self.parameters is None else list(self.parameters)
        data["threat"] = {"class": type(self.threat).__name__, **asdict(self.threat)}
        if self.threat.data_range is not None:
            data["threat"]["data_range"] = list(self.threat.data_range)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """Settings from a manifest.

        Raises:
            ConfigurationError: the threat or loss is the user's own and cannot be rebuilt from
                its name; put the MUterCallback that made the memory into the trainer.
        """
        data = dict(data)
        threat = dict(data["threat"])
        name = threat.pop("class")
        if name not in _THREATS or data["loss"] not in LOSSES:
            raise ConfigurationError(
                f"threat {name!r} or loss {data['loss']!r} cannot be rebuilt from its name: give "
                "the trainer the MUterCallback that built this memory"
            )
        data["threat"] = _THREATS[name](**threat)
        if data["parameters"] is not None:
            data["parameters"] = tuple(data["parameters"])
        return cls(**data)
