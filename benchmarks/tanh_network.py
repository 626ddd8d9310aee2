"""Adversarial training of small tanh networks to an optimum, in numpy: nothing of the package.

F(ω) = Σ_i max_{‖δ‖ ≤ ε} softplus(side_i z(x_i + δ)) + (λ n / 2) ‖ω‖² over the trained layers'
weights and biases. The worst perturbation is the fixed point δ = ε ∇a / ‖∇a‖ of the level a that
the adversary raises; the minimum is found by scipy's L-BFGS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

Array = np.ndarray


@dataclass(frozen=True)
class Network:
    """Layers of tanh, the last of one output; the first ``frozen`` are not trained.

    Attributes:
        sizes: units of the layers, the input's first.
        frozen: weights and biases of the frozen layers.
        eps: ε.
        decay: λ.
    """

    sizes: Sequence[int]
    frozen: tuple[tuple[Array, Array], ...]
    eps: float
    decay: float

    def layers(self, omega: Array) -> list[tuple[Array, Array]]:
        found, at = list(self.frozen), 0
        for k in range(len(self.frozen), len(self.sizes) - 1):
            rows, columns = self.sizes[k + 1], self.sizes[k]
            weight = omega[at : at + rows * columns].reshape(rows, columns)
            at += rows * columns
            found.append((weight, omega[at : at + rows]))
            at += rows
        return found

    def start(self, seed: int) -> Array:
        """Weights of mean square 1 / inputs, biases 0: in the order of `layers`."""
        rng, parts = np.random.default_rng(seed), []
        for k in range(len(self.frozen), len(self.sizes) - 1):
            rows, columns = self.sizes[k + 1], self.sizes[k]
            parts += [rng.normal(size=rows * columns) / np.sqrt(columns), np.zeros(rows)]
        return np.concatenate(parts)

    def outputs(self, omega: Array, x: Array) -> tuple[Array, list[Array]]:
        """z (n,), and what each layer receives."""
        layers, seen = self.layers(omega), [x]
        for weight, bias in layers[:-1]:
            seen.append(np.tanh(seen[-1] @ weight.T + bias))
        weight, bias = layers[-1]
        return (seen[-1] @ weight.T + bias)[:, 0], seen

    def back(self, omega: Array, seen: list[Array], slope: Array) -> tuple[Array, Array]:
        """Gradients of Σ slope_i z_i: of ω (p,), and of each input (n, d)."""
        layers, parts = self.layers(omega), []
        down = slope[:, None]
        for k in range(len(layers) - 1, -1, -1):
            if k < len(layers) - 1:
                down = down * (1 - seen[k + 1] ** 2)
            if k >= len(self.frozen):
                parts += [down.sum(axis=0), (down.T @ seen[k]).ravel()]
            down = down @ layers[k][0]
        return np.concatenate(parts[::-1]), down

    def worst(self, omega: Array, x: Array, side: Array, start: Array | None = None) -> Array:
        """δ (n, d) to 1e-10 of ε."""
        delta = np.zeros_like(x) if start is None else start
        for _ in range(400):
            _, seen = self.outputs(omega, x + delta)
            slope = self.back(omega, seen, side)[1]
            after = self.eps * slope / np.linalg.norm(slope, axis=1, keepdims=True).clip(1e-300)
            moved = np.abs(after - delta).max()
            delta = after
            if moved < 1e-10 * self.eps:
                break
        return delta

    def losses(self, omega: Array, x: Array, y: Array) -> Array:
        """The robust loss of each point (n,)."""
        side = 1.0 - 2.0 * y
        delta = self.worst(omega, x, side)
        return np.logaddexp(0, side * self.outputs(omega, x + delta)[0])

    def gradients(self, omega: Array, x: Array, y: Array, delta: Array) -> Array:
        """Σ ∇_ω l (p,) at perturbations."""
        side = 1.0 - 2.0 * y
        z, seen = self.outputs(omega, x + delta)
        return self.back(omega, seen, side / (1 + np.exp(-side * z)))[0]


def minimised(function: Callable[[Array], tuple[float, Array]], start: Array, tol: float) -> Array:
    """L-BFGS, begun again where it stops early, until the gradient's largest entry is small."""
    omega = start
    for _ in range(6):
        options = {"maxiter": 3000, "maxfun": 6000, "gtol": tol, "ftol": 0.0, "maxcor": 30}
        found = optimize.minimize(function, omega, jac=True, method="L-BFGS-B", options=options)
        omega = found.x
        if np.abs(found.jac).max() <= tol:
            break
    return omega


def trained(net: Network, x: Array, y: Array, start: Array, tol: float = 3e-7) -> Array:
    """A minimum of F, from a start."""
    side, decay, last = 1.0 - 2.0 * y, net.decay * len(x), [np.zeros_like(x)]

    def function(omega: Array) -> tuple[float, Array]:
        last[0] = delta = net.worst(omega, x, side, last[0])
        z, seen = net.outputs(omega, x + delta)
        slope = net.back(omega, seen, side / (1 + np.exp(-side * z)))[0]
        value = np.logaddexp(0, side * z).sum() + 0.5 * decay * omega @ omega
        return float(value), slope + decay * omega

    return minimised(function, start, tol * len(x))


def proximal_bregman(
    net: Network, at: Array, kept: tuple[Array, Array], gone: tuple[Array, Array]
) -> Array:
    """The minimum of Σ_kept B_i(ω) + κ/2 ‖ω - ω*‖² - (Σ_gone ∇l_i + mλω*)·(ω - ω*).

    B_i(ω) = max_δ l(z(ω, x_i + δ)) - l'(z_i*) z(ω, x_i + δ_i*) is the loss less what is linear in
    the output at ω*: the kept points ask for the outputs that they have, with an adversary that
    moves with ω. κ = λ (n - m).
    """
    (x, y), (gx, gy) = kept, gone
    side, decay = 1.0 - 2.0 * y, net.decay * len(x)
    there = net.worst(at, x, side)
    z, _ = net.outputs(at, x + there)
    held = side / (1 + np.exp(-side * z))
    push = net.gradients(at, gx, gy, net.worst(at, gx, 1.0 - 2.0 * gy))
    push = push + len(gx) * net.decay * at
    last = [there]

    def function(omega: Array) -> tuple[float, Array]:
        last[0] = delta = net.worst(omega, x, side, last[0])
        z, seen = net.outputs(omega, x + delta)
        own, kept_seen = net.outputs(omega, x + there)
        slope = net.back(omega, seen, side / (1 + np.exp(-side * z)))[0]
        slope = slope - net.back(omega, kept_seen, held)[0]
        moved = omega - at
        value = np.logaddexp(0, side * z).sum() - held @ own
        value += 0.5 * decay * moved @ moved - push @ moved
        return float(value), slope + decay * moved - push

    return minimised(function, at, 3e-7 * len(x))
