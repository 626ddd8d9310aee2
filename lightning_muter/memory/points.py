"""Training points by index and by content: digests, and what a request may name."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_muter.arguments import integer
from lightning_muter.errors import RemovalError
from lightning_muter.models.beside import NOTHING, Beside

__all__ = [
    "DIGEST_BYTES",
    "changed",
    "check_batch",
    "check_free",
    "check_named",
    "digest",
    "digests_of",
    "listing",
    "passed_over",
    "refuse_changed",
    "serialised",
    "training_indices",
]

DIGEST_BYTES = 16
_SHOWN = 10


def digest(key: bytes, x: Tensor, target: Tensor) -> bytes:
    """A keyed 16-byte digest of one training point, by its values.

    Floating-point values count as float64: a point is the same in single and double precision.
    """
    return digests_of(key, x[None], target[None])[0]


def digests_of(key: bytes, x: Tensor, targets: Tensor, beside: Beside = NOTHING) -> list[bytes]:
    """The digest of each point of a batch x (m, ...) with its targets (m, ...).

    What forward takes beside x is a part of the point: with another mask it is another one.
    """
    fresh = hashlib.blake2b(key=key, digest_size=DIGEST_BYTES)
    head, points = _rows(x)
    fresh.update(head)  # of all points alike
    found, copied = [], fresh.copy
    for point, other in zip(points, _joined(targets, *beside.rows.values()), strict=True):
        state = copied()
        state.update(point)
        state.update(other)
        found.append(state.digest())
    return found


def _joined(*columns: Tensor | Sequence[Any]) -> list[bytes]:
    """What each point has in all columns, one after the other, as bytes."""
    first, *more = [[tail + value for value in values] for tail, values in map(_rows, columns)]
    return [b"".join(parts) for parts in zip(first, *more, strict=True)] if more else first


def _rows(column: Tensor | Sequence[Any]) -> tuple[bytes, list[memoryview]]:
    """The rows' dtype and shape as bytes, and each row's values, not copied."""
    head, whole = serialised(column)
    if isinstance(whole, list):
        return head, whole
    width = len(whole) // max(len(column), 1)
    return head, [whole[k * width : (k + 1) * width] for k in range(len(column))]


def serialised(column: Tensor | Sequence[Any]) -> tuple[bytes, memoryview | list[memoryview]]:
    """The rows' dtype and shape as bytes, and the values of all rows, not copied.

    Of what is no tensor, how each shows itself.
    """
    if not isinstance(column, Tensor):
        return b"", [memoryview(repr(one).encode()) for one in column]
    value = column.detach().cpu()
    value = value.double() if value.is_floating_point() else value
    head = f"{value.dtype}{tuple(value.shape[1:])}".encode()
    whole: memoryview = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return head, whole


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
    if all(type(value) is int for value in given):
        return given
    indices = [integer(value) for value in given]
    wrong = [value for value, index in zip(given, indices, strict=True) if index is None]
    if wrong:
        raise RemovalError(
            f"indices {listing(wrong)} are no integers ({type(wrong[0]).__name__}): a point is "
            "named by its position in the training set; for a mask give the positions where it "
            "holds"
        )
    return [index for index in indices if index is not None]


def check_named(indices: Sequence[int]) -> None:
    """Refuse an empty request and an index that is named twice.

    Raises:
        RemovalError: with the offending values.
    """
    if not indices:
        raise RemovalError("the request is empty: name at least one training index to forget")
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
    chosen = np.asarray(indices, dtype=np.int64)
    flags, counted = removed.cpu().numpy(), weights.cpu().numpy()
    unseen = chosen[counted[chosen] <= 0].tolist()
    if unseen:
        raise RemovalError(
            f"indices {listing(unseen)} were never trained on: training's sampler or limits left "
            "them out, so that there is nothing of them to forget; leave them out of the request"
        )
    gone = chosen[flags[chosen]].tolist()
    if gone:
        raise RemovalError(
            f"indices {listing(gone)} were forgotten already: leave them out, or give "
            "already='skip', which passes over them as a request that is repeated needs it"
        )
    if len(indices) >= np.count_nonzero((counted > 0) & ~flags):
        raise RemovalError(
            f"the request would forget all {len(indices)} remaining points: there is no model "
            "of no data; delete the model instead"
        )


def passed_over(indices: Sequence[int], over: Tensor | None) -> list[bool]:
    """Which of the indices are to be left out of a request: those of ``over`` (n,), or none.

    Example:
        >>> passed_over([2, 0], torch.tensor([True, False, False]))
        [False, True]
    """
    if over is None:
        return [False] * len(indices)
    found: list[bool] = over.cpu()[list(indices)].tolist()
    return found


def check_batch(x: Tensor, targets: Tensor, indices: Sequence[int] | None = None) -> None:
    """Refuse a removal batch that is not one of each for every point, and one with NaN.

    Raises:
        RemovalError: with the sizes.
    """
    n = x.shape[0]
    sizes = {n, targets.shape[0], n if indices is None else len(indices)}
    if len(sizes) > 1:
        named = "" if indices is None else f" and {len(indices)} indices"
        raise RemovalError(
            f"a removal batch has {n} inputs, {len(targets)} targets{named}: give one of each "
            "for every point"
        )
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise RemovalError("the removal batch has NaN or infinite inputs: mend the data set")


def changed(
    key: bytes,
    digests: Tensor,
    indices: Sequence[int],
    x: Tensor,
    targets: Tensor,
    beside: Beside = NOTHING,
) -> list[int]:
    """Those of ``indices`` whose x (m, ...) and targets (m,) are not what the digests are of."""
    known = digests[list(indices)].cpu().numpy()
    rows = zip(indices, known, digests_of(key, x, targets, beside), strict=True)
    return [i for i, row, found in rows if found != row.tobytes()]


def refuse_changed(indices: Sequence[int], beside: str = "") -> None:
    """Raise where there are points whose content is another one.

    Args:
        indices: of the points.
        beside: what else the reason may be.

    Raises:
        RemovalError: with the offending indices.
    """
    if indices:
        raise RemovalError(
            f"points {listing(indices)} are not what the memory was built on: the data set "
            "changed, or the points pass through a random transform; give the points as they were "
            f"trained{beside}"
        )
