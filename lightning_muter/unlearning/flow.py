"""How far training's gradient flow came, and where a Retrain of the same length would end."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muter.linalg.solution import Solution, finite

__all__ = ["flow", "flow_rate", "retrace"]


def flow_rate(optimizer: Optimizer, parameters: Iterable[Tensor] | None = None) -> float | None:
    """The time of the gradient flow that one step takes: lr (1 - dampening) / (1 - momentum).

    None where a step does not follow the gradient (Adam and the like), or where the parameter
    groups move at different rates. With ``parameters`` only their groups count.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(2))]
        >>> flow_rate(torch.optim.SGD(weights, lr=0.1, momentum=0.5))
        0.2
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return None
    wanted = None if parameters is None else {id(p) for p in parameters}
    rates = {
        float(group["lr"]) * (1 - group["dampening"] * bool(group["momentum"])) / (1 - momentum)
        for group in optimizer.param_groups
        if wanted is None or any(id(p) in wanted for p in group["params"])
        if (momentum := float(group["momentum"])) < 1
    }
    return rates.pop() if len(rates) == 1 else None


def flow(
    matrix: Tensor, rhs: Tensor, horizon: float, tol: float = 1e-10, max_iter: int = 500
) -> Solution:
    """∫₀ʰ exp(-sA) b ds = A⁻¹(I - exp(-hA)) b by Lanczos: a gradient flow stopped after time h.

    Where h is long against 1/A it is A⁻¹b; a direction of eigenvalue a with h a below 1 moves by
    h b only, as training itself did not settle it. The residual is that of A x = b - exp(-hA) b,
    both from the same Krylov space. Source: ours (docs/theory.md); Bae et al. 2024 filter data
    attribution in the same way.

    Args:
        matrix: symmetric A (p, p).
        rhs: b (p,).
        horizon: h, in the units of 1/A.
        tol: residual at which to stop.
        max_iter: Lanczos steps at the most.

    Raises:
        SolverError: the solution is not finite, as where A is indefinite and h long.

    Example:
        >>> import torch
        >>> a = torch.diag(torch.tensor([1.0, 1e6]).double())
        >>> flow(a, torch.ones(2).double(), horizon=1e-3).value
        tensor([9.9950e-04, 1.0000e-06], dtype=torch.float64)
    """
    norm = torch.linalg.vector_norm(rhs)
    if float(norm) == 0:
        return Solution(torch.zeros_like(rhs), 0.0, 0, "converged")
    basis = [rhs / norm]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    limit = min(max_iter, len(rhs))
    for k in range(1, limit + 1):
        w = matrix @ basis[-1]
        alphas.append(torch.dot(w, basis[-1]))
        q = torch.stack(basis, dim=1)
        for _ in range(2):  # once more: rounding would let found directions come back
            w = w - q @ (q.T @ w)
        length = torch.linalg.vector_norm(w)
        step, rest, lowest = _small(alphas, betas, horizon)
        residual = float(length * step[-1].abs())
        exhausted = float(length) <= 1e-14 * float(alphas[0].abs())
        if residual <= tol or exhausted or k == limit:
            break
        betas.append(length)
        basis.append(w / length)
    value = norm * (q @ step)
    error = matrix @ value - (rhs - norm * (q @ rest))
    relative = float(torch.linalg.vector_norm(error) / norm)
    done = relative <= max(1e3 * tol, 1e-8)
    status = "max_iterations" if not done else "converged" if lowest > 0 else "indefinite"
    return finite(Solution(value, relative, len(alphas), status))


def retrace(matrix: Tensor, gradient: Tensor, offset: Tensor, horizon: float) -> Solution:
    """ω(h) - ω(0) of the gradient flow of a quadratic model of F, known at ω*.

    Source: ours (docs/theory.md). A request moves ω by the difference of two: with the model of
    the remaining points, and with that of all.

    Args:
        matrix: the model's Hessian (p, p).
        gradient: its gradient at ω* (p,).
        offset: ω(0) - ω* (p,).
        horizon: h.

    Raises:
        SolverError: as in `flow`.
    """
    return flow(matrix, -gradient - matrix @ offset, horizon)


def _small(
    alphas: list[Tensor], betas: list[Tensor], horizon: float
) -> tuple[Tensor, Tensor, float]:
    """φ(T)e₁ and exp(-hT)e₁ of the tridiagonal T, and T's lowest eigenvalue."""
    t = torch.diag(torch.stack(alphas))
    if betas:
        off = torch.stack(betas)
        t = t + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(t)
    small = values.abs() * horizon < 1e-12
    safe = torch.where(small, torch.ones_like(values), values)
    phi = torch.where(small, torch.full_like(values, horizon), -torch.expm1(-horizon * safe) / safe)
    first = vectors[0]
    return (
        vectors @ (phi * first),
        vectors @ (torch.exp(-horizon * values) * first),
        float(values[0]),
    )
