"""Curvature that requests took out of a sum, as factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.head import HeadHessian, HeadTotal
from lightning_muter.curvature.kept import Materialised, OuterProducts, join
from lightning_muter.curvature.paired import PairedHessian, PairedTotal
from lightning_muter.curvature.point import KeptCurvature
from lightning_muter.parallel import Group

__all__ = ["RemovedPoints", "gathered"]

_KINDS: dict[str, type[KeptCurvature]] = {
    one.kind: one
    for one in (
        HeadTotal,
        HeadHessian,
        PairedTotal,
        PairedHessian,
        OuterProducts,
        Materialised,
    )
}


@dataclass(frozen=True)
class RemovedPoints:
    """Σ_S D_i + shift · I of forgotten points S, by the factors of D_i; ``shift`` is their λ."""

    parts: tuple[KeptCurvature, ...] = ()
    shift: float = 0.0

    @classmethod
    def of(cls, parts: Iterable[KeptCurvature], shift: float) -> RemovedPoints:
        """The sum of some parts."""
        return cls(join(parts), shift)

    @classmethod
    def restore(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], omega: Tensor
    ) -> RemovedPoints:
        """The inverse of `facts` and `tensors`, at the expansion point ω* (p,)."""
        parts = []
        for i, one in enumerate(facts["parts"]):
            own = {name: tensors[f"{i}.{name}"] for name in one["tensors"]}
            parts.append(_KINDS[one["kind"]].restore(one["facts"], own, omega))
        return cls(tuple(parts), facts["shift"])

    def facts(self) -> dict[str, Any]:
        """What the tensors are of, as plain data."""
        parts = [
            {"kind": part.kind, "facts": part.facts(), "tensors": sorted(part.tensors())}
            for part in self.parts
        ]
        return {"shift": self.shift, "parts": parts}

    def tensors(self) -> dict[str, Tensor]:
        """The factors, by name."""
        return {
            f"{i}.{name}": one
            for i, part in enumerate(self.parts)
            for name, one in part.tensors().items()
        }

    @property
    def empty(self) -> bool:
        """Whether nothing was taken out."""
        return not self.parts and self.shift == 0

    @property
    def nbytes(self) -> int:
        """Bytes that the factors take."""
        return sum(part.nbytes for part in self.parts)

    def joined(self, other: RemovedPoints) -> RemovedPoints:
        """These and other points."""
        return RemovedPoints(join([*self.parts, *other.parts]), self.shift + other.shift)

    def lighter(self, p: int) -> RemovedPoints:
        """The same as one matrix (p, p) where its half weighs less than the factors."""
        if self.nbytes <= 4 * p * (p + 1):
            return self
        whole = Materialised.of(self.parts, p, self.parts[0].usable.device)
        return replace(self, parts=(whole,))

    def to(self, device: torch.device | str, omega: Tensor) -> RemovedPoints:
        """The same on another device, where ω* (p,) is."""
        return replace(self, parts=tuple(one.to(device, omega) for one in self.parts))

    def subtracted(self, product: Tensor, v: Tensor) -> Tensor:
        """A product (p,) less that of the sum with v (p,)."""
        total = torch.sub(product, v, alpha=self.shift)
        for part in self.parts:
            total.sub_(part.matvec(v))
        return total

    def subtract_from(self, matrix: Tensor) -> None:
        """matrix (p, p) -= Σ_S D_i + shift · I."""

        def place(i: int, j: int, block: Tensor) -> None:
            matrix[i : i + block.shape[0], j : j + block.shape[1]] -= block

        for part in self.parts:
            part.add_to(place)
        matrix.diagonal().sub_(self.shift)


def gathered(parts: Sequence[KeptCurvature], group: Group, omega: Tensor) -> list[KeptCurvature]:
    """The parts of all processes in their order, on each of them, where ω* (p,) is.

    They travel on the host: a tensor of another process's accelerator would arrive on that one.
    """
    if group.size == 1:
        return list(parts)
    host = omega.cpu()
    shares = group.gather([one.to("cpu", host) for one in parts])
    return [one.to(omega.device, omega) for share in shares for one in share]
