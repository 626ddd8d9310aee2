"""`Certificate`: what a publication is to be indistinguishable by, and what all of them add up to.

Source: ours (docs/certificates.md), on the analytic Gaussian mechanism.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_muter.errors import ConfigurationError
from lightning_muter.unlearning.gaussian_mechanism import epsilon_of, largest_mu

__all__ = ["COVERED", "NOT_COVERED", "Certificate", "Publication", "Spent", "spent"]

#: what a certificate is about, for people
COVERED = (
    "the published parameters, against the optimum of the same objective over the remaining points "
    "published with the same noise",
    "all certified publications together, requests that were chosen after seeing earlier ones "
    "included",
)
#: and what it is not
NOT_COVERED = (
    "the models that were published before the first certified request: whoever has them keeps "
    "what they tell",
    "the memory's folder, the private parameters in it, its ledger and its backups",
    "the numbers of a result, its bound, its passes and its seconds, and whether it was refused",
    "the remaining points, and the forgotten ones where the data set still has copies of them",
    "that noise of floating-point numbers is not exactly Gaussian",
)


@dataclass(frozen=True)
class Certificate:
    """Publish a model that (ε, δ) does not let anyone tell from a Retrain's, with noise of σ.

    ω^u is brought to within ``radius`` of the optimum of the remaining points, which a bound
    proves, and N(0, σ²I) is added. The radius has to be chosen before looking at the bound: one
    that is set by the data would tell of the data.

    A value for ``trainer.unlearn(certificate=...)``. Source: ours (docs/certificates.md), on the
    analytic Gaussian mechanism of Balle and Wang, 2018.

    Attributes:
        epsilon: ε > 0, a logarithm of probabilities' ratio.
        delta: δ in (0, 1), a probability.
        radius: ρ > 0, a Euclidean distance of parameters.

    Raises:
        ConfigurationError: a number outside of these.

    Example:
        >>> round(Certificate(epsilon=1.0, delta=1e-5, radius=1e-6).sigma * 1e6, 3)
        3.731
    """

    epsilon: float
    delta: float
    radius: float

    def __post_init__(self) -> None:
        for name, top in (("epsilon", math.inf), ("delta", 1.0), ("radius", math.inf)):
            value = getattr(self, name)
            real = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not real or not 0 < value < top:
                raise ConfigurationError(
                    f"Certificate({name}={value!r}): expected is a number above 0"
                    + (" and below 1" if top == 1.0 else "")
                )

    @property
    def mu(self) -> float:
        """ρ/σ, by which publications add up."""
        return largest_mu(self.epsilon, self.delta)

    @property
    def sigma(self) -> float:
        """The smallest standard deviation of the noise in every parameter that gives (ε, δ)."""
        return self.radius / self.mu


@dataclass(frozen=True)
class Spent:
    """What all publications of a memory together are indistinguishable by.

    Attributes:
        publications: how many were certified.
        mu: √Σ (ρ_i/σ_i)² over them.
        epsilon: with ``delta``, of all of them together.
        delta: as it was asked for last.
        uncertified: the ledger's requests whose model was published without a certificate; with
            any, ε and δ are of the certified publications alone.
    """

    publications: int
    mu: float
    epsilon: float
    delta: float
    uncertified: tuple[int, ...] = ()


@dataclass(frozen=True)
class Publication:
    """One certified publication.

    Attributes:
        epsilon: ε of this publication.
        delta: δ of this publication.
        radius: ρ, fixed beforehand.
        sigma: of the noise in every parameter.
        bound: of the distance to the optimum, at most the radius; not to be published.
        corrections: passes with the memory's curvature that it took.
        rebuilds: Newton steps, each with the curvature built anew.
        noise: "system", or "test" where a test's seed determined it.
        spent: all publications so far, this one included.
    """

    epsilon: float
    delta: float
    radius: float
    sigma: float
    bound: float
    corrections: int
    rebuilds: int
    noise: str
    spent: Spent

    def __str__(self) -> str:
        return (
            f"({self.epsilon:g}, {self.delta:g})-indistinguishable from the optimum of the "
            f"remaining points published with the same noise, σ = {self.sigma:.4g}; "
            f"{self.spent.publications} publications so far: "
            f"({self.spent.epsilon:.4g}, {self.spent.delta:g})"
        )

    def entry(self, first: int) -> dict[str, Any]:
        """Plain data for the ledger.

        Args:
            first: the number of the call's first request, which tells publications apart.
        """
        data = asdict(self)
        data.pop("spent")
        return {**data, "first": first}


def spent(ledger: Iterable[Mapping[str, Any]], more: Sequence[Certificate] = ()) -> Spent | None:
    """What a ledger's publications, and some more, add up to; None where there is none.

    They compose as Gaussian mechanisms do: μ = √Σ μ_i², whatever the requests were chosen by.

    Args:
        ledger: its lines.
        more: publications that are not in it yet.

    Example:
        >>> one = Certificate(1.0, 1e-5, 1e-6)
        >>> both = spent([], [one, one])
        >>> both.publications, round(both.mu / one.mu, 6), both.epsilon > 1
        (2, 1.414214, True)
    """
    known: dict[int, Mapping[str, Any]] = {}
    uncertified = []
    for line in ledger:
        publication = line.get("publication")
        if publication is not None:
            known[int(publication["first"])] = publication
        elif "kind" not in line:
            uncertified.append(int(line["request"]))
    values = [(one["radius"] / one["sigma"], float(one["delta"])) for one in known.values()]
    values += [(one.mu, one.delta) for one in more]
    if not values:
        return None
    mu, delta = math.sqrt(sum(mu**2 for mu, _ in values)), values[-1][1]
    return Spent(len(values), mu, epsilon_of(mu, delta), delta, tuple(uncertified))
