"""Curvature of a linear head whose loss sees the clean point too (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.head import HeadPoints
from lightning_muter.curvature.kept import OfPoints
from lightning_muter.curvature.point import AddBlock
from lightning_muter.objectives.trades import PairedOutput
from lightning_muter.responses import Dense, DiagonalLowRank, restored

__all__ = ["PairedHessian", "PairedPoints", "PairedTotal"]


@dataclass(frozen=True)
class PairedPoints:
    """What the derivatives are made of at the clean and at the perturbed rows of n points.

    Attributes:
        clean: h̃ (n, F̃) of the clean points.
        perturbed: h̃ (n, F̃) of the perturbed ones.
        r: ∂_a O (n, C) in the perturbed logits.
        s: ∂²O in both.
        weight: W (C, F).
        weights: of the points (n,).
        r_clean: ∂_c O (n, C) in the clean logits.
    """

    clean: Tensor
    perturbed: Tensor
    r: Tensor
    s: PairedOutput
    weight: Tensor
    weights: Tensor
    r_clean: Tensor

    @property
    def features(self) -> Tensor:
        """The rows that move with δ."""
        return self.perturbed

    @property
    def sides(self) -> tuple[Tensor, ...]:
        """The features (n, F̃) of both inputs, the perturbed one last."""
        return (self.clean, self.perturbed)

    @property
    def slopes(self) -> Tensor:
        """∂O (n, 2C) in the outputs of both sides."""
        return torch.cat([self.r_clean, self.r], dim=1)

    def bend(self, u: Tensor) -> Tensor:
        """∂²O u (n, 2C) for directions u of the outputs of both sides."""
        return torch.cat(self.s.apply(*u.chunk(2, dim=1)), dim=1)

    def entries(self, c: int) -> Tensor:
        """The entries of ∂²O (n, 2, 2) at output c, between both sides."""
        return self.s.entries(c)

    def pulled(self, c: int) -> Tensor:
        """Row c of ∂²O W (n, 2, F) for each side, moved by the perturbed side."""
        return self.s.pulled(c, self.weight)

    def matrix_form(self, v: Tensor) -> Tensor:
        """V (C, F̃) of a vector (p,): a head's."""
        return self.form.matrix_form(v)

    def vector_form(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix_form`."""
        return self.form.vector_form(matrix)

    @property
    def form(self) -> HeadPoints:
        """The order of the parameters, which is a head's."""
        return HeadPoints(self.perturbed, self.r, self.s.clean, self.weight, self.weights)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has one row a point."""
        own = {"clean": self.clean, "perturbed": self.perturbed, "r": self.r}
        own |= {"r_clean": self.r_clean}
        return own | {"weights": self.weights} | self.s.tensors()

    def facts(self) -> dict[str, Any]:
        """What else `restore` needs."""
        return {"beta": self.s.beta, "biased": self.form.biased}

    @classmethod
    def restore(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], omega: Tensor
    ) -> PairedPoints:
        """The points from `tensors`, with W out of the head's parameters ω (p,)."""
        c, f = tensors["r"].shape[1], tensors["perturbed"].shape[1] - int(facts["biased"])
        return cls(
            tensors["clean"],
            tensors["perturbed"],
            tensors["r"],
            PairedOutput.restore(facts["beta"], tensors),
            omega[: c * f].reshape(c, f),
            tensors["weights"],
            tensors["r_clean"],
        )

    def moved(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """How ∂_c O and ∂_a O (n, C) move along v (p,)."""
        matrix = self.form.matrix_form(v)
        return self.s.apply(self.clean @ matrix.T, self.perturbed @ matrix.T)

    def gather(self, c: Tensor, a: Tensor) -> Tensor:
        """Σ_i c_i h̃_iᵀ + a_i h̃_iᵀ (C, F̃) over the clean and the perturbed rows."""
        return c.T @ self.clean + a.T @ self.perturbed


class PairedHessian(OfPoints[PairedPoints]):
    """Σ w_i Σ_jk S_jk ⊗ h̃_j h̃_kᵀ, j and k the clean and the perturbed row: the direct part."""

    kind = "paired_hessian"

    def add_to(self, add: AddBlock) -> None:
        cc, ca, aa = self.points.s.dense()
        _add_products(self.points, (cc, ca, aa), add)

    @classmethod
    def restore(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], omega: Tensor
    ) -> PairedHessian:
        return cls(PairedPoints.restore(facts, tensors, omega))

    def direct(self, v: Tensor) -> Tensor:
        points = self.points
        weights = points.weights.unsqueeze(1)
        c, a = points.moved(v)
        return points.form.vector_form(points.gather(c * weights, a * weights))


class PairedTotal(PairedHessian):
    """Σ w_i (direct + G_i B_i G_iᵀ), B = J R Jᵀ (n, F, F) at the perturbed row.

    G = r ⊗ I_F + Σ_j (S_ja W) ⊗ h̃_j: only the perturbed features h_a move with δ. The inner
    unknowns are their perturbations.
    """

    kind = "paired_total"

    def __init__(
        self, points: PairedPoints, response: DiagonalLowRank | Dense, usable: Tensor
    ) -> None:
        super().__init__(points, usable)
        self.response = response

    def add_to(self, add: AddBlock) -> None:
        points, b = self.points, self.response
        cc, ca, aa = points.s.dense()
        w = points.weight
        ways = (ca @ w, aa @ w)  # (n, C, F): rows (S_ja W)_k of the clean and the perturbed row
        moved = tuple(b.apply(way.mT) for way in ways)  # (n, F, C): B (S_ja W)ᵀ
        _add_products(
            points,
            (cc + ways[0] @ moved[0], ca + ways[0] @ moved[1], aa + ways[1] @ moved[1]),
            add,
        )
        self._add_linear(moved, add)

    def _add_linear(self, moved: tuple[Tensor, ...], add: AddBlock) -> None:
        """The terms of G B Gᵀ in r: r_k r_l B, r_k B (S_ja W)_lᵀ h̃_jᵀ and its transpose."""
        points, f = self.points, self.points.weight.shape[1]
        weighted = points.r * points.weights.unsqueeze(1)
        rows = (points.clean, points.perturbed)
        for k in range(points.r.shape[1]):
            for m in range(k, points.r.shape[1]):
                block = torch.zeros_like(rows[0].T @ rows[0])
                for h, t in zip(rows, moved, strict=True):
                    block[:f] += (t[:, :, m] * weighted[:, k, None]).T @ h
                    block[:, :f] += h.T @ (t[:, :, k] * weighted[:, m, None])
                self.response.add_weighted_sum(block[:f, :f], weighted[:, k] * points.r[:, m])
                points.form.place(k, m, block, add)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | self.response.tensors() | {"usable": self.usable}

    @classmethod
    def restore(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], omega: Tensor
    ) -> PairedTotal:
        points = PairedPoints.restore(facts, tensors, omega)
        return cls(points, restored(tensors), tensors["usable"])

    @property
    def inner_size(self) -> int:
        return len(self.points.r) * self.points.weight.shape[1]

    def couple(self, v: Tensor) -> Tensor:
        points = self.points
        f = points.weight.shape[1]
        _, slopes = points.moved(v)
        along = points.r @ points.form.matrix_form(v)[:, :f] + slopes @ points.weight
        return along.reshape(-1)

    def spread(self, alpha: Tensor) -> Tensor:
        points = self.points
        features = alpha.reshape(len(points.r), -1)
        pushed = features @ points.weight.T
        matrix = points.gather(*points.s.apply(torch.zeros_like(pushed), pushed))
        matrix[:, : points.weight.shape[1]] += points.r.T @ features
        return points.form.vector_form(matrix)

    def respond(self, alpha: Tensor) -> Tensor:
        moved = self.response.apply(alpha.reshape(len(self.points.r), -1, 1)).squeeze(2)
        return (moved * self.points.weights.unsqueeze(1)).reshape(-1)

    def response_diagonal(self) -> Tensor:
        return (self.response.main_diagonal() * self.points.weights.unsqueeze(1)).reshape(-1)


def _add_products(points: PairedPoints, blocks: tuple[Tensor, ...], add: AddBlock) -> None:
    """Σ w (Q_cc ⊗ h̃_c h̃_cᵀ + Q_ca ⊗ h̃_c h̃_aᵀ + its transpose + Q_aa ⊗ h̃_a h̃_aᵀ)."""
    cc, ca, aa = (block * points.weights[:, None, None] for block in blocks)
    c, a = points.clean, points.perturbed
    for k in range(cc.shape[1]):
        for m in range(k, cc.shape[1]):
            left = c * cc[:, k, m, None] + a * ca[:, m, k, None]
            right = c * ca[:, k, m, None] + a * aa[:, k, m, None]
            points.form.place(k, m, left.T @ c + right.T @ a, add)
