"""A certified publication: the distance proved, the noise drawn, the private ω^u kept apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError, SolverError
from lightning_muter.lightning.progress import Bar
from lightning_muter.lightning.remaining import read_once
from lightning_muter.lightning.removals import Asked
from lightning_muter.memory.memory import UnlearningMemory
from lightning_muter.models import ModelView
from lightning_muter.parallel import Group
from lightning_muter.unlearning.certifiable import check_certifiable, linear_objective
from lightning_muter.unlearning.certificate import Certificate, Publication, spent
from lightning_muter.unlearning.descent import Descent, descend
from lightning_muter.unlearning.gaussian_mechanism import drawn_for_a_test, fresh_noise
from lightning_muter.unlearning.linear_objective import LinearRobustObjective

__all__ = ["Publisher"]


@dataclass(frozen=True)
class Publisher:
    """What a certified call needs: the objective of the points that will remain.

    The rows are read once, each checked against its digest, and the bound is measured on the very
    numbers that were checked. The first process does the work, the others take what it found.

    Attributes:
        certificate: that was asked for.
        objective: of the remaining points; None on the other processes.
        before: the memory before the call.
        group: the processes.
    """

    certificate: Certificate
    objective: LinearRobustObjective | None
    before: UnlearningMemory
    group: Group

    @classmethod
    def prepare(
        cls,
        certificate: Certificate,
        memory: UnlearningMemory,
        view: ModelView,
        asked: Asked,
        group: Group,
        bar: Bar,
    ) -> Publisher:
        """Everything that can be refused, before anything is computed.

        Raises:
            ConfigurationError: a condition of the theorem fails; with its name.
            RemovalError: a remaining row is not what the memory was built on.
        """
        with group.together():
            check_certifiable(memory.settings, view)
            if asked.points is None:
                raise ConfigurationError(
                    "certificate needs a RemovalDataModule: the remaining points are read"
                )
            objective = None
            if group.first:
                left = memory.without(list(asked.indices))
                rest = read_once(left, asked.points, view, bar)
                objective = linear_objective(memory.settings, view, rest)
        return cls(certificate, objective, memory, group)

    def publish(self, memory: UnlearningMemory) -> tuple[UnlearningMemory, Publication]:
        """The memory with its private ω^u at the radius and the model's with noise.

        Raises:
            SolverError: the bound does not come to the radius; with what would help.
        """
        found: tuple[Tensor, Tensor, Publication] | None = None
        whole = memory.whole()  # the first process solves alone
        with self.group.together():
            if self.group.first:
                found = self._found(whole)
        omega, noise, publication = self.group.broadcast(found)
        private = memory.at(omega)
        return private.published(private.omega + noise.to(private.omega)), publication

    def _found(self, memory: UnlearningMemory) -> tuple[Tensor, Tensor, Publication]:
        certificate = self.certificate
        descent = self._descend(memory)
        if not descent.state.bound <= certificate.radius:
            raise SolverError(_too_far(certificate, descent))
        total = spent(self.before.ledger, [certificate])
        assert total is not None  # this publication is in it
        noise = fresh_noise(memory.p, certificate.sigma)
        publication = Publication(
            epsilon=certificate.epsilon,
            delta=certificate.delta,
            radius=certificate.radius,
            sigma=certificate.sigma,
            bound=descent.state.bound,
            corrections=descent.corrections,
            rebuilds=descent.rebuilds,
            noise="test" if drawn_for_a_test() else "system",
            spent=total,
        )
        return descent.state.omega.cpu(), noise, publication

    def _descend(self, memory: UnlearningMemory) -> Descent:
        assert self.objective is not None and memory.curvature is not None  # both were checked
        solver = memory.curvature.damped(memory.settings.damping).solver()

        def solve(columns: Tensor) -> Tensor:
            return torch.stack([solver.solve(one).value for one in columns.unbind(1)], dim=1)

        private = self.before.private  # on its kinks, where a loss has some, as the step is not
        starts = [memory.omega] + ([] if private is None else [private.to(memory.omega)])
        return descend(self.objective, starts, solve, self.certificate.radius)


def _too_far(certificate: Certificate, descent: Descent) -> str:
    state = descent.state
    floor = state.rounding / state.modulus
    advice = (
        f"rounding alone is {floor:.3g} of it: choose a larger radius"
        if floor > 0.3 * certificate.radius
        else "choose a larger radius, forget fewer points a request, or train with more weight "
        "decay; after trainer.rebase requests begin nearer to the optimum"
    )
    return (
        f"no certificate: the remaining points' optimum was proved to be within "
        f"{state.bound:.3g} only, the radius asked is {certificate.radius:.3g} "
        f"({descent.corrections} corrector passes, {descent.rebuilds} Newton steps); {advice}. "
        "Nothing was changed"
    )
