"""Slow, obvious formulas that the package is checked against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def robust_logistic(w: Tensor, x: Tensor, y: Tensor, eps: float, lam: float) -> Tensor:
    """Closed form for an L2 ball: softplus of minus the worst margin; w is (d + 1,)."""
    sign = 2 * y.to(x) - 1
    margin = sign * (x @ w[:-1] + w[-1]) - eps * w[:-1].norm()
    return F.softplus(-margin).sum() + 0.5 * len(x) * lam * w.square().sum()


def robust_squared(w: Tensor, x: Tensor, y: Tensor, eps: float, lam: float) -> Tensor:
    """Closed form for an L2 ball: half the squared worst residual; w is (d + 1,)."""
    residual = (x @ w[:-1] + w[-1] - y).abs() + eps * w[:-1].norm()
    return 0.5 * residual.square().sum() + 0.5 * len(x) * lam * w.square().sum()


def hessian(function: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(function, w)


def parameters(module: nn.Module, names: list[str]) -> Tensor:
    found = dict(module.named_parameters())
    return torch.cat([found[name].detach().reshape(-1) for name in names])


def brute_force_total_hessian(
    module: nn.Module,
    names: list[str],
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    response: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Σ ∂ωω + ∂ωδ R ∂δω, one point and one dense Hessian in (ω, δ) at a time."""
    w = parameters(module, names)
    shapes = [dict(module.named_parameters())[name].shape for name in names]
    p, total = len(w), torch.zeros(len(w), len(w), dtype=w.dtype)
    for i in range(len(x)):

        def joint(v: Tensor, i: int = i) -> Tensor:
            parts = torch.split(v[:p], [s.numel() for s in shapes])
            values = {k: q.reshape(s) for k, q, s in zip(names, parts, shapes, strict=True)}
            inputs = (x[i].reshape(-1) + v[p:]).reshape(1, *x.shape[1:])
            outputs = torch.func.functional_call(module, values, (inputs,))
            return loss(outputs, y[i : i + 1])

        at = torch.cat([w, delta[i].reshape(-1)])
        grad = torch.autograd.functional.jacobian(joint, at).reshape(-1)[p:]
        full = hessian(lambda v: joint(v).sum(), at)
        r = response(delta[i].reshape(-1), grad, full[p:, p:])
        total += full[:p, :p] + full[:p, p:] @ r @ full[p:, :p]
    return total


def sphere_response(delta: Tensor, grad: Tensor, curvature: Tensor, eps: float) -> Tensor:
    """Pseudo-inverse of P (μI - ∂δδ) P on the sphere's tangent space."""
    unit = delta / delta.norm()
    p = torch.eye(len(delta), dtype=delta.dtype) - torch.outer(unit, unit)
    k = p @ (grad.norm() / eps * torch.eye(len(delta), dtype=delta.dtype) - curvature) @ p
    return torch.linalg.pinv(k, rtol=1e-12, hermitian=True)


def smoothed_sign_response(
    delta: Tensor, grad: Tensor, curvature: Tensor, eps: float, tau: float
) -> Tensor:
    """Inverse of Λ - ∂δδ."""
    shift = (grad.square() + tau**2) ** 1.5 / (eps * tau**2)
    return torch.linalg.inv(torch.diag(shift) - curvature)


def neumann_response(delta: Tensor, grad: Tensor, curvature: Tensor, order: int) -> Tensor:
    """-Σ_{j ≤ k} (I - ∂δδ)^j, term by term."""
    eye = torch.eye(len(delta), dtype=delta.dtype)
    return -sum(torch.linalg.matrix_power(eye - curvature, j) for j in range(order + 1))


