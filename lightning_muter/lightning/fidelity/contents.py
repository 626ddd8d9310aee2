"""What the training points are when training begins, and whether they are so at its end."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.lightning.data import TrainingPoints
from lightning_muter.lightning.flavour import pl
from lightning_muter.lightning.progress import bar_of, blocks
from lightning_muter.memory.blocks import BLOCK, block_digest, count
from lightning_muter.memory.points import digests_of
from lightning_muter.models import Beside

__all__ = ["Contents", "contents_of"]

#: so many points are read again when training ends
_PROBES = 8


@dataclass(frozen=True)
class Contents:
    """The training points by their content.

    Attributes:
        key: of the digests.
        digests: of each point (n, 16) uint8, as the data set holds it.
        blocks: of 512 points each (k, 16) uint8.
        received: of each point (n,), as the module receives it.
    """

    key: bytes
    digests: Tensor
    blocks: Tensor
    received: list[bytes]

    def check_unchanged(self, points: TrainingPoints) -> None:
        """Read some of the points again.

        Raises:
            ConfigurationError: they are others than before.
        """
        n = len(points)
        probes = sorted({k * (n - 1) // max(_PROBES - 1, 1) for k in range(_PROBES)})
        found = _rows(digests_of(self.key, *points.batch(probes))).to(torch.uint8)
        changed = [i for i, a in zip(probes, found, strict=True) if not a.equal(self.digests[i])]
        if changed:
            raise ConfigurationError(
                f"training points {changed} are not what they were when training began: the data "
                "set changed, or transforms at random; give it fixed points"
            )


def contents_of(
    trainer: pl.Trainer,
    points: TrainingPoints,
    reduce: Callable[[Tensor], Tensor],
    check: Callable[[Tensor, Tensor, Beside], None],
) -> Contents:
    """The contents of all points, of which each process reads its share.

    Args:
        trainer: whose precision the module receives its batches in.
        points: the training data set.
        reduce: sums a tensor over processes.
        check: is given each block's inputs and what forward takes beside them, as the module
            receives them, between them its targets as the data set holds them.

    Raises:
        ConfigurationError: with the points whose inputs are NaN or infinite.
    """
    key: bytes = trainer.strategy.broadcast(os.urandom(16))
    n = len(points)
    held, received, together = torch.zeros(n, 16), torch.zeros(n, 16), torch.zeros(count(n), 16)
    everyone = list(blocks(range(n), BLOCK))
    mine = everyone[trainer.global_rank :: trainer.world_size]
    looked_at = mine or everyone[:1]  # so that no process waits where another one refuses
    total = sum(map(len, looked_at))
    for block in bar_of(trainer)(looked_at, "reading the points", total, len):
        x, targets, beside = points.finite(block)
        x_given, y_given, rows = trainer.precision_plugin.convert_input([x, targets, beside.rows])
        given = replace(beside, rows=rows)
        check(x_given, targets, given)
        some = slice(block.start, block.stop)
        held[some] = received[some] = _rows(digests_of(key, x, targets, beside))
        together[block.start // BLOCK] = _rows([block_digest(key, x, targets, beside)])[0]
        before = (x, targets, *beside.tensors().values())
        after = (x_given, y_given, *given.tensors().values())
        if any(_narrower(b, a) for a, b in zip(before, after, strict=True)):
            received[some] = _rows(digests_of(key, x_given, y_given, given))
    if not mine:
        held, received, together = (torch.zeros_like(t) for t in (held, received, together))
    device = trainer.strategy.root_device
    held, received, together = (
        reduce(t.to(device)).cpu().to(torch.uint8) for t in (held, received, together)
    )
    return Contents(key, held, together, [bytes(row) for row in received.tolist()])


def _rows(digests: list[bytes]) -> Tensor:
    """Rows (m, 16) that any process group can sum."""
    return torch.tensor([list(one) for one in digests], dtype=torch.float32)


def _narrower(given: Tensor, held: Tensor) -> bool:
    """Whether the precision that training runs in loses digits of the data set's."""
    floating = given.is_floating_point() and held.is_floating_point()
    return floating and torch.finfo(given.dtype).bits < torch.finfo(held.dtype).bits
