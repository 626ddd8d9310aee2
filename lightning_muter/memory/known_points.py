"""Which training points the rows of a data set are, by their content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_muter.errors import RemovalError
from lightning_muter.memory.points import DIGEST_BYTES, listing, refuse_changed

__all__ = ["KnownPoints", "Match", "Places"]

_WORDS = DIGEST_BYTES // 8
#: digests as numbers (m, 2)
Words = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Match:
    """The training index of each row, or None.

    Attributes:
        indices: of the rows, no index twice.
        unknown: rows whose content no training point has.
        surplus: rows whose content training points have, all of which are other rows.
    """

    indices: list[int | None]
    unknown: list[int]
    surplus: list[int]


@dataclass(frozen=True)
class Places:
    """Where the training points lie in a data set.

    Attributes:
        rows: the row (n,) of each training point, -1 where it has none.
        new: how many rows are no training point's.
    """

    rows: Tensor
    new: int


@dataclass(frozen=True)
class KnownPoints:
    """The training points by content; every look-up is linear, whatever is equal to what.

    Attributes:
        digests: of the points (n, 16).
        removed: which of them were forgotten (n,).
        weights: how much each counted in training (n,).
        ledger: of the memory that knows them; what a rebase erased is no point of it any more.
    """

    digests: Tensor
    removed: Tensor
    weights: Tensor
    ledger: Sequence[Mapping[str, Any]] = ()

    @property
    def living(self) -> Tensor:
        """Which points were trained on and are left (n,)."""
        return ~self.removed.cpu() & (self.weights.cpu() > 0)

    def match(
        self, rows: Sequence[bytes], positions: Sequence[int] = (), fixed: Tensor | None = None
    ) -> Match:
        """The training points that rows are.

        A row at position i with the content of point i is that point. Any other row is, among the
        points of its content that no row is yet, the first that is left, else the first forgotten.

        Args:
            rows: their digests.
            positions: of the rows in their data set; they say nothing where there are none.
            fixed: which points (n,) a position can name; all by default.
        """
        words = np.frombuffer(b"".join(rows), dtype=np.int64).reshape(-1, _WORDS)
        found, unknown, surplus = self._matched(words, self._in_place(words, positions, fixed))
        indices = [None if index < 0 else index for index in found.tolist()]
        return Match(indices, unknown, surplus)

    def _matched(self, rows: Words, found: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """The training point (m,) of each row or -1, and what `Match` says of the others.

        Args:
            rows: their digests.
            found: the points (m,) that are known by their positions, -1 for those that are not.
        """
        others = torch.nonzero(found < 0).flatten().tolist()
        unknown: list[int] = []
        surplus: list[int] = []
        if not others:
            return found, unknown, surplus
        taken = torch.zeros(len(self.digests), dtype=torch.bool)
        taken[found[found >= 0]] = True
        contents = [one.tobytes() for one in rows[others]]
        free = self._free(set(contents), taken)
        chosen: dict[int, int] = {}
        for k, content in zip(others, contents, strict=True):
            same = free[content]
            if same is None:
                unknown.append(k)
            elif same:
                chosen[k] = same.pop()
            else:
                surplus.append(k)
        found[list(chosen)] = torch.tensor(list(chosen.values()), dtype=torch.long)
        return found, unknown, surplus

    def _in_place(self, rows: Words, positions: Sequence[int], fixed: Tensor | None) -> Tensor:
        """Where the row at position i has the content of point i: that point (m,); else -1."""
        found = np.full(len(rows), -1)
        if len(positions) and len(rows):
            named = _numbers(positions)
            inside = np.flatnonzero((named >= 0) & (named < self.digests.shape[0]))
            named = named[inside]
            known = _words(self.digests)[named]
            same = (rows[inside] == known).all(axis=1)
            if fixed is not None:
                same &= fixed.cpu().numpy()[named]
            found[inside[same]] = named[same]
        return torch.from_numpy(found)

    def _free(self, wanted: set[bytes], taken: Tensor) -> dict[bytes, list[int] | None]:
        """The points of some contents that are not taken, the first choice at the end."""
        free: dict[bytes, list[int] | None] = dict.fromkeys(wanted)
        if not wanted:
            return free
        known = _words(self.digests)
        asked = np.frombuffer(b"".join(wanted), dtype=np.int64).reshape(-1, _WORDS)
        likely = torch.from_numpy(np.flatnonzero(np.isin(known[:, 0], asked[:, 0])))
        stored, trained = known[likely.numpy()].tobytes(), (self.weights.cpu() > 0).long()
        rank = trained + trained * ~self.removed.cpu()  # never trained on: 0, left: 2
        choices = zip(likely.tolist(), rank[likely].tolist(), taken[likely].tolist(), strict=True)
        order: dict[int, tuple[int, int]] = {}
        for at, (i, good, gone) in enumerate(choices):
            one = stored[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES]
            if one not in free:
                continue
            same = free[one] or []
            free[one] = same
            if not gone:
                same.append(i)
                order[i] = (good, -i)
        for same_or_none in free.values():
            if same_or_none is not None:
                same_or_none.sort(key=order.__getitem__)
        return free

    def named(self, rows: Sequence[bytes], positions: Sequence[int] = ()) -> list[int]:
        """The training index of each row of a request, forgotten ones among them.

        Raises:
            RemovalError: a row is no training point, or one more than there are of its content.
        """
        found = self.match(rows, positions)
        if found.unknown and positions:
            refuse_changed([positions[k] for k in found.unknown], self._erased())
        if found.unknown:
            raise RemovalError(
                f"point {found.unknown[0]} of the batch was never trained on: no training point "
                f"has its content (same values, dtype and shape){self._erased()}"
            )
        if found.surplus:
            k = found.surplus[0]
            name = f"index {positions[k]}" if positions else f"point {k} of the batch"
            same = self.match([rows[k]] * len(self.digests)).indices
            have = sorted(i for i in same if i is not None)
            raise RemovalError(
                f"{name} was forgotten already, or named twice: no other training points than "
                f"{listing(have)} have its content; name each once"
            )
        return [index for index in found.indices if index is not None]

    def _erased(self) -> str:
        """What a rebase makes of a point that had been forgotten, for a message."""
        if all(entry.get("kind") != "rebase" for entry in self.ledger):
            return ""
        return (
            ". A point that was forgotten before a rebase looks the same, since nothing of it is "
            "kept: such a one needs no request, leave it out"
        )

    def repeated(self, indices: Sequence[int]) -> bool:
        """Whether a forgotten one among the points has an equal that is left."""
        named = np.asarray(indices)
        forgotten = named[self.removed.cpu().numpy()[named]]
        if not len(forgotten):
            return False
        gone = {row.tobytes() for row in self.digests.cpu().numpy()[forgotten]}
        left = self.match(list(gone)).indices
        return any(bool(self.living[i]) for i in left if i is not None)

    def places(self, rows: Tensor) -> Places:
        """Where the points lie in a data set of rows, those that are left first of all.

        Args:
            rows: their digests (m, 16).
        """
        words, living = _words(rows), self.living
        found = self._in_place(words, range(len(rows)), None)
        lies = torch.zeros_like(living)
        lies[found[found >= 0]] = True
        if not bool(lies[living].all()):  # one may lie where an equal point was forgotten
            found[(found >= 0) & ~living[found]] = -1
        found, unknown, surplus = self._matched(words, found)
        where = torch.full((len(self.digests),), -1, dtype=torch.long)
        held = torch.nonzero(found >= 0).flatten()
        where[found[held]] = held
        return Places(where, len(unknown) + len(surplus))


def _words(digests: Tensor) -> Words:
    """Digests (m, 16) as numbers."""
    words: Words = digests.cpu().contiguous().numpy().view(np.int64)
    return words


def _numbers(positions: Sequence[int]) -> Words:
    if isinstance(positions, range):
        return np.arange(positions.start, positions.stop, positions.step)
    return np.asarray(positions, dtype=np.int64)