def smoothed_linf_logistic(
    w: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    eps: float,
    tau: float,
    lam: float,
    bias: bool = False,
) -> tuple[float, np.ndarray]:
    """F(w) and ∇F(w) of Σ max_δ [softplus(-±w·(x+δ)) + τ Σ_j √(ε² - δ_j²)] + (nλ/2)‖w‖².

    Plain numpy: the maximiser is δ_j = ε r w_j / √(r² w_j² + τ²) with the one unknown r = ∂l/∂z a
    point, found by bisection; ∇F by the envelope theorem. With ``bias`` the last of w is one.
    """
    whole, w = w, w[: x.shape[1]]
    z0, low, high = x @ w + whole[x.shape[1] :].sum(), -y.astype(float), 1.0 - y

    def perturbation(r: np.ndarray) -> np.ndarray:
        slope = r[:, None] * w
        return eps * slope / np.hypot(slope, tau)

    for _ in range(60):  # r - σ(z(r)) + y changes sign once between -y and 1 - y
        r = (low + high) / 2
        z = z0 + perturbation(r) @ w
        above = r > 1 / (1 + np.exp(-z)) - y
        low, high = np.where(above, low, r), np.where(above, r, high)
    delta = perturbation((low + high) / 2)
    z = z0 + delta @ w
    loss = np.logaddexp(0, -(2.0 * y - 1) * z)
    height = tau * np.sqrt(np.maximum(eps**2 - delta**2, 0)).sum(axis=1)
    value = float((loss + height).sum() + 0.5 * len(x) * lam * whole @ whole)
    r = 1 / (1 + np.exp(-z)) - y
    slope = np.concatenate([(x + delta).T @ r, r.sum(keepdims=True)[: int(bias)]])
    return value, slope + len(x) * lam * whole


def boxed_sphere_response(
    delta: Tensor, grad: Tensor, curvature: Tensor, eps: float, low: Tensor, high: Tensor
) -> Tensor:
    """The sphere's response on the coordinates that the box (low, high) of δ does not hold."""
    free = [
        j
        for j in range(len(delta))
        if not (delta[j] >= high[j] - 1e-6 * eps and grad[j] > 0)
        and not (delta[j] <= low[j] + 1e-6 * eps and grad[j] < 0)
    ]
    d, g, h = delta[free], grad[free], curvature[free][:, free]
    unit = d / d.norm()
    p = torch.eye(len(free), dtype=delta.dtype) - torch.outer(unit, unit)
    k = p @ (g.norm() / d.norm() * torch.eye(len(free), dtype=delta.dtype) - h) @ p
    result = torch.zeros_like(curvature)
    for row, i in enumerate(free):
        result[i, free] = torch.linalg.pinv(k, rtol=1e-12, hermitian=True)[row]
    return result


def boxed_sign_response(
    delta: Tensor,
    grad: Tensor,
    curvature: Tensor,
    eps: float,
    tau: float,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """The smoothed sign's response on the coordinates whose unbounded δ_j lies inside the box."""
    wanted = eps * grad / torch.sqrt(grad.square() + tau**2)
    free = [j for j in range(len(delta)) if low[j] < wanted[j] < high[j]]
    result = torch.zeros_like(curvature)
    if free:
        inner = smoothed_sign_response(
            delta[free], grad[free], curvature[free][:, free], eps=eps, tau=tau
        )
        for row, i in enumerate(free):
            result[i, free] = inner[row]
    return result


def exact_response(delta: Tensor, grad: Tensor, curvature: Tensor) -> Tensor:
    """-∂δδ^{-1}, the pseudo-inverse where it is singular."""
    return -torch.linalg.pinv(curvature, rtol=1e-10, hermitian=True)


def no_response(delta: Tensor, grad: Tensor, curvature: Tensor) -> Tensor:
    """A perturbation that does not move."""
    return torch.zeros_like(curvature)


def point_gradients(
    module: nn.Module,
    names: list[str],
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
) -> Tensor:
    """∇_ω l (n, p), one point at a time."""
    found = dict(module.named_parameters())
    rows = []
    for i in range(len(x)):
        value = loss(module(x[i : i + 1]), y[i : i + 1]).sum()
        grads = torch.autograd.grad(value, [found[name] for name in names])
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows).detach()
