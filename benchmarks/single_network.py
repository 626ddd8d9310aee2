"""One small network's adversarial training and its gradient, in numpy: nothing of the package.

F(ω) = Σ_i max_{‖δ‖ ≤ ε} softplus(side_i z(x_i + δ)) + (λ n / 2) ‖ω‖² over the trained layers'
weights and biases. The worst perturbation is the fixed point δ = ε ∇a / ‖∇a‖ of the level a that
the adversary raises. What small_networks.py and descent.py, which train many at once, are checked
against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Network:
    """Layers, the last of one output; the first ``frozen`` are not trained.

    Attributes:
        sizes: units of the layers, the input's first.
        frozen: weights and biases of the frozen layers.
        eps: ε.
        decay: λ.
        value: the activation.
        slope: its slope by its value.
    """

    sizes: Sequence[int]
    frozen: tuple[tuple[Array, Array], ...]
    eps: float
    decay: float
    value: Callable[[Array], Array] = np.tanh
    slope: Callable[[Array], Array] = lambda value: 1 - value**2

    def layers(self, omega: Array) -> list[tuple[Array, Array]]:
        found, at = list(self.frozen), 0
        for k in range(len(self.frozen), len(self.sizes) - 1):
            rows, columns = self.sizes[k + 1], self.sizes[k]
            weight = omega[at : at + rows * columns].reshape(rows, columns)
            at += rows * columns
            found.append((weight, omega[at : at + rows]))
            at += rows
        return found

    def outputs(self, omega: Array, x: Array) -> tuple[Array, list[Array]]:
        """z (n,), and what each layer receives."""
        layers, seen = self.layers(omega), [x]
        for weight, bias in layers[:-1]:
            seen.append(self.value(seen[-1] @ weight.T + bias))
        weight, bias = layers[-1]
        return (seen[-1] @ weight.T + bias)[:, 0], seen

    def back(self, omega: Array, seen: list[Array], slope: Array) -> tuple[Array, Array]:
        """Gradients of Σ slope_i z_i: of ω (p,), and of each input (n, d)."""
        layers, parts = self.layers(omega), []
        down = slope[:, None]
        for k in range(len(layers) - 1, -1, -1):
            if k < len(layers) - 1:
                down = down * self.slope(seen[k + 1])
            if k >= len(self.frozen):
                parts += [down.sum(axis=0), (down.T @ seen[k]).ravel()]
            down = down @ layers[k][0]
        return np.concatenate(parts[::-1]), down

    def worst(self, omega: Array, x: Array, side: Array) -> Array:
        """δ (n, d) to 1e-10 of ε; half steps where whole ones go to and fro."""

        def scaled(way: Array) -> Array:
            return self.eps * way / np.linalg.norm(way, axis=1, keepdims=True).clip(1e-300)

        delta = np.zeros_like(x)
        for k in range(400):
            _, seen = self.outputs(omega, x + delta)
            after = scaled(self.back(omega, seen, side)[1])
            if k >= 20:
                after = scaled(after + delta)
            moved = np.abs(after - delta).max()
            delta = after
            if moved < 1e-10 * self.eps:
                break
        return delta

    def losses(self, omega: Array, x: Array, y: Array) -> Array:
        """Robust losses (n,), the worst perturbations found from δ = 0."""
        side = 1.0 - 2.0 * y
        z, _ = self.outputs(omega, x + self.worst(omega, x, side))
        found: Array = np.logaddexp(0, side * z)
        return found

    def gradient(self, omega: Array, x: Array, y: Array) -> Array:
        """∇F (p,), the worst perturbations found from δ = 0."""
        side = 1.0 - 2.0 * y
        z, seen = self.outputs(omega, x + self.worst(omega, x, side))
        slope = side / (1 + np.exp(-side * z))
        return self.back(omega, seen, slope)[0] + self.decay * len(x) * omega
