"""The metrics of one candidate: a module at some ω, against Retrain's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_muter.adversary.ascent import projected_gradient_ascent, without_blind_spots
from lightning_muter.adversary.attack_library import Attack
from lightning_muter.evaluation.metrics import (
    LikelihoodRatioAUC,
    LossThresholdAUC,
    OutputDivergence,
    confidence,
)
from lightning_muter.evaluation.residual_knowledge import recognition
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import ModelView, measuring
from lightning_muter.objectives.losses import PointLoss
from lightning_muter.threats import Threat
from lightning_muter.unlearning.bound import strong_convexity_bound
from lightning_muter.unlearning.objective import RobustObjective

__all__ = [
    "Attacks",
    "Judge",
    "Points",
    "Shadows",
    "autoattack_accuracy",
    "gaps",
    "strongest_loss",
]

Points = tuple[Tensor, Tensor]
_BATCH = 2048


def strongest_loss(
    module: nn.Module, loss: PointLoss, threat: Threat, points: Points, steps: int, restarts: int
) -> tuple[Tensor, Tensor]:
    """Worst losses (n,) over restarts of projected gradient ascent, and who stays correct (n,).

    The first start is the point itself, the others are random; correct points survived all, and a
    further look at those where an ascent had no gradient. For regression "correct" is all ones.
    """
    x, targets = points
    size = threat.step_size(steps)
    worst = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    correct = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for restart in range(restarts):
        start = threat.random_start(threat.flat_pixels(x)) if restart > 0 else None
        adversarial = projected_gradient_ascent(
            module, loss, threat, x, targets, steps, size, start
        )
        if restart == restarts - 1:
            adversarial, _ = without_blind_spots(
                module, loss, threat, x, targets, adversarial, steps, size
            )
        with torch.no_grad():
            outputs = module(adversarial)
        worst = torch.maximum(worst, loss(outputs, targets).double())
        right = loss.is_correct(outputs, targets)
        if right is not None:
            correct &= right
    return worst, correct


def gaps(found: dict[str, float], target: dict[str, float]) -> dict[str, float]:
    """How far accuracies (losses) and attacks are from Retrain's; Retrain's own value is 0."""
    kinds = ("clean_", "robust_", "strong_", "autoattack_", "mia_", "lira_")
    return {f"gap_{k}": v - target[k] for k, v in found.items() if k.startswith(kinds)}


@dataclass(frozen=True)
class Shadows:
    """Heads (k, p) trained on random halves, and which points (k, n) each was trained on."""

    omegas: Tensor
    members: Tensor


@dataclass(frozen=True)
class Attacks:
    """How hard candidates are attacked, on the first ``points`` of each set.

    ``steps`` of ascent for the robust accuracies; ``strong_steps`` from ``strong_restarts`` starts
    and AutoAttack on ``autoattack_points`` for the stronger ones, 0 to leave them out.
    """

    points: int = 1000
    steps: int = 20
    strong_steps: int = 50
    strong_restarts: int = 5
    autoattack_points: int = 0


@dataclass(frozen=True)
class Judge:
    """Measures modules after one removal: what is retained, forgotten and held out is fixed."""

    view: ModelView
    threat: Threat
    retained: Points
    forgotten: Points
    test: Points
    retrained: Tensor
    trained: Tensor
    attacks: Attacks
    objective: RobustObjective
    shadows: Shadows | None
    forgotten_members: Tensor | None

    def measure(self, omega: Tensor, memory: UnlearningMemory) -> dict[str, float]:
        """All metrics of the module at ω (p,); ``memory`` is of the remaining points."""
        found = self._distances(omega)
        with measuring(self.view.module), self.view.at(omega):
            found.update(self._scores())
            found.update(self._divergence())
            found.update(self._membership())
            found.update(self._knowledge())
            evaluation = self.objective.gradient()
        found["gradient_norm"] = evaluation.residual
        found["stationary"] = evaluation.stationary
        found["active"] = evaluation.active
        bound = strong_convexity_bound(memory, evaluation).value
        if bound is not None:
            found["bound"] = bound
        return found

    def _distances(self, omega: Tensor) -> dict[str, float]:
        distance = float(torch.linalg.vector_norm(omega - self.retrained))
        none = float(torch.linalg.vector_norm(self.trained - self.retrained))
        return {"distance": distance, "distance_relative": distance / none if none else 0.0}

    def _scores(self) -> dict[str, float]:
        found = {}
        module, loss, attacks = self.view.logits, self.view.loss, self.attacks
        with _seeded():
            for name, points in self._sets().items():
                some = _first(points, attacks.points)
                found[f"clean_{name}"] = _clean(module, loss, points)
                found[f"robust_{name}"] = _robust(module, loss, self.threat, some, attacks.steps, 1)
            if attacks.strong_restarts:
                some = _first(self.test, attacks.points)
                budget = (attacks.strong_steps, attacks.strong_restarts)
                found["strong_test"] = _robust(module, loss, self.threat, some, *budget)
            if attacks.autoattack_points:
                some = _first(self.test, attacks.autoattack_points)
                found["autoattack_test"] = autoattack_accuracy(module, self.threat, some)
        return found

    def _sets(self) -> dict[str, Points]:
        return {"retained": self.retained, "forgotten": self.forgotten, "test": self.test}

    @contextmanager
    def _at_retrained(self) -> Iterator[None]:
        with self.view.at(self.retrained):
            yield

    def _divergence(self) -> dict[str, float]:
        loss = self.view.loss
        if loss.name not in ("cross_entropy", "logistic", "squared"):
            return {}
        metric, x = OutputDivergence(loss.name), self.test[0]
        with torch.no_grad():
            for part in torch.split(x, _BATCH):
                mine = self.view.logits(part)
                with self._at_retrained():
                    theirs = self.view.logits(part)
                metric.to(part.device).update(theirs, mine)
        return {"kl": float(metric.compute())}

    def _membership(self) -> dict[str, float]:
        threshold = LossThresholdAUC()
        losses = [self._losses(points) for points in (self.forgotten, self.test)]
        threshold.update(losses[0], True)
        threshold.update(losses[1], False)
        found = {"mia_auc": float(threshold.compute())}
        if self.shadows is None or self.forgotten_members is None:
            return found
        ratio = LikelihoodRatioAUC()
        unseen = torch.zeros(len(self.shadows.omegas), len(self.test[0]), dtype=torch.bool)
        sets = ((self.forgotten, self.forgotten_members, True), (self.test, unseen, False))
        for (points, members, label), loss in zip(sets, losses, strict=True):
            shadow = torch.stack([self._shadow(omega, points) for omega in self.shadows.omegas])
            ratio.update(confidence(loss), shadow, members.to(loss.device), label)
        found["lira_auc"] = float(ratio.compute())
        return found

    def _knowledge(self) -> dict[str, float]:
        """Whether forgotten points are recognised around where they were, beside Retrain."""
        if self.view.loss.level is None:
            return {}
        points = _first(self.forgotten, self.attacks.points)
        mine = recognition(self.view, self.threat, *points)
        with self._at_retrained():
            theirs = recognition(self.view, self.threat, *points)
        return {
            "residual_knowledge": mine.residual(theirs),
            "recognised_again": mine.again,
        }

    def _losses(self, points: Points) -> Tensor:
        module, loss = self.view.logits, self.view.loss
        with torch.no_grad():
            parts = zip(*(torch.split(t, _BATCH) for t in points), strict=True)
            return torch.cat([loss(module(x), y).double() for x, y in parts])

    def _shadow(self, omega: Tensor, points: Points) -> Tensor:
        with self.view.at(omega):
            return confidence(self._losses(points))


def _clean(module: nn.Module, loss: PointLoss, points: Points) -> float:
    metric = MeanMetric().to(points[0].device)
    with torch.no_grad():
        for x, y in zip(*(torch.split(t, _BATCH) for t in points), strict=True):
            outputs = module(x)
            right = loss.is_correct(outputs, y)
            metric.update(loss(outputs, y) if right is None else right.double())
    return float(metric.compute())


def _robust(
    module: nn.Module, loss: PointLoss, threat: Threat, points: Points, steps: int, restarts: int
) -> float:
    worst, correct = strongest_loss(module, loss, threat, points, steps, restarts)
    return float((correct.double() if loss.classifies else worst).mean())


def autoattack_accuracy(module: nn.Module, threat: Threat, points: Points) -> float:
    """The share of images (n, C, H, W) in [0, 1] that withstand AutoAttack within the threat.

    Source: Croce and Hein, 2020, as torchattacks has it.
    """
    x, targets = points
    with torch.no_grad():
        outputs = module(x)
        classes = outputs.shape[1]
        right = outputs.argmax(dim=1) == targets
    if bool(right.any()):
        arguments = {"norm": threat.norm, "eps": threat.eps, "n_classes": classes, "seed": 0}
        attack = Attack("torchattacks.AutoAttack", init_args=arguments).scaled(threat.scaling)
        adversarial = attack(module, x[right], targets[right])
        with torch.no_grad():
            still = module(adversarial).argmax(dim=1) == targets[right]
        right = right.clone()
        right[right.clone()] = still
    return float(right.double().mean())


def _first(points: Points, count: int) -> Points:
    return points[0][:count], points[1][:count]


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random starts for every candidate; the caller's random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
