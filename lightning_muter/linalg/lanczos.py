"""The Lanczos process, and functions of symmetric operators that come from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.linalg.solution import Operator, Solution, Status, finite, relative_residual

__all__ = [
    "Krylov",
    "TimeAverage",
    "decay_integral",
    "first_column",
    "flow",
    "inverse_square_root",
    "largest_eigenvalue",
]

_EXHAUSTED = 1e-13
_FIRST = 8  # rows of the basis to begin with; doubled as it grows


@dataclass(frozen=True)
class TimeAverage:
    """Σ_k a_k f(s_k) of functions f of time: what an average over the way of a flow sees.

    Attributes:
        times: s_k (k,).
        shares: a_k (k,), of sum 1.

    Example:
        >>> TimeAverage((1.0, 3.0), (0.25, 0.75)).mean
        2.5
    """

    times: Sequence[float]
    shares: Sequence[float]

    @classmethod
    def end(cls, time: float) -> TimeAverage:
        """One time alone."""
        return cls((float(time),), (1.0,))

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[float]]) -> TimeAverage:
        """The inverse of `to_dict`.

        Raises:
            ValueError: it is no average.
        """
        found = cls(tuple(data["times"]), tuple(data["shares"]))
        numbers = all(isinstance(v, float) and v >= 0 for v in (*found.times, *found.shares))
        if not numbers or len(found.times) != len(found.shares) or not math.isfinite(found.mean):
            raise ValueError("times and shares of an average are as many numbers, none negative")
        if abs(sum(found.shares) - 1.0) > 1e-6:
            raise ValueError(f"the shares of an average sum to {sum(found.shares)!r}, not to 1")
        return found

    def to_dict(self) -> dict[str, list[float]]:
        """Plain data."""
        return {"times": list(self.times), "shares": list(self.shares)}

    @property
    def mean(self) -> float:
        """Σ_k a_k s_k."""
        return sum(s * a for s, a in zip(self.times, self.shares, strict=True))

    def scaled(self, factor: float) -> TimeAverage:
        """The same with other units of time."""
        return TimeAverage(tuple(factor * s for s in self.times), tuple(self.shares))

    def decayed(self, values: Tensor) -> Tensor:
        """Σ_k a_k exp(-s_k a) of each eigenvalue a (m,)."""
        times, shares = self._tensors(values)
        return torch.exp(-times * values.unsqueeze(1)) @ shares

    def integral(self, values: Tensor) -> Tensor:
        """Σ_k a_k (1 - exp(-s_k a)) / a of each eigenvalue a (m,), and Σ_k a_k s_k at a = 0."""
        times, shares = self._tensors(values)
        return decay_integral(times, values.unsqueeze(1)) @ shares

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_tensor(self.times), like.new_tensor(self.shares)


def decay_integral(time: Tensor, rate: Tensor) -> Tensor:
    """∫₀ᵗ exp(-s a) ds for times t and rates a of shapes that go together; t at a = 0.

    Example:
        >>> decay_integral(torch.tensor([1.0, 2.0]), torch.tensor(0.0))
        tensor([1., 2.])
    """
    x = time * rate
    small = x.abs() < 1e-12
    safe = torch.where(small, torch.ones_like(x), x)
    return time * torch.where(small, torch.ones_like(x), -torch.expm1(-safe) / safe)


class Krylov:
    """An orthonormal basis of span(b, A b, A² b, …) and the tridiagonal T = QᵀAQ, step by step.

    Systems lie along the last dimension of b (..., d), one symmetric A each. A system that the
    caller declares done keeps T's old part and gets zero vectors: it changes no more, whatever
    else is in the batch. Full reorthogonalisation, twice.

    Args:
        operator: products with A for vectors of b's shape.
        start: b (..., d).
    """

    def __init__(self, operator: Operator, start: Tensor) -> None:
        self.operator = operator
        self.norm = torch.linalg.vector_norm(start, dim=-1, keepdim=True)
        self.done = self.norm == 0
        self.length = self.norm
        self.exhausted = torch.zeros_like(self.done)
        self._rows = start.new_zeros(*start.shape[:-1], _FIRST, start.shape[-1])
        self._count = 0
        self._next = start
        self._alphas: list[Tensor] = []
        self._betas: list[Tensor] = []

    @property
    def basis(self) -> Tensor:
        """Q (..., m, d)."""
        return self._rows[..., : self._count, :]

    def step(self) -> None:
        """One product with A: T grows by a row, and ``length`` is how much of A q is new."""
        if self._alphas:
            self._betas.append(torch.where(self.done, 0.0, self.length).squeeze(-1))
        unit = self._next / self.length.clamp(min=torch.finfo(self.length.dtype).tiny)
        unit = torch.where(self.done, torch.zeros_like(unit), unit)
        self._append(unit)
        w = self.operator(unit)
        alpha = (w * unit).sum(dim=-1, keepdim=True)
        self._alphas.append(torch.where(self.done, torch.ones_like(alpha), alpha).squeeze(-1))
        q = self.basis
        for _ in range(2):  # once more: rounding would let found directions come back
            w = w - (q.mT @ (q @ w.unsqueeze(-1))).squeeze(-1)
        self._next = w
        self.length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        scale = torch.stack(self._alphas).abs().amax(dim=0).unsqueeze(-1)
        self.exhausted = self.length <= _EXHAUSTED * scale

    def _append(self, unit: Tensor) -> None:
        if self._count == self._rows.shape[-2]:
            self._rows = torch.cat([self._rows, torch.zeros_like(self._rows)], dim=-2)
        self._rows[..., self._count, :] = unit
        self._count += 1

    def finish(self, systems: Tensor) -> None:
        """Declare systems (..., 1) done."""
        self.done = self.done | systems

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (..., m) and eigenvectors (..., m, m) of T."""
        t = torch.diag_embed(torch.stack(self._alphas, dim=-1))
        if self._betas:
            off = torch.stack(self._betas, dim=-1)
            t = t + torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)
        values, vectors = torch.linalg.eigh(t)
        return values, vectors

    def combine(self, coefficients: Tensor) -> Tensor:
        """‖b‖ Q c (..., d) for c (..., m)."""
        combined: Tensor = self.norm * (coefficients.unsqueeze(-2) @ self.basis).squeeze(-2)
        return combined


