"""Curvature of a linear head on frozen features, in closed form (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_muter.curvature.kept import OfPoints
from lightning_muter.curvature.point import AddBlock
from lightning_muter.linalg.gram import gram
from lightning_muter.objectives.output_curvature import OutputCurvature, restored_output
from lightning_muter.responses import Dense, DiagonalLowRank, restored

__all__ = ["HeadHessian", "HeadPoints", "HeadTotal"]

#: a sum whose factors are fewer than this share of its features is multiplied by them
_FLAT = 0.05


@dataclass(frozen=True)
class HeadPoints:
    """What a head's derivatives are made of: h̃ (n, F̃), r (n, C), S of n points, W (C, F).

    ``features`` has a column of ones where the head has a bias; ``weights`` is (n,).
    """

    features: Tensor
    r: Tensor
    s: OutputCurvature
    weight: Tensor
    weights: Tensor

    @property
    def biased(self) -> bool:
        """Whether the head has a bias."""
        return self.features.shape[1] > self.weight.shape[1]

    @classmethod
    def restore(cls, biased: bool, tensors: Mapping[str, Tensor], omega: Tensor) -> HeadPoints:
        """The points from `tensors`, with W out of the head's parameters ω (p,)."""
        features, r = tensors["features"], tensors["r"]
        c, f = r.shape[1], features.shape[1] - int(biased)
        weight = omega[: c * f].reshape(c, f)
        return cls(features, r, restored_output(tensors), weight, tensors["weights"])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has one row a point."""
        own = {"features": self.features, "r": self.r, "weights": self.weights}
        return own | self.s.tensors()

    def facts(self) -> dict[str, Any]:
        """What else `restore` needs."""
        return {"biased": self.biased}

    # --- what rows are made of; a loss that sees two inputs has both one after the other -------

    @property
    def sides(self) -> tuple[Tensor, ...]:
        """The features (n, F̃) of every input that the loss sees, the perturbed one last."""
        return (self.features,)

    @property
    def slopes(self) -> Tensor:
        """∂l (n, C) in the outputs of every side, one after the other."""
        return self.r

    def bend(self, u: Tensor) -> Tensor:
        """∂²l u (n, C) for directions u of the outputs of every side."""
        return self.s.apply(u)

    def entries(self, c: int) -> Tensor:
        """The entries of ∂²l (n, 1, 1) at output c, between all sides."""
        return self.s.entry(c, c)[:, None, None]

    def pulled(self, c: int) -> Tensor:
        """Row c of ∂²l W (n, 1, F) for each side, moved by the perturbed side."""
        return self.s.row(c, self.weight).unsqueeze(1)

    def matrix_form(self, v: Tensor) -> Tensor:
        """V (C, F̃) of a vector in the order of ω: the weight (C, F), flattened, then the bias."""
        c, f = self.weight.shape
        matrix = v[: c * f].reshape(c, f)
        return torch.cat([matrix, v[c * f :].unsqueeze(1)], dim=1) if self.biased else matrix

    def vector_form(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix_form`."""
        if not self.biased:
            return matrix.reshape(-1)
        f = self.weight.shape[1]
        return torch.cat([matrix[:, :f].reshape(-1), matrix[:, f:].reshape(-1)])

    def place(self, a: int, b: int, block: Tensor, add: AddBlock) -> None:
        """Add the (F̃, F̃) block of classes (a, b), and of (b, a), in the order of ω."""
        c, f = self.weight.shape
        for i, j, m in [(a, b, block)] + ([(b, a, block.T)] if a != b else []):
            add(i * f, j * f, m[:f, :f])
            if self.biased:
                add(i * f, c * f + j, m[:f, f:])
                add(c * f + i, j * f, m[f:, :f])
                add(c * f + i, c * f + j, m[f:, f:])


class HeadHessian(OfPoints[HeadPoints]):
    """Σ w_i S_i ⊗ h̃h̃ᵀ: the direct part alone."""

    kind = "head_hessian"

    def add_to(self, add: AddBlock) -> None:
        points, c = self.points, self.points.r.shape[1]
        h = points.features
        for a in range(c):
            for b in range(a, c):
                points.place(a, b, gram(h, points.s.entry(a, b) * points.weights), add)

    @classmethod
    def restore(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], omega: Tensor
    ) -> HeadHessian:
        return cls(HeadPoints.restore(facts["biased"], tensors, omega))

    def _slopes(self, v: Tensor) -> Tensor:
        """S u with u = V h̃ (n, C): how r moves along v."""
        u = self.points.features @ self.points.matrix_form(v).T
        return self.points.s.apply(u)

    def direct(self, v: Tensor) -> Tensor:
        weighted = self._slopes(v) * self.points.weights.unsqueeze(1)
        return self.points.vector_form(weighted.T @ self.points.features)


def _moved(h: Tensor, q: Tensor, bent: Tensor) -> Tensor:
    """Σ_i (q h̃h̃ᵀ + t h̃ᵀ + h̃ tᵀ) (F̃, F̃) for h̃ (n, F̃), q (n,) and t (n, F), 0 at the bias.

    Where an L2 ball holds the perturbation of a single output's input along w, t is rounding: less
    of it than the products have is left out.
    """
    size = torch.linalg.vector_norm(bent, torch.inf)
    most = torch.linalg.vector_norm(q, torch.inf) * torch.linalg.vector_norm(h, torch.inf)
    if bool(size <= torch.finfo(h.dtype).eps * most):
        return gram(h, q)
    left = h * (0.5 * q.unsqueeze(1))
    left[:, : bent.shape[1]] += bent
    half = h.T @ left
    return half + half.T


