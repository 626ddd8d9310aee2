"""Seeded probes behind sketched inner responses (docs/theory.md)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["mixed", "seeded_probes"]


_POSITIVE = (1 << 63) - 1


def seeded_probes(points: Tensor, count: int) -> Tensor:
    """Standard normal probes (n, count, d), each point's own by its content (n, d).

    The same point has the same probes in every batch, on every device: what a later request
    removes is exactly what was added.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> torch.equal(seeded_probes(x, 3)[1], seeded_probes(x[1:], 3)[0])
        True
    """
    rows = []
    for row in points.detach().cpu().double():
        seed = hashlib.blake2b(row.numpy().tobytes(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        rows.append(torch.randn(count, len(row), generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(points.device)


def mixed(numbers: Tensor) -> Tensor:
    """Whole numbers that look drawn at random, one for each of some (int64), at least 0.

    What a point draws by its number it draws on every process and in any order. Source: Steele,
    Lea and Flood, Fast splittable pseudorandom number generators, 2014 (its SplitMix64).

    Example:
        >>> import torch
        >>> int(mixed(torch.tensor(0)))
        7070836379803831727
    """
    z = (numbers + 1) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ _right(z, shift)) * factor
    return (z ^ _right(z, 31)) & _POSITIVE


def _right(numbers: Tensor, shift: int) -> Tensor:
    """Shifted to the right without the sign."""
    return (numbers >> shift) & ((1 << (64 - shift)) - 1)
