"""A preconditioner for sums over rows: the blocks of the classes (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_muter.curvature.class_factors import ClassFactor, FullFactor, ThinFactor
from lightning_muter.curvature.heavy_probes import HeavyProbes
from lightning_muter.curvature.point_rows import PointRows
from lightning_muter.linalg.rows import row_norm
from lightning_muter.parallel import Group

__all__ = ["ClassBlocks", "block_bytes"]

#: bytes of blocks that are read faster in float32
_LARGE = 1 << 26
#: times the rows' bytes that whole blocks take at the most: reading more takes longer than what the
#: iterations saved would
_WORTH = 8
#: of a class's weight over the points: the others' part of its block is left out
_SHARE = 0.999
#: of the bytes, for the probes that weigh most
_PROBES = 8
#: blocks are made anew once fewer than this share of their points is left
_RENEWED = 0.7


def block_bytes(classes: int, width: int, dtype: torch.dtype) -> int:
    """What ``classes`` blocks (width, width) take.

    Example:
        >>> block_bytes(100, 641, torch.float32)
        164352400
    """
    return classes * width * width * torch.empty((), dtype=dtype).element_size()


@dataclass(frozen=True)
class ClassBlocks:
    """z = Π (diag(A_c) + VDVᵀ)⁻¹ Π v + (I - Π) v / shift, A_c the block of class c. Source: ours.

    Where the losses' outputs are known up to a shift of all classes, as a softmax's are, the sum of
    the points is zero on the vectors that are equal for every class: Π subtracts the class mean
    and the rest is the identity times ``shift``. A class of few points has a block of few rows.
    Classes may share a block, for want of memory. V are the probes that weigh most: the blocks are
    of all the others, as they know nothing of what a probe does to several classes.

    Attributes:
        factors: of the blocks, one a group of classes.
        groups: the block (C,) of each class.
        scales: (C,) by which a class differs from its group's block.
        shift: the sum's multiple of the identity; at 0 nothing is moved where the sum is zero.
        centred: whether Π is there.
        points: rows that give a vector its matrix form.
        heavy: the probes; None without any, and where processes share the rows.
    """

    factors: Sequence[ClassFactor]
    groups: Tensor
    scales: Tensor
    shift: float
    centred: bool
    points: PointRows
    heavy: HeavyProbes | None = None

    @classmethod
    def of(
        cls,
        rows: Sequence[PointRows],
        shift: float,
        group: Group,
        budget: int,
        device: torch.device,
    ) -> ClassBlocks:
        """The blocks of Σ w_i D_i + shift · I in at most ``budget`` bytes, shared where need be.

        Args:
            rows: this process's points.
            shift: at least 0.
            group: the processes, whose points sum.
            budget: bytes; one block is made whatever it takes.
            device: where the blocks are to lie.
        """
        count = HeavyProbes.count(rows, budget // _PROBES) if group.size == 1 else 0
        own = HeavyProbes.split(rows, count) if count else None
        if own is not None:
            budget, rows = budget - HeavyProbes.bytes_of(rows, count), own[2]
        c = rows[0].points.r.shape[1]
        groups = torch.arange(c, device=device)
        scales = torch.ones(c, dtype=torch.float64, device=device)
        factors: Sequence[ClassFactor] | None = None
        if group.size == 1 and shift > 0:
            factors = _thin(rows, shift, budget, device)
        if factors is None:
            factors, groups, scales = _full(rows, shift, group, budget, device)
        centred = all(one.points.s.sums_to_zero for one in rows)
        blocks = cls(factors, groups, scales, shift, centred, rows[0][:1].on(device))
        if own is None:
            return blocks
        probes = [one.on(device) for one in own[0]]
        heavy = HeavyProbes.of(probes, own[1].to(device), blocks._halved_rows)
        return replace(blocks, heavy=heavy)

    def lasts(self, made: int, left: int) -> bool:
        """Whether blocks of ``made`` points still serve the ``left`` ones."""
        return left >= _RENEWED * made

    def now(self, rows: Sequence[PointRows], shift: float) -> ClassBlocks:
        """The same blocks, with what probes weigh in some rows, and another shift."""
        heavy = None if self.heavy is None else self.heavy.now(rows)
        return replace(self, shift=shift, heavy=heavy)

    @property
    def nbytes(self) -> int:
        """Bytes that the blocks and the probes take."""
        probes = 0 if self.heavy is None else self.heavy.nbytes
        return probes + sum(one.nbytes for one in self.factors)

    @property
    def exact(self) -> bool:
        """Whether every class has a block of its own."""
        return len(self.factors) == len(self.groups)

    def apply(self, v: Tensor) -> Tensor:
        """An approximation of M⁻¹ v (..., p)."""
        form = self.points.points
        matrix = torch.vmap(form.matrix_form)(v.reshape(-1, v.shape[-1]))
        mean = matrix.mean(dim=1, keepdim=True) if self.centred else torch.zeros_like(matrix[:, :1])
        half = self._of_blocks(matrix - mean, lambda factor, some: factor.halved(some))
        if self.heavy is not None:
            half = self.heavy.apply(half.flatten(1)).reshape(matrix.shape)
        solved = self._of_blocks(half, lambda factor, some: factor.whole(some))
        if self.centred:
            rest = mean / self.shift if self.shift > 0 else 0.0  # there M has nothing else
            solved = solved - solved.mean(dim=1, keepdim=True) + rest
        return torch.vmap(form.vector_form)(solved).reshape(v.shape)

    def _of_blocks(self, matrix: Tensor, act: Callable[[ClassFactor, Tensor], Tensor]) -> Tensor:
        """Each class's own factor at row c of matrices (k, C, F̃)."""
        found = torch.empty_like(matrix)
        scaled = matrix / self.scales.sqrt().unsqueeze(1)
        for factor, some in zip(self.factors, self._members, strict=True):
            found[:, some] = act(factor, scaled[:, some])
        return found

    @cached_property
    def _members(self) -> Sequence[Tensor | slice]:
        """The classes of each factor, in the order of the factors."""
        if self.exact:
            return [slice(c, c + 1) for c in range(len(self.groups))]
        order = self.groups.argsort(stable=True)
        return torch.split(order, self.groups.bincount().tolist())

    def _halved_rows(self, c: int, rows: Tensor) -> Tensor:
        """K of class c at rows (m, F̃)."""
        return self.factors[int(self.groups[c])].halved(rows / float(self.scales[c]) ** 0.5)


