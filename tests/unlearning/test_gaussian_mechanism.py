"""The noise: its length against direct integration, an attacker, and where it comes from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lightning_muter import Certificate, ConfigurationError
from lightning_muter.unlearning.certificate import spent
from lightning_muter.unlearning.gaussian_mechanism import (
    delta_of,
    drawn_for_a_test,
    epsilon_of,
    fresh_noise,
    largest_mu,
    seeded,
)


def integrated(epsilon: float, mu: float) -> float:
    """∫ max(0, p - e^ε q) for p = N(μ, 1) and q = N(0, 1), by quadrature."""

    def excess(x: float) -> float:
        return max(stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x), 0.0)

    start = epsilon / mu + mu / 2  # where the two are equal
    return float(integrate.quad(excess, start, max(start, mu) + 12, epsabs=0, epsrel=1e-11)[0])


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("delta", [0.3, 1e-2, 1e-5, 1e-9])
def test_sigma_against_direct_integration(epsilon: float, delta: float) -> None:
    sigma = Certificate(epsilon, delta, radius=0.25).sigma
    assert integrated(epsilon, 0.25 / sigma) == pytest.approx(delta, rel=1e-6)
    assert integrated(epsilon, 0.25 / (0.999 * sigma)) > delta  # no smaller one does
    assert epsilon_of(0.25 / sigma, delta) == pytest.approx(epsilon, rel=1e-9)


def test_the_published_figure() -> None:
    assert Certificate(1.0, 1e-5, 1.0).sigma == pytest.approx(3.731, abs=5e-4)
    assert delta_of(0.0, 0.5) == pytest.approx(2 * stats.norm.cdf(0.25) - 1)
    assert epsilon_of(1e-9, 0.1) == 0.0


def test_an_attacker_with_the_likelihood_ratio_stays_under_the_line() -> None:
    draws, p, certificate = 100_000, 3, Certificate(1.0, 0.05, radius=0.1)
    apart = torch.tensor([0.06, -0.08, 0.0], dtype=torch.float64)  # as far as the radius allows
    assert float(apart.norm()) == pytest.approx(certificate.radius)

    def advantage(sigma: float) -> float:
        with seeded(5):
            noise = fresh_noise(2 * draws * p, sigma).reshape(2, draws, p)
        published = torch.stack([apart + noise[0], noise[1]])
        ratio = (published @ apart - 0.5 * apart @ apart) / sigma**2  # log p/q of N(apart), N(0)
        first, second = (ratio > certificate.epsilon).double().mean(dim=1).tolist()
        return float(first - math.exp(certificate.epsilon) * second)

    spread = math.sqrt((1 + math.exp(2)) * 0.25 / draws)
    assert advantage(certificate.sigma) <= certificate.delta + 3 * spread
    assert advantage(certificate.sigma) >= certificate.delta - 3 * spread  # it is tight
    assert advantage(certificate.sigma / 2) > certificate.delta + 10 * spread


def test_noise_is_gaussian_and_nobodys_seed_determines_it() -> None:
    with seeded(1):
        assert drawn_for_a_test()
        first = fresh_noise(20_001, 2.0)
    with seeded(1):
        torch.testing.assert_close(fresh_noise(20_001, 2.0), first, rtol=0, atol=0)
    assert stats.kstest(first.numpy() / 2.0, "norm").pvalue > 0.01
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03
    assert not drawn_for_a_test()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = fresh_noise(4, 1.0)
    torch.manual_seed(0)
    assert not torch.equal(fresh_noise(4, 1.0), one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "values",
    [
        {"epsilon": 0.0},
        {"epsilon": float("inf")},
        {"epsilon": True},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": float("nan")},
        {"radius": -1.0},
        {"radius": "1"},
        {"radius": float("inf")},
    ],
    ids=str,
)
def test_numbers_that_certify_nothing(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(values))):
        Certificate(**{"epsilon": 1.0, "delta": 1e-5, "radius": 1e-3, **values})


def test_publications_compose_as_gaussians_do() -> None:
    one, other = Certificate(1.0, 1e-5, 1e-6), Certificate(0.5, 1e-6, 1e-3)
    total = spent([], [one, other])
    assert total is not None and total.publications == 2
    assert total.mu == pytest.approx(math.hypot(largest_mu(1.0, 1e-5), largest_mu(0.5, 1e-6)))
    assert delta_of(total.epsilon, total.mu) == pytest.approx(1e-6, rel=1e-6)
    assert spent([{"request": 1}]) is None


def test_a_call_of_several_requests_is_one_publication_and_others_are_named() -> None:
    line = {"radius": 1e-3, "sigma": 4e-3, "delta": 1e-5, "first": 2}
    ledger = [
        {"request": 1},
        {"request": 2, "publication": line},
        {"request": 3, "publication": line},
        {"request": 4, "kind": "rebase"},
        {"request": 5, "publication": {**line, "first": 5}},
    ]
    total = spent(ledger)
    assert total is not None and total.publications == 2 and total.uncertified == (1,)
    assert total.mu == pytest.approx(math.sqrt(2) / 4)
