"""Adversarial training of many small networks at once, in float64: nothing of the package.

F_j(ω_j) = Σ_i w_ji max_{‖δ‖ ≤ ε} softplus(side_i z(ω_j, x_i + δ)) + (λ Σ_i w_ji / 2) ‖ω_j‖² for
problems j that share their points and differ in the weights w of these, as leaving points out does.

The worst perturbation is the fixed point δ = ε ∇a / ‖∇a‖ of the level a that the adversary raises.
∇a is W₁ᵀ s with s the level's slope at the first layer's units, so that the search is one over
u, δ = W₁ᵀ u: as many numbers as units, not as pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from activations import ACTIVATIONS, Activation
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]

#: steps between two looks at which points are done
ROUND = 4
#: length of a step, over ε, from which on steps are accelerated
NEAR = 0.02


@dataclass(frozen=True)
class Networks:
    """Layers, the last of one output; those of ``frozen`` come first and are not trained.

    Attributes:
        sizes: units of the layers, the input's first.
        frozen: weights (rows, columns) and biases (rows,) of the frozen layers.
        eps: ε.
        decay: λ.
        activation: of all layers but the last.
    """

    sizes: Sequence[int]
    frozen: tuple[tuple[Tensor, Tensor], ...]
    eps: float
    decay: float
    activation: Activation = ACTIVATIONS["tanh"]

    def layers(self, omega: Tensor) -> Layers:
        """Weights (k, rows, columns) and biases (k, 1, rows) of parameters (k, p)."""
        k, at = len(omega), 0
        found = [(w.expand(k, *w.shape), b.expand(k, 1, len(b))) for w, b in self.frozen]
        for j in range(len(self.frozen), len(self.sizes) - 1):
            rows, columns = self.sizes[j + 1], self.sizes[j]
            weight = omega[:, at : at + rows * columns].reshape(k, rows, columns)
            at += rows * columns
            found.append((weight, omega[:, None, at : at + rows]))
            at += rows
        return found

    def start(self, seed: int) -> Tensor:
        """Weights of mean square 1 / inputs, biases 0 (p,): in the order of `layers`."""
        generator, parts = torch.Generator().manual_seed(seed), []
        for j in range(len(self.frozen), len(self.sizes) - 1):
            rows, columns = self.sizes[j + 1], self.sizes[j]
            drawn = torch.randn(rows * columns, generator=generator, dtype=torch.float64)
            parts += [drawn / columns**0.5, torch.zeros(rows, dtype=torch.float64)]
        return torch.cat(parts)

    def outputs(self, omega: Tensor, x: Tensor, u: Tensor) -> Tensor:
        """z (k, n) at x + W₁ᵀ u."""
        layers = self.layers(omega)
        base, gram = first(layers, x)
        return self.up(layers, base + u @ gram)[0]

    def worst(
        self, omega: Tensor, x: Tensor, side: Tensor, start: Tensor, tol: Tensor | float = 1e-11
    ) -> tuple[Tensor, Tensor]:
        """u (k, n, units) with δ = W₁ᵀ u, and how far one step more moves δ, over ε (k, n).

        Half steps of the fixed point, which climb; accelerated where they are short, and taken
        back where an accelerated round climbed down.
        """
        layers = self.layers(omega)
        base, gram = first(layers, x)
        side = side.expand(start.shape[:2])
        u, far, _ = self._step(layers, base, gram, side, start)
        careful = torch.zeros_like(far, dtype=torch.bool)
        for _ in range(150):
            slow = far > tol
            if not slow.any():
                break
            near = slow & ~careful & (far < NEAR)
            for chosen, steps in ((near, self._accelerated), (slow & ~near, self._half)):
                width = int(chosen.sum(dim=1).max())
                if width == 0:
                    continue
                rows = chosen.to(torch.uint8).argsort(dim=1, descending=True)[:, :width]
                wide = rows.unsqueeze(2).expand(-1, -1, u.shape[2])
                some = base.gather(1, wide), gram, side.gather(1, rows), u.gather(1, wide)
                part, moves, bad = steps(layers, *some)
                use = chosen.gather(1, rows) & ~bad
                careful = careful.scatter(1, rows, careful.gather(1, rows) | bad)
                u = u.scatter(1, wide, torch.where(use.unsqueeze(2), part, some[3]))
                far = far.scatter(1, rows, torch.where(use, moves, far.gather(1, rows)))
        return u, far

    def gradient(
        self, layers: Layers, x: Tensor, u: Tensor, seen: list[Tensor], down: list[Tensor]
    ) -> Tensor:
        """Slopes of what units receive, as slopes of the trained parameters (k, p)."""
        parts: list[Tensor] = []
        for j in range(len(self.frozen), len(layers)):
            own = down[j].mT
            weight = own @ seen[j - 1] if j else own @ x + (own @ u) @ layers[0][0]
            parts += [weight.flatten(1), own.sum(dim=2)]
        return torch.cat(parts, dim=1)

    def up(self, layers: Layers, received: Tensor) -> tuple[Tensor, list[Tensor]]:
        """z (k, n), and what each layer but the first sees (k, n, units)."""
        seen = [self.activation.value(received)]
        for weight, bias in layers[1:-1]:
            seen.append(self.activation.value(torch.baddbmm(bias, seen[-1], weight.mT)))
        weight, bias = layers[-1]
        return torch.baddbmm(bias, seen[-1], weight.mT).squeeze(2), seen

    def down(self, layers: Layers, seen: list[Tensor], slope: Tensor) -> list[Tensor]:
        """Slopes of Σ slope_i z_i at what each layer's units receive, the last layer's too."""
        found = [slope.unsqueeze(2)]
        for (weight, _), value in zip(layers[:0:-1], seen[::-1], strict=True):
            found.append((found[-1] @ weight) * self.activation.slope(value))
        return found[::-1]

    def _step(
        self, layers: Layers, base: Tensor, gram: Tensor, side: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The fixed point's map, how far it moves δ, over ε, and the level at u."""
        z, seen = self.up(layers, base + u @ gram)
        slope = self.down(layers, seen, side)[0]
        norm = (slope * (slope @ gram)).sum(dim=2, keepdim=True).clamp(min=1e-300).sqrt()
        after = self.eps * slope / norm
        step = after - u
        far = (step * (step @ gram)).sum(dim=2).clamp(min=0).sqrt() / self.eps
        return after, far, side * z

    def _half(
        self, layers: Layers, base: Tensor, gram: Tensor, side: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        for _ in range(ROUND):
            u = 0.5 * (u + self._step(layers, base, gram, side, u)[0])
        after, far, _ = self._step(layers, base, gram, side, u)
        return after, far, torch.zeros_like(far, dtype=torch.bool)

    def _accelerated(
        self, layers: Layers, base: Tensor, gram: Tensor, side: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Anderson's acceleration, two steps deep, a point."""
        after, first, level = self._step(layers, base, gram, side, u)
        seen, far, now = [(u, after)], first, level
        for _ in range(ROUND):
            u = _mixed(seen, gram)
            after, far, now = self._step(layers, base, gram, side, u)
            seen = [*seen[-2:], (u, after)]
        return after, far, (now < level - 1e-9 * level.abs().clamp(min=1.0)) | (far > first)


def first(layers: Layers, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the first layer's units receive at δ = 0 (k, n, units), and W₁ W₁ᵀ (k, units, units)."""
    weight, bias = layers[0]
    if weight.stride(0) == 0:
        one = x @ weight[0].T + bias[0]
        return one.expand(len(weight), *one.shape), (weight[0] @ weight[0].T).expand(
            len(weight), -1, -1
        )
    return x @ weight.mT + bias, weight @ weight.mT


def _mixed(seen: list[tuple[Tensor, Tensor]], gram: Tensor) -> Tensor:
    """The mixture of steps whose residuals cancel best, in the length of δ."""
    u, after = seen[-1]
    residual = after - u
    if len(seen) == 1:
        return after
    steps = torch.stack([after - b for _, b in seen[:-1]], dim=-1)
    changes = torch.stack([residual - (b - a) for a, b in seen[:-1]], dim=-1)
    measured = torch.einsum("kab,knbm->knam", gram, changes)
    square = torch.einsum("knam,knal->knml", changes, measured)
    right = torch.einsum("kna,knam->knm", residual, measured)
    ridge = 1e-12 * square.diagonal(dim1=2, dim2=3).sum(dim=2).clamp(min=1e-290)
    share = _solved(square, ridge, right)
    return after - torch.einsum("knam,knm->kna", steps, share)


def _solved(square: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """One or two unknowns a point, in closed form."""
    a = square[..., 0, 0] + ridge
    if square.shape[-1] == 1:
        return right / a.unsqueeze(-1)
    b, d = square[..., 0, 1], square[..., 1, 1] + ridge
    determinant = (a * d - b * b).clamp(min=1e-300)
    p, q = right[..., 0], right[..., 1]
    return torch.stack([d * p - b * q, a * q - b * p], dim=-1) / determinant.unsqueeze(-1)


class Objective:
    """F of each problem, and its gradient; perturbations are found from where they last were.

    Args:
        net: the networks.
        x: points (n, d).
        y: labels 0 and 1 (n,).
        weight: of each point in each problem (k, n).
    """

    def __init__(self, net: Networks, x: Tensor, y: Tensor, weight: Tensor) -> None:
        self.net, self.x, self.side, self.weight = net, x, 1.0 - 2.0 * y, weight
        self.decay = net.decay * weight.sum(dim=1)
        self.u = x.new_zeros(*weight.shape, net.sizes[1])

    def __call__(self, omega: Tensor, rows: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """F (k',) and ∇F (k', p) of some problems, to a hundredth of a slope's largest entry."""
        tol = (1e-2 * slope / len(self.x)).clamp(1e-11, 1e-3).unsqueeze(1)
        self.u[rows], _ = self.net.worst(omega, self.x, self.side, self.u[rows], tol)
        value, gradient = self.at(omega, rows)
        decay = self.decay[rows]
        value = value + 0.5 * decay * (omega * omega).sum(dim=1)
        return value, gradient + decay.unsqueeze(1) * omega

    def lifted(self, omega: Tensor) -> bool:
        """Take the perturbations found from δ = 0 where their level is higher; whether any was."""
        fresh, _ = self.net.worst(omega, self.x, self.side, torch.zeros_like(self.u))
        found = [self.side * self.net.outputs(omega, self.x, u) for u in (fresh, self.u)]
        higher = (found[0] > found[1] + 1e-9) & (self.weight > 0)
        self.u = torch.where(higher.unsqueeze(2), fresh, self.u)
        return bool(higher.any())

    def at(self, omega: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The losses' sum and its gradient, perturbations held."""
        weight, layers, u = self.weight[rows], self.net.layers(omega), self.u[rows]
        base, gram = first(layers, self.x)
        z, seen = self.net.up(layers, base + u @ gram)
        level = self.side * z
        value = (weight * torch.nn.functional.softplus(level)).sum(dim=1)
        down = self.net.down(layers, seen, weight * self.side * level.sigmoid())
        return value, self.net.gradient(layers, self.x, u, seen, down)


class Bregman(Objective):
    """The proximal Bregman response function's objective at ω*, for each problem.

    Σ_kept B_i(ω) + κ/2 ‖ω - ω*‖² - (Σ_gone ∇l_i + mλω*)·(ω - ω*), with κ = λ (n - m) and
    B_i(ω) = max_δ l(z(ω, x_i + δ)) - l'(z_i*) z(ω, x_i + δ_i*) the loss less what is linear in the
    output at ω*: the kept points ask for the outputs that they have, with an adversary that moves.
    """

    def __init__(self, net: Networks, x: Tensor, y: Tensor, weight: Tensor, omega: Tensor) -> None:
        super().__init__(net, x, y, weight)
        here, rows = omega.expand(len(weight), -1), torch.arange(len(weight))
        u, _ = net.worst(omega.unsqueeze(0), x, self.side, self.u[:1])
        self.u = u.expand_as(self.u).clone()
        self.there = x + (u @ net.layers(here[:1])[0][0])[0]
        z = net.outputs(omega.unsqueeze(0), x, u)[0]
        self.held = self.side * (self.side * z).sigmoid()
        gone = Objective(net, x, y, 1.0 - weight)
        gone.u = self.u
        self.push = gone.at(here, rows)[1] + net.decay * len(x) * omega

    def __call__(self, omega: Tensor, rows: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = super().__call__(omega, rows, slope)
        layers, weight = self.net.layers(omega), self.weight[rows] * self.held
        z, seen = self.net.up(layers, first(layers, self.there)[0])
        down, still = self.net.down(layers, seen, weight), torch.zeros_like(self.u[rows])
        value = value - (weight * z).sum(dim=1) - (self.push[rows] * omega).sum(dim=1)
        held = self.net.gradient(layers, self.there, still, seen, down)
        return value, gradient - held - self.push[rows]
