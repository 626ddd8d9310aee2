"""The robust optimum of a linear model in plain numpy: shares no code with the package.

F(w) = Σ_i l(w·x_i + adversary, y_i) + (λ n / 2) ‖w‖² with the L2 ball's maximum in closed form;
labels are 0 and 1 for the logistic loss, any numbers for the squared one.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg

LAMBDA = 1e-3


def value_and_slope(
    w: np.ndarray, x: np.ndarray, y: np.ndarray, eps: float, loss: str
) -> tuple[float, np.ndarray]:
    """F and a subgradient in plain numpy."""
    norm = np.linalg.norm(w)
    unit = w / norm if norm > 0 else w
    z = x @ w
    if loss == "logistic":
        side = 1.0 - 2 * y
        level = side * z + eps * norm
        rho = 1 / (1 + np.exp(-level))
        value = np.logaddexp(0, level).sum()
    else:
        side = np.where(z < y, -1.0, 1.0)
        rho = np.abs(z - y) + eps * norm
        value = 0.5 * (rho**2).sum()
    decay = LAMBDA * len(x)
    slope = x.T @ (rho * side) + rho.sum() * eps * unit + decay * w
    return float(value + 0.5 * decay * w @ w), slope


def newton_optimum(w: np.ndarray, x: np.ndarray, y: np.ndarray, eps: float) -> np.ndarray:
    """The logistic optimum, by Newton's method on the closed form."""
    eye, side = np.eye(len(w)), 1.0 - 2 * y
    for _ in range(12):
        norm = np.linalg.norm(w)
        unit = w / norm
        rho = 1 / (1 + np.exp(-(side * (x @ w) + eps * norm)))
        rows = side[:, None] * x
        rows += eps * unit
        rows *= np.sqrt(rho * (1 - rho))[:, None]
        curve = linalg.blas.dsyrk(1.0, rows.T)  # its upper half
        curve += rho.sum() * eps / norm * (eye - np.outer(unit, unit)) + LAMBDA * len(x) * eye
        slope = value_and_slope(w, x, y, eps, "logistic")[1]
        step = linalg.cho_solve(linalg.cho_factor(curve), slope)
        w = w - step
        if np.linalg.norm(step) < 1e-8 * np.linalg.norm(w):  # its square is left
            break
    return w


def barrier_optimum(w: np.ndarray, x: np.ndarray, y: np.ndarray, eps: float) -> np.ndarray:
    """The ridge optimum: |r| rounded to √(r² + μ²), μ falling to 1e-10, each μ by Newton's method.

    Its distance to the optimum is at most √(2 n μ ε‖w‖ / κ) in theory and far less in practice. Of
    XᵀX only what the rounding bends is added anew.
    """
    eye, decay = np.eye(len(w)), LAMBDA * len(x)
    gram = x.T @ x
    for mu in 10.0 ** np.arange(-4, -10.5, -1.0):
        for _ in range(30):
            norm = np.linalg.norm(w)
            unit, r = w / norm, x @ w - y
            a = np.hypot(r, mu)
            rho, side = a + eps * norm, r / a
            across = x.T @ side
            slope = x.T @ (rho * side) + rho.sum() * eps * unit + decay * w
            bend = (mu / a) ** 2 * (rho / a - 1)  # of Σ (side² + ρ μ²/a³) x xᵀ beyond XᵀX
            some = np.abs(bend) > 1e-9
            curve = gram + x[some].T @ (x[some] * bend[some, None])
            curve += eps * (np.outer(across, unit) + np.outer(unit, across))
            curve += len(x) * eps**2 * np.outer(unit, unit)
            curve += rho.sum() * eps / norm * (eye - np.outer(unit, unit)) + decay * eye
            step = np.linalg.solve(curve, slope)
            moved = x @ step

            def rounded(scale: float, w=w, r=r, step=step, moved=moved, mu=mu) -> float:
                v = w - scale * step
                level = np.hypot(r - scale * moved, mu) + eps * np.linalg.norm(v)
                return float(0.5 * (level**2).sum() + 0.5 * decay * v @ v)

            scale, start = 1.0, rounded(0.0)
            while rounded(scale) > start - 1e-4 * scale * (slope @ step):
                scale /= 2
                if scale < 1e-4:
                    break
            w = w - scale * step
            if slope @ step < 1e-16 * start:
                break
    return w
