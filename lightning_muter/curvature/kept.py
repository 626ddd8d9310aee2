"""Curvature of points that can be kept: its factors are tensors alone, for later requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_muter.curvature.point import AddBlock, KeptCurvature, PointCurvature
from lightning_muter.linalg.gram import gram, mirrored

__all__ = ["Materialised", "OfPoints", "OuterProducts", "join", "rows_joined"]


def rows_joined(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Tensors of one row a point, one after the other; None where their rows differ in shape."""
    if a.keys() != b.keys() or any(a[name].shape[1:] != b[name].shape[1:] for name in a):
        return None
    return {name: torch.cat([one, b[name]]) for name, one in a.items()}


class PointFactors(Protocol):
    """What some points' curvature is made of: tensors of one row a point, at a head's W (C, F)."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def weights(self) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def facts(self) -> dict[str, Any]: ...


P = TypeVar("P", bound=PointFactors)


class OfPoints(KeptCurvature, Generic[P]):
    """Curvature that follows from points' factors alone; its ``restore`` makes it of them."""

    def __init__(self, points: P, usable: Tensor | None = None) -> None:
        everyone = torch.ones_like(points.weights, dtype=torch.bool) if usable is None else usable
        super().__init__(everyone)
        self.points = points

    def kept(self) -> Sequence[KeptCurvature]:
        # h̃ may be the caller's own batch and W the module's live parameter
        own = {name: one.clone() for name, one in self.tensors().items()}
        return [type(self).restore(self.facts(), own, self.points.weight.reshape(-1).clone())]

    def facts(self) -> dict[str, Any]:
        return self.points.facts()

    def tensors(self) -> dict[str, Tensor]:
        return self.points.tensors()

    def joined(self, other: KeptCurvature) -> KeptCurvature | None:
        both = rows_joined(self.tensors(), other.tensors())
        if both is None:
            return None
        return type(self).restore(self.facts(), both, self.points.weight.reshape(-1))


class OuterProducts(KeptCurvature):
    """Σ_k u_k u_kᵀ for rows u (k, p): Fisher curvature, and a mixed adversary's covariance.

    Args:
        rows: u (k, p), weights within.
        usable: which points (n,) are represented.
    """

    kind = "outer_products"

    def __init__(self, rows: Tensor, usable: Tensor) -> None:
        super().__init__(usable)
        self.rows = rows

    def add_to(self, add: AddBlock) -> None:
        add(0, 0, gram(self.rows))

    def direct(self, v: Tensor) -> Tensor:
        return self.rows.T @ (self.rows @ v)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "usable": self.usable}

    @classmethod
    def restore(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], omega: Tensor
    ) -> OuterProducts:
        return cls(tensors["rows"], tensors["usable"])

    def joined(self, other: KeptCurvature) -> OuterProducts | None:
        both = rows_joined(self.tensors(), other.tensors())
        return None if both is None else OuterProducts(both["rows"], both["usable"])


class Materialised(KeptCurvature):
    """Σ w_i D_i as a matrix, where factors would weigh more or are not known.

    What is stored of it is its upper triangle, row by row.

    Args:
        matrix: (p, p), symmetric to the last bit, as its triangle gives it back.
    """

    kind = "matrix"

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(torch.ones(0, dtype=torch.bool, device=matrix.device))
        self.matrix = matrix

    @classmethod
    def of(cls, parts: Iterable[PointCurvature], p: int, device: torch.device) -> Materialised:
        """The sum of some curvatures of p parameters."""
        matrix = torch.zeros(p, p, dtype=torch.float64, device=device)

        def place(i: int, j: int, block: Tensor) -> None:
            matrix[i : i + block.shape[0], j : j + block.shape[1]] += block

        for part in parts:
            part.add_to(place)
        return cls(mirrored(matrix))

    def add_to(self, add: AddBlock) -> None:
        add(0, 0, self.matrix)

    def direct(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def tensors(self) -> dict[str, Tensor]:
        return {"packed": self.matrix[_upper(self.matrix)]}

    @cached_property
    def nbytes(self) -> int:
        p = len(self.matrix)
        return p * (p + 1) // 2 * self.matrix.element_size()

    @classmethod
    def restore(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], omega: Tensor
    ) -> Materialised:
        matrix = tensors["packed"].new_zeros(len(omega), len(omega))
        matrix[_upper(matrix)] = tensors["packed"]
        return cls(mirrored(matrix))

    def joined(self, other: KeptCurvature) -> Materialised | None:
        return Materialised(self.matrix + other.matrix) if isinstance(other, Materialised) else None


def _upper(matrix: Tensor) -> Tensor:
    return torch.ones_like(matrix, dtype=torch.bool).triu()


def join(parts: Iterable[KeptCurvature]) -> tuple[KeptCurvature, ...]:
    """The parts with neighbours put together, so that few are left and each is copied rarely.

    A part joins the one before it where that is not much larger: of n equal parts about log n are
    left, and each was copied about as often.
    """
    found: list[KeptCurvature] = []
    for part in parts:
        found.append(part)
        while len(found) > 1:
            last, other = found[-1], found[-2]
            if last.kind != other.kind or other.nbytes > 2 * last.nbytes:
                break
            both = other.joined(last)
            if both is None:
                break
            found[-2:] = [both]
    return tuple(found)
