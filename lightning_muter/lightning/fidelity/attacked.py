"""Whether a library's attack plays the threat: inside its set, and as far as its bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.threats import Threat

__all__ = ["AttackedPoints"]

_SLACK = 1e-2  # of the radius: attacks compute in single precision, on another scale


class AttackedPoints:
    """Compares where an attack moved points with where the threat lets them go.

    Args:
        threat: the set, its `eps` in pixels where it has a mean and std.
        attack: the attack's name, for errors.
    """

    def __init__(self, threat: Threat, attack: str) -> None:
        self._threat, self._attack = threat, attack
        self._longest, self._bound = 0.0, False
        self._seen = False

    def see(self, x: Tensor, adversarial: Tensor) -> None:
        """A batch x (n, ...) and what the attack made of it, both as the module receives them.

        Raises:
            ConfigurationError: a point lies outside the set.
        """
        flat = self._threat.flat_pixels(x).double()
        delta = self._threat.scaling.pixels(adversarial.detach()).reshape(len(x), -1) - flat
        radius = self._threat.radius(flat)
        apart = self._threat.distance(flat, delta - self._threat.project(flat, delta))
        self._seen = True
        self._longest = max(self._longest, float(self._threat.distance(flat, delta).max()))
        if float(apart.max()) > _SLACK:
            raise ConfigurationError(
                f"{self._attack} moves points out of the threat's set: {self._length()} of its "
                f"radius {radius:.3g}, where {type(self._threat).__name__}(eps={self._threat.eps}) "
                "ends; give the attack the threat's own eps and norm (init_args={'eps': ...}, on "
                "the scale of pixels in [0, 1]), or leave attack= out for the threat's own ascent"
            )
        nearly = self._threat.active(flat, delta * (1 + _SLACK))
        self._bound = self._bound or bool((nearly > 0).any())

    def check_reached(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """An epoch is over.

        Args:
            reduce: sums a tensor over processes.

        Raises:
            ConfigurationError: no point was moved as far as the threat allows.
        """
        if not self._seen or float(reduce(torch.tensor(float(self._bound)))) > 0:
            return
        raise ConfigurationError(
            f"{self._attack} never moved a point to the threat's bound: at the most "
            f"{self._length()} of its radius, so that training met a weaker adversary than the "
            "memory assumes; give the attack the threat's own eps and norm (init_args={'eps': "
            "...}, on the scale of pixels in [0, 1]), or leave attack= out for its own ascent"
        )

    def _length(self) -> str:
        return f"{self._longest:.3g} times the length"
