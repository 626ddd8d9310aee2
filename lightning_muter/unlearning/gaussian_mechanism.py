"""The Gaussian mechanism: what noise of which length says, and noise that no seed determines.

Two Gaussians of one σ whose means are ρ apart are told apart as well as N(0, 1) and N(μ, 1), with
μ = ρ/σ. Sources: Balle and Wang, Improving the Gaussian mechanism for differential privacy, 2018;
Dong, Roth and Su, Gaussian differential privacy, 2022.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["delta_of", "drawn_for_a_test", "epsilon_of", "fresh_noise", "largest_mu", "seeded"]


#: below it erfc leaves the normal numbers
_FAR = -30.0


def _log_cdf(x: float) -> float:
    if x > _FAR:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))


def delta_of(epsilon: float, mu: float) -> float:
    """The smallest δ with which means μ standard deviations apart are (ε, δ)-indistinguishable.

    Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ).

    Example:
        >>> round(delta_of(0.0, 1.0), 6)
        0.382925
    """
    first = _log_cdf(mu / 2 - epsilon / mu)
    second = epsilon + _log_cdf(-mu / 2 - epsilon / mu)
    return math.exp(first) * -math.expm1(min(second - first, 0.0))


@lru_cache(maxsize=64)
def largest_mu(epsilon: float, delta: float) -> float:
    """The largest μ that (ε, δ) allows; 1/μ is the smallest σ for a radius of 1.

    Example:
        >>> round(1 / largest_mu(1.0, 1e-5), 3)
        3.731
    """
    low, high = math.log(1e-12), math.log(1e6)
    while low < (middle := (low + high) / 2) < high:
        if delta_of(epsilon, math.exp(middle)) <= delta:
            low = middle
        else:
            high = middle
    return math.exp(low)


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest ε with which means μ standard deviations apart are (ε, δ)-indistinguishable.

    Example:
        >>> round(epsilon_of(largest_mu(1.0, 1e-5), 1e-5), 9)
        1.0
    """
    if mu == 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(high, mu) > delta:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        if delta_of(middle, mu) <= delta:
            high = middle
        else:
            low = middle
    return high


# --- the noise ----------------------------------------------------------------------------------

#: where random bytes come from: the operating system's own source
_SOURCE: ContextVar[Callable[[int], bytes]] = ContextVar("bytes", default=os.urandom)


def drawn_for_a_test() -> bool:
    """Whether a test has taken the operating system's place."""
    return _SOURCE.get() is not os.urandom


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Noise that a seed determines, for tests; the ledger says of it that it protects nobody."""
    token = _SOURCE.set(random.Random(seed).randbytes)
    try:
        yield
    finally:
        _SOURCE.reset(token)


def fresh_noise(count: int, sigma: float) -> Tensor:
    """Independent N(0, σ²) (count,), float64, from the operating system's random source.

    No seed of the user's run determines them, and no random state of the process is touched. They
    are floating-point numbers: what that gives away of a real Gaussian (Mironov, 2012) is not
    accounted for.
    """
    pairs = (count + 1) // 2
    words = torch.frombuffer(bytearray(_SOURCE.get()(16 * pairs)), dtype=torch.int64)
    first, second = ((words >> 11) & (2**53 - 1)).double().add(0.5).div(2.0**53).reshape(2, pairs)
    length, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    return sigma * torch.cat([length * angle.cos(), length * angle.sin()])[:count]