class HeadTotal(HeadHessian):
    """Σ w_i (S_i ⊗ h̃h̃ᵀ + G_i B_i G_iᵀ) with G = r ⊗ I_F + (S W) ⊗ h̃ and B = J R Jᵀ (n, F, F).

    The inner unknowns are perturbations of the features.
    """

    kind = "head_total"

    def __init__(
        self, points: HeadPoints, response: DiagonalLowRank | Dense, usable: Tensor
    ) -> None:
        super().__init__(points, usable)
        self.response = response

    def add_to(self, add: AddBlock) -> None:
        points, b = self.points, self.response
        r, s, f = points.r, points.s.dense(), points.weight.shape[1]
        sw = s @ points.weight  # (n, C, F): rows (S W)_a
        t = b.apply(sw.mT)  # (n, F, C): columns B (S W)_aᵀ
        # direct weight and h̃h̃ᵀ's indirect one
        quadratic = (s + sw @ t) * points.weights[:, None, None]
        weighted = r * points.weights.unsqueeze(1)
        h = points.features
        for a in range(s.shape[1]):
            for c in range(a, s.shape[1]):
                # G B Gᵀ falls into the four terms below
                q, bent = quadratic[:, a, c], weighted[:, a, None] * t[:, :, c]
                if a == c:
                    block = _moved(h, q, bent)
                else:
                    right = h * q.unsqueeze(1)
                    right[:, :f].addcmul_(weighted[:, c, None], t[:, :, a])
                    block = h.T @ right
                    block[:f] += bent.T @ h
                b.add_weighted_sum(block[:f, :f], weighted[:, a] * r[:, c])
                points.place(a, c, block, add)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | self.response.tensors() | {"usable": self.usable}

    @classmethod
    def restore(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], omega: Tensor
    ) -> HeadTotal:
        points = HeadPoints.restore(facts["biased"], tensors, omega)
        return cls(points, restored(tensors), tensors["usable"])

    @property
    def inner_size(self) -> int:
        return len(self.points.r) * self.points.weight.shape[1]

    def couple(self, v: Tensor) -> Tensor:
        points = self.points
        f = points.weight.shape[1]
        along = points.r @ points.matrix_form(v)[:, :f] + self._slopes(v) @ points.weight
        return along.reshape(-1)

    def spread(self, alpha: Tensor) -> Tensor:
        points = self.points
        features = alpha.reshape(len(points.r), -1)
        slopes = points.s.apply(features @ points.weight.T)
        matrix = slopes.T @ points.features
        matrix[:, : points.weight.shape[1]] += points.r.T @ features
        return points.vector_form(matrix)

    @cached_property
    def _flat(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The sum as diag(d) + U V, of few columns and rows, for few points of a single output.

        With a = diagonal ∘ w and f_k the factors of B, G diag(b) Gᵀ is r² b on the diagonal, and
        the rest of D_i lies in the span of h̃, r a and u_k = r f_k + s (wᵀf_k) h̃.

        Returns:
            d (p,), U (p, k) and V (k, p); None where that is no shorter way.
        """
        points, b = self.points, self.response
        n, c = points.r.shape
        if not isinstance(b, DiagonalLowRank) or c > 1:
            return None
        if n * (2 + b.factors.shape[1]) > _FLAT * points.features.shape[1]:
            return None
        weights, r, h, w = points.weights.unsqueeze(1), points.r, points.features, points.weight
        s, column = points.s.entry(0, 0).unsqueeze(1), w.T
        along = b.diagonal * w
        bent = torch.addcmul(s, s * s, along @ column)
        a, u, diagonal = along * r, b.factors * r.unsqueeze(2), b.diagonal
        if points.biased:
            a, u, diagonal = F.pad(a, (0, 1)), F.pad(u, (0, 1)), F.pad(diagonal, (0, 1))
        u = torch.addcmul(u, s.unsqueeze(2) * (b.factors @ column), h.unsqueeze(1)).flatten(0, 1)
        slopes, heights = weights * s, (weights * b.coefficients).flatten().unsqueeze(1)
        first = torch.addcmul(weights * bent * h, slopes, a)
        other = torch.cat([first, slopes * h, heights * u])
        return torch.mv(diagonal.T, (weights * r * r).squeeze(1)), torch.cat([h, a, u]).T, other

    def matvec(self, v: Tensor) -> Tensor:
        if self._flat is not None:
            diagonal, columns, rows = self._flat
            return torch.addmv(diagonal * v, columns, rows @ v)
        # `direct` and `spread(respond(couple))` at once: u = V h̃ and the last products are shared
        points, f = self.points, self.points.weight.shape[1]
        matrix, weights = points.matrix_form(v), points.weights.unsqueeze(1)
        u = points.features @ matrix.T
        along = torch.addmm(points.s.apply(u) @ points.weight, points.r, matrix[:, :f])
        moved = self.response.apply(along.unsqueeze(2)).squeeze(2)
        slopes = points.s.apply(torch.addmm(u, moved, points.weight.T)) * weights
        total = slopes.T @ points.features
        total[:, :f].addmm_((points.r * weights).T, moved)
        return points.vector_form(total)

    def respond(self, alpha: Tensor) -> Tensor:
        moved = self.response.apply(alpha.reshape(len(self.points.r), -1, 1)).squeeze(2)
        return (moved * self.points.weights.unsqueeze(1)).reshape(-1)

    def response_diagonal(self) -> Tensor:
        return (self.response.main_diagonal() * self.points.weights.unsqueeze(1)).reshape(-1)
