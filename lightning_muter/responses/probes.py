"""Seeded probes behind sketched inner responses (docs/theory.md)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["seeded_probes"]


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
