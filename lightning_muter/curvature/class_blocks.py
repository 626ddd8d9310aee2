"""A preconditioner for sums over rows: the blocks of the classes (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.linalg.rows import row_norm

__all__ = ["ClassBlocks", "block_bytes"]

#: of a class's weight over the points: the others' part of its block is left out
_SHARE = 0.999
#: of a block's mean eigenvalue: a block without weight decay is singular where features vanish
_JITTER = 1e-12


def block_bytes(classes: int, width: int, dtype: torch.dtype) -> int:
    """What ``classes`` blocks (width, width) take.

    Example:
        >>> block_bytes(100, 641, torch.float32)
        164352400
    """
    return classes * width * width * torch.empty((), dtype=dtype).element_size()


@dataclass(frozen=True)
class ClassBlocks:
    """z = Π diag(A_c)⁻¹ Π v + (I - Π) v / shift, A_c the (F̃, F̃) block of class c. Source: ours.

    Where the losses' outputs are known up to a shift of all classes, as a softmax's are, the sum of
    the points is zero on the vectors that are equal for every class: Π subtracts the class mean
    and the rest is the identity times ``shift``. Classes may share a block, for want of memory.

    Attributes:
        halves: L⁻¹ of A = L Lᵀ (G, F̃, F̃), one a group of classes.
        groups: the block (C,) of each class.
        scales: (C,) by which a class differs from its group's block.
        shift: the sum's multiple of the identity; at 0 nothing is moved where the sum is zero.
        centred: whether Π is there.
        points: rows that give a vector its matrix form.
    """

    halves: Tensor
    groups: Tensor
    scales: Tensor
    shift: float
    centred: bool
    points: PointRows

    @classmethod
    def of(
        cls,
        rows: Sequence[PointRows],
        shift: float,
        reduce: Callable[[Tensor], Tensor],
        budget: int,
        device: torch.device,
    ) -> ClassBlocks:
        """The blocks of Σ w_i D_i + shift · I in at most ``budget`` bytes, shared where need be.

        Args:
            rows: this process's points.
            shift: at least 0.
            reduce: sums a tensor over processes.
            budget: bytes; one block is made whatever it takes.
            device: where the blocks are to lie.
        """
        first = rows[0].points
        c, width = first.r.shape[1], first.features.shape[1]
        dtype = rows[0].dtype
        if block_bytes(c, width, dtype) > budget:
            dtype = torch.float32
        count = max(1, min(c, budget // block_bytes(1, width, dtype)))
        sizes = reduce(torch.stack([_size(one.on(device)) for one in rows]).sum(dim=0)) + shift
        groups, scales = _shared(sizes, count)
        halves = torch.zeros(count, width, width, dtype=dtype, device=device)
        for one in rows:
            here = one.on(device).converted(dtype)
            for member, g in enumerate(groups.tolist()):
                some = here.heaviest(member, _SHARE)
                halves[g] += some.class_block(member) / scales[member].to(dtype)
        for g, members in enumerate(torch.bincount(groups, minlength=count).tolist()):
            block = reduce(halves[g]).double() / members
            block.diagonal().add_(shift / float(scales[groups == g].mean()))
            halves[g] = _inverse_half(block)
        centred = all(one.points.s.sums_to_zero for one in rows)
        return cls(halves, groups, scales, shift, centred, rows[0][:1].on(device))

    @property
    def nbytes(self) -> int:
        """Bytes that the blocks take."""
        return self.halves.numel() * self.halves.element_size()

    @property
    def exact(self) -> bool:
        """Whether every class has a block of its own."""
        return len(self.halves) == len(self.groups)

    def apply(self, v: Tensor) -> Tensor:
        """An approximation of M⁻¹ v (p,)."""
        matrix = self.points.points.matrix_form(v)
        mean = matrix.mean(dim=0, keepdim=True) if self.centred else torch.zeros_like(matrix[:1])
        solved = self._solved(matrix - mean)
        if self.centred:
            rest = mean / self.shift if self.shift > 0 else 0.0  # there M has nothing else
            solved = solved - solved.mean(dim=0, keepdim=True) + rest
        return self.points.points.vector_form(solved)

    def _solved(self, matrix: Tensor) -> Tensor:
        """A_c⁻¹ times row c of a matrix (C, F̃)."""
        found = torch.empty_like(matrix)
        for g, half in enumerate(self.halves):
            some = self.groups == g
            rows = (matrix[some] / self.scales[some].unsqueeze(1)).to(half.dtype)
            found[some] = (rows @ half.T @ half).to(matrix.dtype)
        return found


def _size(rows: PointRows) -> Tensor:
    """Roughly the trace of each class's block (C,)."""
    points = rows.points
    length = row_norm(points.features).squeeze(1).double().square()
    weights = points.weights * length
    own = [weights @ points.s.entry(c, c).double() for c in range(points.r.shape[1])]
    return torch.stack(own)


def _shared(sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Groups of classes of similar size (C,), and each class's size beside its group's (C,)."""
    c = len(sizes)
    if count == c:
        return torch.arange(c, device=sizes.device), torch.ones_like(sizes)
    groups = torch.empty(c, dtype=torch.int64, device=sizes.device)
    groups[sizes.argsort()] = torch.arange(c, device=sizes.device) * count // c
    means = torch.zeros(count, dtype=sizes.dtype, device=sizes.device)
    means.index_add_(0, groups, sizes)
    return groups, sizes / (means / torch.bincount(groups, minlength=count))[groups]


def _inverse_half(block: Tensor) -> Tensor:
    """L⁻¹ of a block L Lᵀ; of its diagonal alone where the block is indefinite."""
    block.diagonal().add_(_JITTER * float(block.diagonal().mean()))
    factor, info = torch.linalg.cholesky_ex(block)
    if int(info) != 0:
        factor = block.diagonal().abs().clamp(min=1e-300).sqrt().diag()
    eye = torch.eye(len(block), dtype=block.dtype, device=block.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse
