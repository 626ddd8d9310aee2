"""The user's own keys of training points, as they were given or as the data set has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from lightning_muter.errors import ConfigurationError, RemovalError
from lightning_muter.memory.ids import id_texts

__all__ = ["Ids", "ids_of"]

Ids = str | Sequence[str | int]


def ids_of(dataset: Any, ids: Ids | None) -> list[str] | None:
    """One key a point of the data set, by its text; None where there are none.

    Raises:
        ConfigurationError: no such attribute, another number of keys, or what is no key.
    """
    if ids is None:
        return None
    given = _attribute(dataset, ids) if isinstance(ids, str) else ids
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ConfigurationError(
            f"ids={given!r} must be one key a training point, or the name of the data set's "
            "attribute that holds them"
        )
    try:
        texts = id_texts(given)
    except RemovalError as error:
        raise ConfigurationError(f"{error}; give every training point one") from error
    if len(texts) != len(dataset):
        raise ConfigurationError(
            f"ids= has {len(texts)} keys, the training data set {len(dataset)} points: give one "
            "key a point, in the data set's order"
        )
    return texts


def _attribute(dataset: Any, name: str) -> list[Any]:
    """The keys of a data set's points, down through `Subset` and `ConcatDataset`."""
    if hasattr(dataset, name):
        found = getattr(dataset, name)
        return list(found.tolist() if hasattr(found, "tolist") else found)
    if isinstance(dataset, Subset):
        base = _attribute(dataset.dataset, name)
        return [base[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [key for part in dataset.datasets for key in _attribute(part, name)]
    raise ConfigurationError(
        f"the data set {type(dataset).__name__} has no attribute {name!r}: give ids= the name of "
        "the one that holds a key a point, or the keys themselves"
    )