def _thin(
    rows: Sequence[PointRows], shift: float, budget: int, device: torch.device
) -> list[ClassFactor] | None:
    """Factors of each class's heaviest points; None where their blocks are no smaller for it."""
    c, width = rows[0].points.r.shape[1], rows[0].points.features.shape[1]
    if not all(one.outer_products for one in rows):
        return None
    dtype, each = rows[0].dtype, budget // c
    most = min(width // 2, _most_rows(each, width, dtype))
    if most < width // 2 and dtype != torch.float32:
        dtype = torch.float32
        most = min(width // 2, _most_rows(each, width, dtype))
    points = sum(map(len, rows))
    own: list[list[Tensor]] = [[] for _ in range(c)]
    for one in rows:
        here = one.on(device).converted(dtype)
        room = most * len(one) // points
        for member, some in enumerate(own):
            found = here.heaviest(member, _SHARE).class_rows(member)
            if len(found) > room:
                return None
            some.append(found)
    factors: list[ClassFactor] = []
    while own:
        factors.append(ThinFactor.of(torch.cat(own.pop(0)), shift))
    return factors


def _most_rows(room: int, width: int, dtype: torch.dtype) -> int:
    """How many rows k of a thin factor, k (F̃ + k) numbers, go into some bytes."""
    numbers = room / torch.empty((), dtype=dtype).element_size()
    return int((width**2 / 4 + numbers) ** 0.5 - width / 2)


def _full(
    rows: Sequence[PointRows], shift: float, group: Group, budget: int, device: torch.device
) -> tuple[list[ClassFactor], Tensor, Tensor]:
    """Factors of whole blocks, with the block and the scale (C,) of each class."""
    first = rows[0].points
    c, width = first.r.shape[1], first.features.shape[1]
    dtype = rows[0].dtype
    if block_bytes(c, width, dtype) > min(budget, _LARGE):
        dtype = torch.float32
    own = torch.tensor(sum(one.nbytes for one in rows), dtype=torch.float64, device=device)
    worth = _WORTH * group.sum(own)
    count = max(1, min(c, min(budget, int(worth)) // block_bytes(1, width, dtype)))
    groups = torch.arange(c, device=device)
    scales = torch.ones(c, dtype=torch.float64, device=device)
    if count < c:
        sizes = torch.stack([_size(one.on(device)) for one in rows]).sum(dim=0)
        groups, scales = _shared(group.sum(sizes) + shift, count)
    blocks = torch.zeros(count, width, width, dtype=dtype, device=device)
    for one in rows:
        here = one.on(device).converted(dtype)
        for member, g in enumerate(groups.tolist()):
            some = here.heaviest(member, _SHARE)
            blocks[g] += some.class_block(member) / scales[member].to(dtype)
    factors: list[ClassFactor] = []
    for g, members in enumerate(torch.bincount(groups, minlength=count).tolist()):
        block = group.sum(blocks[g]).double() / members
        block.diagonal().add_(shift / float(scales[groups == g].mean()))
        blocks[g] = FullFactor.of(block, dtype).half
        factors.append(FullFactor(blocks[g]))
    return factors, groups, scales


def _size(rows: PointRows) -> Tensor:
    """Roughly the trace of each class's block (C,)."""
    points = rows.points
    lengths = [row_norm(h).squeeze(1).double().square() for h in points.sides]
    weighted = torch.stack(lengths, dim=1) * points.weights.unsqueeze(1)
    own = [points.entries(c).double().diagonal(dim1=1, dim2=2) for c in range(points.r.shape[1])]
    return torch.stack([(weighted * one).sum() for one in own])


def _shared(sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Groups of classes of similar size (C,), and each class's size beside its group's (C,)."""
    c = len(sizes)
    groups = torch.empty(c, dtype=torch.int64, device=sizes.device)
    groups[sizes.argsort()] = torch.arange(c, device=sizes.device) * count // c
    means = torch.zeros(count, dtype=sizes.dtype, device=sizes.device)
    means.index_add_(0, groups, sizes)
    return groups, sizes / (means / torch.bincount(groups, minlength=count))[groups]
