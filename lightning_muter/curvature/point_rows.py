"""Points of a linear head as rows: a few vectors a point, nothing of size p² (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_muter.curvature.base import PointFacts
from lightning_muter.curvature.head import HeadHessian, HeadPoints, HeadTotal
from lightning_muter.curvature.paired import PairedHessian, PairedPoints, PairedTotal
from lightning_muter.curvature.point import PointCurvature
from lightning_muter.errors import ConfigurationError, MemoryFormatError
from lightning_muter.linalg.rows import row_norm
from lightning_muter.objectives.output_curvature import restored_output
from lightning_muter.responses import DiagonalLowRank
from lightning_muter.responses.probes import mixed

__all__ = ["PointRows"]

_FACTS = ("indices", "stationary", "active")
_WORTH = 0.8  # of the points: taking fewer of them out saves nothing
_FACTORS = ("factors", "slopes", "coefficients")

#: what some points' derivatives are made of: of one input each, or of two
Points = HeadPoints | PairedPoints


@dataclass(frozen=True)
class PointRows:
    """Σ_i w_i D_i of some points of a linear head, each by its own row.

    D_i = S_i ⊗ h̃h̃ᵀ + Σ_k c_ik v_ik v_ikᵀ + G_i diag(ρ_i) G_iᵀ with v_ik = r_i ⊗ b̃_ik + t_ik ⊗ h̃_i
    and G_i = r_i ⊗ I + (S_i W) ⊗ h̃_i. A product with a vector is a few matrix products of shapes
    (n, F̃) and (F̃, C). A loss that sees the clean input too has two h̃ and two t in every place of
    one. Source: ours (docs/theory.md).

    Attributes:
        points: h̃ (n, F̃), r (n, C), S, W (C, F) in the rows' dtype; the weights (n,) in float64.
        factors: b (n, K, F).
        slopes: t (n, K, C), or those of both sides (n, K, 2C).
        coefficients: c (n, K).
        diagonal: ρ (n, F), or None where no response has a diagonal.
        facts: which points they are.
    """

    points: Points
    factors: Tensor
    slopes: Tensor
    coefficients: Tensor
    diagonal: Tensor | None
    facts: PointFacts

    @classmethod
    def of(cls, part: PointCurvature, facts: PointFacts, dtype: torch.dtype) -> PointRows:
        """The rows of some points' curvature.

        Args:
            part: of a linear head.
            facts: which points it is of.
            dtype: of what is kept a point; float32 halves it.

        Raises:
            ConfigurationError: a curvature that has no such rows.
        """
        if not isinstance(part, (HeadHessian, PairedHessian)):
            raise ConfigurationError(
                f"representation='rows' cannot keep {type(part).__name__}: it needs a linear head "
                "(head=...), a threat without temperature and, with TRADES, no Fisher method; use "
                "representation='dense'"
            )
        points: Points = part.points
        points = replace(points, weight=points.weight.clone())  # it may be the module's
        n, r, w = len(points.r), points.r, points.weight
        factors, coefficients = r.new_zeros(n, 0, w.shape[1]), r.new_zeros(n, 0)
        diagonal = None
        if isinstance(part, (HeadTotal, PairedTotal)):
            response = part.response
            if not isinstance(response, DiagonalLowRank):
                raise ConfigurationError(
                    "representation='rows' keeps a few vectors a point, and the exact inner "
                    "response of a network is an F x F matrix: give sketch=1 (or more probes), or "
                    "representation='dense'"
                )
            factors, coefficients = response.factors, response.coefficients
            diagonal = response.diagonal if bool(response.diagonal.any()) else None
        kept = [_bent(points, factors[:, k] @ w.T) for k in range(factors.shape[1])]
        slopes = torch.stack(kept, dim=1) if kept else r.new_zeros(n, 0, points.slopes.shape[1])
        here = facts.to(r.device)
        return cls(points, factors, slopes, coefficients, diagonal, here).converted(dtype)

    def __len__(self) -> int:
        return len(self.points.r)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.points.r.device

    def are_of(self, indices: Sequence[int]) -> Tensor:
        """Which rows (n,) are of some training points."""
        wanted = torch.tensor(list(indices), dtype=torch.int64, device=self.device)
        return torch.isin(self.facts.indices, wanted)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is kept a point."""
        return self.points.r.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return sum(one.numel() * one.element_size() for one in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has one row a point, by name."""
        own = {name: getattr(self, name) for name in _FACTORS}
        own |= {name: getattr(self.facts, name) for name in _FACTS}
        own |= {} if self.diagonal is None else {"diagonal": self.diagonal}
        if isinstance(self.points, PairedPoints):
            own["beta"] = torch.full_like(self.points.weights, self.points.s.beta)
        return own | self.points.tensors()

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], omega: Tensor) -> PointRows:
        """The inverse of `tensors`, at the expansion point ω* (p,).

        Raises:
            MemoryFormatError: the tensors do not belong together.
        """
        r, sizes = tensors["r"], {len(one) for one in tensors.values()}
        two = "perturbed" in tensors
        c, width = r.shape[1], tensors["perturbed" if two else "features"].shape[1]
        k, f = tensors["factors"].shape[1:]
        shapes = [tuple(tensors[name].shape[1:]) for name in ("slopes", "coefficients")]
        fits = f in (width - 1, width) and c * width == len(omega)
        if len(sizes) != 1 or shapes != [(k, (1 + two) * c), (k,)] or not fits:
            raise MemoryFormatError(
                f"rows of {sorted(sizes)} points with {k} factors of {f} numbers, {width} features "
                f"and {c} outputs are none of {len(omega)} parameters: restore a backup"
            )
        weight = omega[: c * f].reshape(c, f).to(r)
        return cls._made(tensors, weight)

    @classmethod
    def _made(cls, tensors: Mapping[str, Tensor], weight: Tensor) -> PointRows:
        points: Points
        if "perturbed" in tensors:
            beta = float(tensors["beta"][0])
            biased = tensors["perturbed"].shape[1] > weight.shape[1]
            facts = {"beta": beta, "biased": biased}
            points = PairedPoints.restore(facts, tensors, weight.reshape(-1))
        else:
            points = HeadPoints(
                features=tensors["features"],
                r=tensors["r"],
                s=restored_output(tensors),
                weight=weight,
                weights=tensors["weights"],
            )
        return cls(
            points=points,
            diagonal=tensors.get("diagonal"),
            facts=PointFacts(*(tensors[name] for name in _FACTS)),
            **{name: tensors[name] for name in _FACTORS},
        )

    def converted(self, dtype: torch.dtype) -> PointRows:
        """The rows in another dtype; weights and what is known of the points stay."""
        kept = {"weights", "beta", *_FACTS}
        found = {n: t if n in kept else t.to(dtype) for n, t in self.tensors().items()}
        return self._made(found, self.points.weight.to(dtype))

    @cached_property
    def single(self) -> PointRows:
        """A copy in float32, kept with the rows."""
        return self.converted(torch.float32)

    def on(self, device: torch.device | str) -> PointRows:
        """The rows on another device; themselves on their own."""
        if self.device == torch.device(device):
            return self
        ahead = torch.device(device).type != "cpu"  # the host would read before the copy is done
        found = {n: t.to(device, non_blocking=ahead) for n, t in self.tensors().items()}
        return self._made(found, self.points.weight.to(device))

    def pinned(self) -> PointRows:
        """The rows in page-locked memory of the host, from where an accelerator reads faster."""
        found = {n: t.cpu().pin_memory() for n, t in self.tensors().items()}
        return self._made(found, self.points.weight.cpu())

    def __getitem__(self, which: Tensor | slice) -> PointRows:
        """Some of the points: a slice shares their memory, a mask (n,) copies."""
        found = {name: one[which] for name, one in self.tensors().items()}
        return self._made(found, self.points.weight)

    @classmethod
    def cat(cls, parts: Sequence[PointRows]) -> PointRows:
        """The rows of several of one structure, one after the other."""
        named = [part.tensors() for part in parts]
        tensors = {name: torch.cat([one[name] for one in named]) for name in named[0]}
        return cls._made(tensors, parts[0].points.weight)

    @property
    def structure(self) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
        """Names, shapes and dtypes of what a point keeps: equal ones can be put together."""
        return tuple((n, tuple(t.shape[1:]), t.dtype) for n, t in sorted(self.tensors().items()))

    @property
    def sketched(self) -> bool:
        """Whether vectors stand for a response that has no closed form."""
        return self.diagonal is None and self.coefficients.shape[1] > 0

    def resampled(self, probes: int, seed: int) -> PointRows:
        """The rows with each of a point's probes twice or not at all, by a coin of its own.

        Args:
            probes: a point; a probe's vectors are each ``probes`` apart.
            seed: of the coins.
        """
        number = self.facts.indices.unsqueeze(1) * probes
        number = number + torch.arange(probes, device=self.device)
        coins = 2 * (mixed(number + (seed << 40)) >> 32 & 1)
        vectors = self.coefficients.shape[1] // probes
        twice = self.coefficients * coins.to(self.dtype).repeat(1, vectors)
        return replace(self, coefficients=twice)

    def probe_sizes(self) -> Tensor:
        """At the most w_i c_ik ‖v_ik‖² (n, K), float64."""
        points = self.points
        lengths = row_norm(points.r) * torch.linalg.vector_norm(self.factors, dim=2)
        slopes = self.slopes.reshape(*self.slopes.shape[:2], len(points.sides), -1)
        for j, h in enumerate(points.sides):
            lengths = lengths + row_norm(h) * torch.linalg.vector_norm(slopes[:, :, j], dim=2)
        weights = points.weights.unsqueeze(1) * self.coefficients.double()
        sizes: Tensor = weights * lengths.double().square()
        return sizes

    def probes(self, which: Tensor) -> PointRows:
        """Some of the probes (n, K), rows of one probe each."""
        at, number = which.nonzero(as_tuple=True)
        own = {name: getattr(self, name)[at, number].unsqueeze(1) for name in _FACTORS}
        return replace(self[at], **own)

    def without_probes(self, which: Tensor) -> PointRows:
        """The rows without some of the probes (n, K)."""
        return replace(self, coefficients=self.coefficients.masked_fill(which, 0.0))

    # --- what they are for --------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The sum of the points' weights (), float64."""
        return self.points.weights.sum()

    def gradient(self) -> Tensor:
        """Σ w_i ∇_ω l_i (p,), float64."""
        weighted = self.points.slopes.double() * self.points.weights.unsqueeze(1)
        return self.points.vector_form(self._gathered(weighted.unsqueeze(1))[0])

    def _gathered(self, slopes: Tensor) -> Tensor:
        """Σ_i t_i h̃_iᵀ (k, C, F̃) over all sides, for t (n, k, C) of every side in one row."""
        sides, (n, k, _) = self.points.sides, slopes.shape
        parts = zip(slopes.chunk(len(sides), dim=2), sides, strict=True)
        found = [own.reshape(n, -1).T @ h.to(slopes.dtype) for own, h in parts]
        total = found[0] if len(found) == 1 else found[0] + found[1]
        return total.reshape(k, -1, total.shape[1])

    def matvec(self, v: Tensor) -> Tensor:
        """Σ w_i D_i v (..., p), computed in the rows' dtype, for v in float64; the same device."""
        points, (c, f) = self.points, self.points.weight.shape
        matrix = torch.vmap(points.matrix_form)(v.to(self.dtype).reshape(-1, v.shape[-1]))
        n, k, flat = len(self), len(matrix), matrix.flatten(0, 1)
        weights = points.weights.to(self.dtype)[:, None, None]
        # V h̃ (n, k, C) of every side, for all k vectors in one product
        u = torch.cat([(h @ flat.T).reshape(n, k, c) for h in points.sides], dim=2)
        bend = torch.vmap(points.bend, in_dims=1, out_dims=1)
        along_s = u
        moved = None  # what the response makes of Gᵀ V (n, k, F)
        if self.diagonal is not None:
            along = (points.r @ matrix[:, :, :f].transpose(0, 1).reshape(c, -1)).reshape(n, k, f)
            moved = self.diagonal.unsqueeze(1) * (along + bend(u)[:, :, -c:] @ points.weight)
            along_s = u.clone()
            along_s[:, :, -c:] += moved @ points.weight.T
        out = bend(along_s)
        if self.coefficients.shape[1]:
            pushed = (self.factors.reshape(-1, f) @ flat[:, :f].T).reshape(n, -1, c)
            a = (pushed @ points.r.unsqueeze(2)).reshape(n, -1, k)
            a = self.coefficients.unsqueeze(2) * (a + self.slopes @ u.mT)
            out = out + a.mT @ self.slopes
            spread = a.mT @ self.factors
            moved = spread if moved is None else moved + spread
        total = self._gathered(weights * out)
        if moved is not None:
            pushed = (weights[:, 0] * points.r).T @ moved.reshape(n, -1)
            total[:, :, :f] += pushed.reshape(c, k, f).transpose(0, 1)
        return torch.vmap(points.vector_form)(total).double().reshape(v.shape)

    def heaviest(self, c: int, share: float) -> PointRows:
        """The fewest points that hold a share of class c's weight Σ w (S_cc + r_c²)."""
        points = self.points
        direct = points.entries(c).double().diagonal(dim1=1, dim2=2).sum(dim=1)
        weights = direct + points.r[:, c].double().square()
        order = (weights * points.weights).sort(descending=True)
        sums = order.values.cumsum(dim=0)
        count = int((sums < share * sums[-1]).sum()) + 1 if len(self) else 0
        return self if count >= _WORTH * len(self) else self[order.indices[:count]]

    @property
    def outer_products(self) -> bool:
        """Whether each point adds outer products with positive signs, and nothing else."""
        one = isinstance(self.points, HeadPoints) and self.diagonal is None
        return one and bool((self.coefficients >= 0).all())

    def class_rows(self, c: int) -> Tensor:
        """U (k, F̃) of class c's block Uᵀ U, k = n (1 + K), where all are `outer_products`."""
        points = self.points
        h, w = points.features, points.weights.to(self.dtype)
        own = [h * (w * points.entries(c)[:, 0, 0].clamp(min=0)).sqrt().unsqueeze(1)]
        for k in range(self.coefficients.shape[1]):
            v = self.probe(k, c)
            own.append(v * (w * self.coefficients[:, k]).sqrt().unsqueeze(1))
        return torch.cat(own)

    def class_block(self, c: int) -> Tensor:
        """The block of class c of Σ w_i D_i (F̃, F̃), in the rows' dtype."""
        points, f = self.points, self.points.weight.shape[1]
        w, pairs, sides = points.weights.to(self.dtype), points.entries(c), points.sides
        rho, g = self.diagonal, None
        if rho is not None:  # G_c ρ G_cᵀ with G_c = r_c I + Σ_j h̃_j g_jᵀ
            g = points.pulled(c)
            pairs = pairs + (g * rho.unsqueeze(1)) @ g.mT
        block = torch.zeros_like(sides[0].T @ sides[0])
        for j, left in enumerate(sides):
            for k, right in enumerate(sides):
                block += left.T @ (right * (w * pairs[:, j, k]).unsqueeze(1))
        for k in range(self.coefficients.shape[1]):
            v = self.probe(k, c)
            block += v.T @ (v * (w * self.coefficients[:, k]).unsqueeze(1))
        if rho is None or g is None:
            return block
        r = points.r[:, c, None]
        for j, h in enumerate(sides):
            cross = (r * w.unsqueeze(1) * rho * g[:, j]).T @ h  # (F, F̃)
            block[:f] += cross
            block[:, :f] += cross.T
        block.diagonal()[:f] += (w.unsqueeze(1) * r.square() * rho).sum(dim=0)
        return block

    def probe(self, k: int, c: int) -> Tensor:
        """The part of class c in v_k (n, F̃)."""
        points, (classes, f) = self.points, self.points.weight.shape
        own = self.slopes[:, k, c::classes]  # of every side
        v = torch.stack([h * own[:, j, None] for j, h in enumerate(points.sides)]).sum(dim=0)
        v[:, :f] += points.r[:, c, None] * self.factors[:, k]
        return v

    def diagonal_of_sum(self) -> Tensor:
        """The diagonal of Σ w_i D_i (p,), float64."""
        own = [self.class_block(c).diagonal() for c in range(self.points.r.shape[1])]
        return self.points.vector_form(torch.stack(own)).double()


def _bent(points: Points, last: Tensor) -> Tensor:
    """∂²l (n, C) of every side for directions (n, C) of the perturbed outputs alone."""
    others = torch.zeros_like(points.slopes[:, : points.slopes.shape[1] - last.shape[1]])
    return points.bend(torch.cat([others, last], dim=1))
