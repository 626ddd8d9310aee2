"""The callback's arguments, as the memory that is asked for and as how training is attacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_muter.arguments import optional, whole
from lightning_muter.errors import ConfigurationError
from lightning_muter.models import BatchForm, LogitsForm
from lightning_muter.models.names import listed
from lightning_muter.objectives.module_loss import asked_loss
from lightning_muter.options import FLAT_DEFAULTS, Ascent, flat
from lightning_muter.spec import Settings

__all__ = ["Arguments"]

_OPTIONS = ("attack", "response", "solver", "representation")
_ASCENT = ("attack_steps", "attack_step_size", "random_start")
_ATTACKED = ("threat", "loss", "objective", "batch", "output", "forward")


@dataclass(frozen=True)
class Arguments:
    """What the arguments of `MUterCallback` come to, each checked.

    Attributes:
        settings: of the memory, as far as they are known before training.
        training: the arguments of `AdversarialTraining`, by name.
        weight_decay: the λ that is named, or None for training's own.
        horizon: the time that is named, "training" for training's own, or None for none.
        newton_steps: how many are taken before Stage I.
    """

    settings: Settings
    training: dict[str, Any]
    weight_decay: float | None
    horizon: float | Literal["training"] | None
    newton_steps: int

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Arguments:
        """Of the arguments by name; others beside them are passed over.

        Raises:
            ConfigurationError: one is outside what it may be, two say the same thing twice, or a
                horizon stands beside Newton's steps.
        """
        keywords = flat(
            {name: given[name] for name in FLAT_DEFAULTS},
            FLAT_DEFAULTS,
            {name: given[name] for name in _OPTIONS},
        )
        ascent = {name: keywords.pop(name) for name in _ASCENT}
        weight_decay = optional("weight_decay", given["weight_decay"])
        horizon, training = given["horizon"], given["horizon"] == "training"
        fixed = None if training else optional("horizon", horizon, positive=True)
        settings = Settings(
            method=given["method"],
            threat=given["threat"],
            head=given["head"],
            parameters=listed(given["parameters"]),
            loss=asked_loss(given["loss"]),
            objective=given["objective"],
            batch=BatchForm.of(given["batch"]),
            logits=LogitsForm(given["forward"], given["output"]),
            weight_decay=weight_decay or 0.0,
            horizon=fixed,
            **keywords,
        )
        if horizon is not None and given["newton_steps"]:
            raise ConfigurationError(
                f"horizon={horizon!r} with newton_steps={given['newton_steps']}: a model at its "
                "optimum has none; give one of the two"
            )
        attack = None if isinstance(given["attack"], Ascent) else given["attack"]
        return cls(
            settings,
            {"attack": attack, **{name: given[name] for name in _ATTACKED}, **ascent},
            weight_decay,
            "training" if training else fixed,
            whole("newton_steps", given["newton_steps"]),
        )
