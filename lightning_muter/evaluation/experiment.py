"""A declared experiment: everything that one run needs, in one YAML file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lightning_muter.errors import ConfigurationError
from lightning_muter.evaluation.judge import Attacks
from lightning_muter.lightning.flavour import pl
from lightning_muter.objectives.resolve import resolve_objective
from lightning_muter.objectives.trades import TRADES
from lightning_muter.spec import Settings
from lightning_muter.threats import Threat

__all__ = ["ROWS", "Experiment", "Row"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the comparison: a method under a label of its own.

    ``noise_std`` is the σ of Gaussian noise on ω^u, ``corrector_steps`` the passes over the
    remaining points afterwards, ``request_size`` the points a request (1 forgets one after the
    other, None all at once); ``threat`` is what the memory takes instead of the experiment's
    own, as another smoothing; the rest, ``horizon`` among it, as in `MUterCallback`.
    """

    label: str
    method: str = "muter"
    response: str = "constrained"
    inverse: str = "neumann"
    neumann_order: int = 3
    space: str = "input"
    damping: float = 0.0
    noise_std: float = 0.0
    corrector_steps: int = 0
    horizon: float | Literal["training"] | None = None
    request_size: int | None = None
    threat: Threat | None = None


#: MUter in three variants and the six baselines; none and retrain are always there.
ROWS = (
    Row(label="muter"),
    Row(label="muter_unconstrained", response="unconstrained"),
    Row(label="muter_features", response="unconstrained", space="features", neumann_order=100),
    *(
        Row(label=name, method=name)
        for name in ("newton", "newton_delta", "fisher", "fisher_delta")
    ),
    *(Row(label=name, method=name) for name in ("influence", "influence_delta")),
)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Module, data, threat, methods, removals and seeds of a comparison.

    Attributes:
        name: what plots and tables call it.
        module: makes the LightningModule; its initial weights are each seed's own.
        datamodule: makes the LightningDataModule, with a train and a test loader.
        threat: the constraint set.
        head: dotted name of the linear head.
        loss: "cross_entropy", "logistic" or "squared".
        objective: `TRADES`, or None for adversarial training.
        weight_decay: λ; None reads it from the optimizer.
        rows: the methods; by default ``ROWS``.
        removals: how many points are forgotten: counts (5) or shares ("1%").
        selection: which points go first: "random", "highest_loss", "class:K" (that class first),
            or "mislabelled:SHARE" (so many labels are made wrong before training, and go first).
        seeds: how many seeds, counted from 0.
        max_epochs: epochs of adversarial finetuning, and of each Retrain.
        newton_steps: Newton steps after them; 0 stops early, as the paper does.
        attack_steps: steps of the training attack.
        attack_step_size: its step; None for 2.5 · eps / attack_steps.
        random_start: whether it starts at a random allowed perturbation, or at the point itself.
        precision: of the Lightning trainer.
        sketch: seeded probes a point for the inner response of a network; 0 for the exact one.
        batch_size: points a pass reads at once.
        robust_points: how many points of each set the attacks are run on.
        robust_steps: ascent steps of the robust accuracies.
        strong_steps: ascent steps of the stronger attack on test points.
        strong_restarts: its starts, the first at the point itself; 0 leaves it out.
        autoattack_points: how many test points AutoAttack (torchattacks) is run on, for image
            classifiers with inputs in [0, 1]; 0 leaves it out.
        shadows: shadow heads of the likelihood-ratio attack; 0 leaves it out.

    Raises:
        ConfigurationError: an unknown selection, a bad removal, or two rows of one label.
    """

    name: str
    module: Callable[[], pl.LightningModule]
    datamodule: Callable[[], pl.LightningDataModule]
    threat: Threat
    head: str
    loss: str = "cross_entropy"
    objective: TRADES | None = None
    weight_decay: float | None = None
    rows: list[Row] = field(default_factory=lambda: list(ROWS))
    removals: list[int | str] = field(default_factory=lambda: [1, "1%"])
    selection: str = "random"
    seeds: int = 5
    max_epochs: int = 1
    newton_steps: int = 12
    attack_steps: int = 10
    attack_step_size: float | None = None
    random_start: bool = True
    precision: str = "64-true"
    sketch: int = 0
    batch_size: int = 4096
    robust_points: int = 1000
    robust_steps: int = 20
    strong_steps: int = 50
    strong_restarts: int = 5
    autoattack_points: int = 0
    shadows: int = 0

    def __post_init__(self) -> None:
        labels = [row.label for row in self.rows]
        if len(set(labels)) < len(labels) or {"none", "retrain"} & set(labels):
            raise ConfigurationError(
                f"rows {labels}: each needs a label of its own, and none and retrain are built in"
            )
        kind, _, value = self.selection.partition(":")
        if kind not in ("random", "highest_loss", "class", "mislabelled") or (
            bool(value) != (kind in ("class", "mislabelled"))
        ):
            raise ConfigurationError(
                f"selection={self.selection!r} is unknown; expected random, highest_loss, class:K "
                "or mislabelled:SHARE"
            )
        if not self.removals or self.seeds < 1:
            raise ConfigurationError(
                f"removals={self.removals} and seeds={self.seeds}: give at least one of each"
            )
        resolve_objective(self.objective, self.loss)
        if self.autoattack_points and self.loss != "cross_entropy":
            raise ConfigurationError(
                f"autoattack_points={self.autoattack_points} with loss={self.loss!r}: AutoAttack "
                "needs a classifier trained by cross_entropy"
            )

    def counts(self, n: int) -> list[int]:
        """The removals as numbers of n points, ascending.

        Raises:
            ConfigurationError: a removal that is no count or share below n.
        """
        found = set()
        for removal in self.removals:
            try:
                text = str(removal)
                count = round(n * float(text[:-1]) / 100) if text[-1:] == "%" else int(text)
            except ValueError as error:
                raise ConfigurationError(
                    f"removal {removal!r} is neither a count (5) nor a share ('1%')"
                ) from error
            if not 0 < count < n:
                raise ConfigurationError(f"removal {removal!r} is {count} of {n} points")
            found.add(count)
        return sorted(found)

    def attacks(self) -> Attacks:
        """How hard every candidate is attacked."""
        return Attacks(
            points=self.robust_points,
            steps=self.robust_steps,
            strong_steps=self.strong_steps,
            strong_restarts=self.strong_restarts,
            autoattack_points=self.autoattack_points,
        )

    @property
    def needs_horizon(self) -> bool:
        """Whether a row takes the horizon of the training."""
        return any(row.horizon == "training" for row in self.rows)

    def settings(self, row: Row, weight_decay: float, horizon: float | None = None) -> Settings:
        """What a row's memory is a memory of; ``horizon`` is the training's own."""
        return Settings(
            method=row.method,
            threat=row.threat or self.threat,
            head=self.head,
            parameters=None,
            loss=self.loss,
            objective=self.objective,
            response=row.response,
            inverse=row.inverse,
            neumann_order=row.neumann_order,
            space=row.space,
            damping=row.damping,
            solver="auto",
            sketch=self.sketch,
            weight_decay=weight_decay,
            horizon=horizon if row.horizon == "training" else row.horizon,
        )