def first_column(values: Tensor, vectors: Tensor, function: Tensor) -> Tensor:
    """f(T) e_1 (..., m) from T's spectrum and f of its eigenvalues."""
    return (vectors * (function * vectors[..., 0, :]).unsqueeze(-2)).sum(dim=-1)


def largest_eigenvalue(
    operator: Operator, start: Tensor, tol: float = 1e-5, max_iter: int = 60
) -> float:
    """The largest eigenvalue of a positive definite A by Lanczos.

    Args:
        operator: products with A.
        start: a vector (p,) that has something of every eigenvector, as a random one.
        tol: ‖A q - θ q‖ / θ at which to stop; the error of θ is about its square.
        max_iter: products at the most.

    Example:
        >>> import torch
        >>> a = torch.tensor([1.0, 2.0, 5.0]).double()
        >>> round(largest_eigenvalue(lambda v: a * v, torch.ones(3).double()), 6)
        5.0
    """
    krylov = Krylov(operator, start)
    for _ in range(min(max_iter, len(start))):
        krylov.step()
        values, vectors = krylov.spectrum()
        rest = float(krylov.length * vectors[-1, -1].abs())
        if rest <= tol * float(values[-1]) or bool(krylov.exhausted):
            break
    return float(values[-1])


def inverse_square_root(
    operator: Operator, vectors: Tensor, tol: float = 1e-6, max_iter: int = 40
) -> tuple[Tensor, Tensor]:
    """K^{-1/2} times ``vectors`` (n, k, d) by Lanczos, one symmetric K a point.

    A vector whose last coefficient falls below ``tol`` of the result is done and changes no more.

    Returns:
        The products (n, k, d), and which points (n,) showed positive curvature only and are done.
    """
    krylov = Krylov(operator, vectors)
    for _ in range(min(max_iter, vectors.shape[-1])):
        krylov.step()
        coefficients, lowest = _root(krylov)
        last = coefficients[..., -1:].abs()
        small = last <= tol * torch.linalg.vector_norm(coefficients, dim=-1, keepdim=True)
        krylov.finish(small | krylov.exhausted | (lowest <= 0).unsqueeze(-1))
        if bool(krylov.done.all()):
            break
    usable = (krylov.done.squeeze(-1) & (lowest > 0)).all(dim=1)
    return krylov.combine(coefficients), usable


def _root(krylov: Krylov) -> tuple[Tensor, Tensor]:
    """T^{-1/2} e_1 (n, k, m), and T's lowest eigenvalue (n, k).

    The latter less 1e-10 of the highest, so that rounding does not pass for positive.
    """
    values, vectors = krylov.spectrum()
    lowest = values[..., 0] - 1e-10 * values[..., -1].abs()
    return first_column(values, vectors, values.clamp(min=1e-300).rsqrt()), lowest


def flow(
    operator: Operator,
    rhs: Tensor,
    horizon: float | TimeAverage,
    tol: float = 1e-10,
    max_iter: int = 500,
) -> Solution:
    """∫₀ʰ exp(-sA) b ds = A⁻¹(I - exp(-hA)) b by Lanczos: a gradient flow stopped after time h.

    Of several times it is the average, Σ_k a_k A⁻¹(I - exp(-s_k A)) b.

    Where h is long against 1/A it is A⁻¹b; a direction of eigenvalue a with h a below 1 moves by
    h b only, as training itself did not settle it. The residual is that of A x = b - exp(-hA) b,
    both from the same Krylov space. Source: ours (docs/theory.md); Bae et al. 2024 filter data
    attribution in the same way.

    Args:
        operator: products with a symmetric A.
        rhs: b (p,).
        horizon: h, in the units of 1/A; or times s_k with their shares a_k.
        tol: residual at which to stop.
        max_iter: Lanczos steps at the most.

    Raises:
        SolverError: the solution is not finite, as where A is indefinite and h long.

    Example:
        >>> import torch
        >>> a = torch.tensor([1.0, 1e6]).double()
        >>> flow(lambda v: a * v, torch.ones(2).double(), horizon=1e-3).value
        tensor([9.9950e-04, 1.0000e-06], dtype=torch.float64)
    """
    if not bool(rhs.any()):
        return Solution(torch.zeros_like(rhs), 0.0, 0, Status.CONVERGED)
    average = horizon if isinstance(horizon, TimeAverage) else TimeAverage.end(horizon)
    krylov = Krylov(operator, rhs)
    limit = min(max_iter, len(rhs))
    for _ in range(limit):
        krylov.step()
        values, vectors = krylov.spectrum()
        step = first_column(values, vectors, average.integral(values))
        if float(krylov.length * step[-1].abs()) <= tol or bool(krylov.exhausted):
            break
    value = krylov.combine(step)
    decayed = krylov.combine(first_column(values, vectors, average.decayed(values)))
    relative = relative_residual(operator(value) - (rhs - decayed), rhs)
    status = Status.CONVERGED if float(values[0]) > 0 else Status.INDEFINITE
    if relative > max(1e3 * tol, 1e-8):
        status = Status.MAX_ITERATIONS
    return finite(Solution(value, relative, len(values), status))
