"""The user's own keys of training points: kept as keyed digests, never in clear."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_muter.arguments import integer
from lightning_muter.errors import RemovalError
from lightning_muter.memory.points import DIGEST_BYTES, listing

__all__ = ["id_digests", "ids_key", "id_texts", "owned"]

_PERSON = b"muter point id"  # so that no key has the digest of a content


def id_texts(values: Iterable[Any]) -> list[str]:
    """Keys by their text, so that 17 and "17" are one key.

    Raises:
        RemovalError: one of them is neither a string nor an integer.
    """
    given = list(values.tolist() if isinstance(values, Tensor) else values)
    texts = [_text(value) for value in given]
    wrong = [value for value, text in zip(given, texts, strict=True) if text is None]
    if wrong:
        raise RemovalError(
            f"ids {listing(wrong)} are no keys ({type(wrong[0]).__name__}): a key is a string or "
            "an integer, as the owner of a point is named in your records"
        )
    return [text for text in texts if text is not None]


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return str(value)
    number = integer(value)
    return None if number is None else str(number)


def ids_key(key: bytes) -> bytes:
    """A key for the digests of keys, which does not give away the one of the contents' digests."""
    return hashlib.blake2b(key=key, person=_PERSON, digest_size=DIGEST_BYTES).digest()


def id_digests(key: bytes, texts: Sequence[str]) -> Tensor:
    """A keyed digest (n, 16) of each key."""
    rows = b"".join(_digest(key, text) for text in texts)
    return torch.frombuffer(bytearray(rows), dtype=torch.uint8).reshape(-1, DIGEST_BYTES)


def _digest(key: bytes, text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, key=key, person=_PERSON, digest_size=DIGEST_BYTES).digest()


def owned(key: bytes, stored: Tensor | None, weights: Tensor, texts: Sequence[str]) -> list[int]:
    """The training indices of all points that keys own, in the order of the keys.

    A key's points that training never saw are left out where it has others.

    Args:
        key: of the digests.
        stored: the digest (n, 16) of every point's own key, where the memory keeps them.
        weights: how much each point counted in training (n,).
        texts: the keys that are looked for.

    Raises:
        RemovalError: a key that owns no point, or a memory without keys.
    """
    if stored is None:
        raise RemovalError(
            f"the memory keeps no ids, so that {listing(texts)} name nobody: fit with "
            "MUterCallback(ids=...), or name the points by indices="
        )
    found = _points_of(key, stored, texts)
    unknown = [one for one, indices in found.items() if not indices]
    if unknown:
        raise RemovalError(
            f"ids {listing(unknown)} own no training point: give the keys that "
            "MUterCallback(ids=...) was given, as they were written there"
        )
    trained = (weights > 0).tolist()
    seen = {one: [i for i in indices if trained[i]] for one, indices in found.items()}
    return [i for one, indices in found.items() for i in seen[one] or indices]


def _points_of(key: bytes, stored: Tensor, texts: Sequence[str]) -> dict[str, list[int]]:
    """The training points of each key."""
    wanted = {_digest(key, text): text for text in texts}
    found: dict[str, list[int]] = {text: [] for text in texts}
    rows = stored.cpu().contiguous().numpy().tobytes()
    for i in range(len(stored)):
        text = wanted.get(rows[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES])
        if text is not None:
            found[text].append(i)
    return found
