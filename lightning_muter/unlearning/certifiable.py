"""Which problems have an inner maximum in closed form, and the objective of one that has.

Source: ours (docs/certificates.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.models import FeatureHead, LinearHead, ModelView, measuring
from lightning_muter.objectives.losses import LOSSES
from lightning_muter.objectives.targets import check_targets
from lightning_muter.spec import Settings
from lightning_muter.threats import L2Ball, LinfBall, Threat
from lightning_muter.unlearning.inner_dual import LevelLoss, Logistic, Squared
from lightning_muter.unlearning.linear_objective import (
    LinearPoints,
    LinearRobustObjective,
    Outputs,
)
from lightning_muter.unlearning.methods import METHODS
from lightning_muter.unlearning.points import Batch
from lightning_muter.unlearning.reach import BallReach, Reach, SmoothedSignReach

__all__ = ["check_certifiable", "linear_objective"]

#: the losses of a linear model's output, and how many outputs each takes
_LOSSES: dict[str, tuple[LevelLoss, int]] = {
    "logistic": (Logistic(), 1),
    "cross_entropy": (Logistic(), 2),
    "squared": (Squared(), 1),
}


def check_certifiable(settings: Settings, view: ModelView) -> None:
    """Refuse a memory whose problem no theorem covers.

    Raises:
        ConfigurationError: with the condition that fails.
    """
    method = METHODS[settings.method]
    if method.points != "adversarial" or not method.has_memory:
        raise _refused(
            f"method={settings.method!r} keeps no curvature of the robust objective",
            "use method='muter'",
        )
    if settings.objective is not None:
        raise _refused(
            f"objective={settings.objective!r} need not be convex, nor is its maximum known",
            "train adversarially, without an objective of its own",
        )
    if settings.horizon is not None:
        raise _refused(
            f"horizon={settings.horizon:g}: a Retrain that stops early is no optimum",
            "train to the optimum, with newton_steps and no horizon",
        )
    if not settings.weight_decay > 0:
        raise _refused(
            f"weight_decay={settings.weight_decay:g}: without it on every trained parameter the "
            "objective is not strongly convex",
            "train with weight_decay > 0",
        )
    _head(settings, view)
    _reach(settings.threat)


def _refused(condition: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(f"no certificate can be given: {condition}; {remedy}")


def _head(settings: Settings, view: ModelView) -> LinearHead:
    """The linear head that reads the perturbed inputs themselves, as far as settings tell."""
    if not isinstance(view, LinearHead):
        raise _refused(
            f"the trained parameters are {list(view.names)}, no linear head",
            "train the head of a linear model, head=...",
        )
    if isinstance(view, FeatureHead):
        raise _refused(
            "space='features' differentiates at the features perturbations of the inputs",
            "compute the features once and train a linear model on them, where the perturbation "
            "then lives",
        )
    name = next((name for name in _LOSSES if view.loss is LOSSES[name]), None)
    if name is None:
        raise _refused(
            f"the loss {view.loss.name!r} has no inner maximum in closed form",
            f"expected is one of {sorted(_LOSSES)}",
        )
    width = view.layer.out_features
    if width != _LOSSES[name][1]:
        raise _refused(
            f"the loss {name!r} over {width} outputs",
            f"it has a closed form for {_LOSSES[name][1]}",
        )
    return view


def _reach(threat: Threat) -> Reach:
    """What the threat's perturbations reach, in closed form."""
    if type(threat) not in (L2Ball, LinfBall):
        raise _refused(
            f"the threat {type(threat).__name__} is none whose maximiser is known",
            "use L2Ball or LinfBall",
        )
    if threat.data_range is not None:
        raise _refused(
            f"data_range={threat.data_range}: the maximiser within a box has no closed form",
            "train with data_range=None",
        )
    if threat.temperature is not None:
        raise _refused(
            f"temperature={threat.temperature}: a mixed adversary's objective need not be convex",
            "train with temperature=None",
        )
    if isinstance(threat, L2Ball) and threat == L2Ball(threat.eps):
        return BallReach(threat.eps)
    if isinstance(threat, LinfBall):
        if threat.bandwidth is None:
            raise _refused(
                "the L∞ ball's smoothing moves with the gradient, so that its objective is none",
                "give LinfBall a fixed bandwidth",
            )
        plain = LinfBall(threat.eps, smoothing=threat.smoothing, bandwidth=threat.bandwidth)
        if threat == plain and not isinstance(threat.eps, tuple):
            return SmoothedSignReach(threat.eps, threat.bandwidth)
    raise _refused(
        f"{threat} has settings beyond its radius",
        "perturb the numbers that the linear model receives, by one eps and without mean or std",
    )


def linear_objective(settings: Settings, view: ModelView, batch: Batch) -> LinearRobustObjective:
    """The robust objective of points in closed form; all in float64.

    Args:
        settings: of the memory; what they cannot tell is checked here.
        view: of the module.
        batch: the points, which the objective keeps.

    Raises:
        ConfigurationError: with the condition that fails.
    """
    check_certifiable(settings, view)
    head = _head(settings, view)
    with measuring(head.module), torch.no_grad():
        x, y, weights = _read(head, batch)
    return LinearRobustObjective(
        points=LinearPoints(x, y, weights),
        outputs=Outputs(head.layer.out_features, x.shape[1], head.layer.bias is not None),
        loss=_LOSSES[head.loss.name][0],
        reach=_reach(settings.threat),
        weight_decay=settings.weight_decay,
    )


def _read(head: LinearHead, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and weights of a batch, where the module is the linear model of them."""
    if head.straight(batch.x) is None:
        _check_linear(head, batch.x)
    check_targets(head.loss, batch.targets, head.layer.out_features)
    x, y = batch.x.reshape(len(batch), -1), batch.targets.reshape(len(batch))
    return x.double(), y.double(), batch.weights.double()


def _check_linear(head: LinearHead, x: Tensor) -> None:
    """Refuse a module whose head reads other numbers than x, or that returns others than it."""
    flat = x.reshape(len(x), -1)
    h, outputs = head.features(x)
    if h.shape != flat.shape or not torch.equal(h, flat):
        raise _refused(
            f"the head {head.names[0].removesuffix('.weight')!r} reads features that the module "
            "computes, while the perturbation lives at its input, so that no maximiser is known "
            "to be global",
            "compute the features once and train a linear model on them, or ask for bound=True "
            "with a proved inner_gap",
        )
    expected = torch.nn.functional.linear(h, head.layer.weight, head.layer.bias)
    tolerance = 1e4 * torch.finfo(h.dtype).eps * max(1.0, float(expected.abs().max()))
    if not torch.allclose(outputs.reshape(expected.shape), expected, rtol=0.0, atol=tolerance):
        raise _refused(
            "the module's outputs are not its head's own", "return the head's outputs from forward"
        )
