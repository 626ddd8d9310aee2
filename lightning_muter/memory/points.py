"""Training points by index and by content: digests, look-ups, and what a request may name."""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_muter.errors import RemovalError

__all__ = [
    "check_content",
    "check_free",
    "check_range",
    "digest",
    "find",
    "integer",
    "listing",
    "training_indices",
]

DIGEST_BYTES = 16
_SHOWN = 10


def digest(key: bytes, x: Tensor, target: Tensor) -> bytes:
    """A keyed 16-byte digest of one training point, by its values.

    Floating-point values count as float64: a point is the same in single and double precision.
    """
    state = hashlib.blake2b(key=key, digest_size=DIGEST_BYTES)
    for tensor in (x, target):
        value = tensor.detach().cpu().contiguous()
        value = value.double() if value.is_floating_point() else value
        state.update(f"{value.dtype}{tuple(value.shape)}".encode())
        state.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.digest()


def listing(values: Sequence[Any]) -> str:
    """The values for a message, the first few of many.

    Example:
        >>> listing([3, 4])
        '[3, 4]'
        >>> listing(range(1000))
        '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...] (1000 in all)'
    """
    if len(values) <= _SHOWN:
        return str(list(values))
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    return f"[{shown}, ...] ({len(values)} in all)"


def integer(value: Any) -> int | None:
    """The value as an int where it is a whole number by type, else None; True is no number.

    Example:
        >>> integer(torch.tensor(3)), integer(3.0), integer(True)
        (3, None, None)
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def training_indices(values: Iterable[Any]) -> list[int]:
    """The indices of a request as ints.

    Raises:
        RemovalError: one of them is no integer, or a mask was given.
    """
    if isinstance(values, Tensor):
        if values.ndim > 1:
            raise RemovalError(
                f"the indices have shape {tuple(values.shape)}: give one dimension of integers"
            )
        plain: Any = values.reshape(-1).tolist()
    else:
        plain = values
    if isinstance(plain, (str, bytes)) or not isinstance(plain, Iterable):
        raise RemovalError(
            f"indices={values!r} is a {type(values).__name__}: give a list of training indices, "
            "such as [3, 17]"
        )
    given = list(plain)
    indices = [integer(value) for value in given]
    wrong = [value for value, index in zip(given, indices, strict=True) if index is None]
    if wrong:
        raise RemovalError(
            f"indices {listing(wrong)} are no integers ({type(wrong[0]).__name__}): a point is "
            "named by its position in the training set; for a mask give the positions where it "
            "holds"
        )
    return [index for index in indices if index is not None]


def check_range(indices: Sequence[int], n: int) -> None:
    """Refuse an empty request, an unknown index and a double.

    Raises:
        RemovalError: with the offending values.
    """
    if not indices:
        raise RemovalError("the request is empty: name at least one training index to forget")
    outside = [i for i in indices if not 0 <= i < n]
    if outside:
        raise RemovalError(
            f"indices {listing(outside)} are out of range: the memory was built on {n} points, "
            f"0 to {n - 1}"
        )
    twice = sorted(i for i, times in Counter(indices).items() if times > 1)
    if twice:
        raise RemovalError(f"indices {listing(twice)} occur twice in the request: name each once")


def check_free(indices: Sequence[int], removed: Tensor, weights: Tensor) -> None:
    """Refuse an index that training never saw, a forgotten one, and a request for all that is left.

    Args:
        indices: of the request.
        removed: which points (n,) were forgotten.
        weights: how much each point (n,) counted in training.

    Raises:
        RemovalError: with the offending values.
    """
    chosen = torch.tensor(list(indices), dtype=torch.long)
    flags, seen = removed.cpu(), weights.cpu() > 0
    unseen = chosen[~seen[chosen]].tolist()
    if unseen:
        raise RemovalError(
            f"indices {listing(unseen)} were never trained on: training's sampler or limits left "
            "them out, so that there is nothing of them to forget; leave them out of the request"
        )
    gone = chosen[flags[chosen]].tolist()
    if gone:
        raise RemovalError(f"indices {listing(gone)} were forgotten already: leave them out")
    if len(indices) >= int((~flags & seen).sum()):
        raise RemovalError(
            f"the request would forget all {len(indices)} remaining points: there is no model "
            "of no data; delete the model instead"
        )


def changed(
    key: bytes, digests: Tensor, indices: Sequence[int], x: Tensor, targets: Tensor
) -> list[int]:
    """Those of ``indices`` whose x (m, ...) and targets (m,) are not what the digests are of."""
    known = digests[list(indices)].cpu().numpy()
    rows = zip(indices, known, x, targets, strict=True)
    return [i for i, row, point, y in rows if digest(key, point, y) != row.tobytes()]


def check_content(
    key: bytes, digests: Tensor, indices: Sequence[int], x: Tensor, targets: Tensor
) -> None:
    """Refuse a point that is not the one the memory was built on, and one with NaN.

    Raises:
        RemovalError: with the offending indices.
    """
    if not len(indices) == len(x) == len(targets):
        raise RemovalError(
            f"a removal batch has {len(x)} inputs, {len(targets)} targets and {len(indices)} "
            "indices: give one of each for every point"
        )
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise RemovalError("the removal batch has NaN or infinite inputs: mend the data set")
    refuse_changed(changed(key, digests, indices, x, targets))


def refuse_changed(indices: Sequence[int]) -> None:
    """Raise where there are points whose content is another one.

    Raises:
        RemovalError: with the offending indices.
    """
    if indices:
        raise RemovalError(
            f"points {listing(indices)} are not what the memory was built on: the data set "
            "changed, or the points pass through a random transform; give the points as they were "
            "trained"
        )


def find(
    key: bytes, digests: Tensor, removed: Tensor, weights: Tensor, x: Tensor, targets: Tensor
) -> list[int]:
    """The indices of points given by content; among equal points the first that is left.

    Raises:
        RemovalError: a point was never trained on, or is gone already.
    """
    wanted = [digest(key, point, target) for point, target in zip(x, targets, strict=True)]
    matching: dict[bytes, list[int]] = {one: [] for one in wanted}
    trained = (weights > 0).tolist()
    stored = digests.cpu().contiguous().numpy().tobytes()
    for i, first in enumerate(range(0, len(stored), DIGEST_BYTES)):
        same = matching.get(stored[first : first + DIGEST_BYTES])
        if same is not None and trained[i]:
            same.append(i)
    gone = removed.tolist()
    free = {one: iter([i for i in same if not gone[i]]) for one, same in matching.items()}
    found: list[int] = []
    for position, one in enumerate(wanted):
        if not matching[one]:
            raise RemovalError(
                f"point {position} of the batch was never trained on: no training point has "
                "its content (same values, dtype and shape)"
            )
        index = next(free[one], None)
        if index is None:
            raise RemovalError(
                f"point {position} of the batch was forgotten already: {listing(matching[one])}"
            )
        found.append(index)
    return found
