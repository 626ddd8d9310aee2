"""Where input, target and what else forward takes are in a batch, whatever its shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

from torch import Tensor

from lightning_muter.errors import ConfigurationError
from lightning_muter.models.beside import Beside, Name

__all__ = ["FOUND", "BatchForm", "Where"]

#: what a user can give as ``batch=``
Where = Union[Callable[[Any], Any], Sequence[Name]]  # noqa: UP007

_INPUTS = ("image", "images", "img", "input", "inputs", "pixel_values", "x")
_TARGETS = ("label", "labels", "target", "targets", "y")
_SAY = 'say where they are by batch=, as batch=("image", "label"), or a function batch -> (x, y)'


@dataclass(frozen=True)
class BatchForm:
    """How a batch becomes (x, target, what else forward takes), and a perturbed x gets back.

    Lists and tuples hold input and target first. In dictionaries, named tuples, dataclasses and
    other objects they are found by the usual names, or as the only tensors that they can be.

    Attributes:
        where: the names or positions of input and target, then of what forward takes beside x; or
            a function batch -> (x, target, ...) that returns tensors of the batch itself; None to
            find them.
        taken: names that forward has for its arguments after x: an entry of such a name is handed
            to it.

    Example:
        >>> import torch
        >>> batch = {"image": torch.zeros(2, 3), "label": torch.tensor([0, 1]), "path": ["a", "b"]}
        >>> x, target, beside = BatchForm().read(batch)
        >>> x.shape, target.tolist(), bool(beside)
        (torch.Size([2, 3]), [0, 1], False)
    """

    where: tuple[Name, ...] | Callable[[Any], Any] | None = None
    taken: tuple[str, ...] = ()

    @classmethod
    def of(cls, where: Where | None) -> BatchForm:
        """The form of what a user gave.

        Raises:
            ConfigurationError: it is not two names or more, and no function.
        """
        if where is None or callable(where):
            return cls(where)
        names = None if isinstance(where, str) else tuple(where)
        if names is None or len(names) < 2 or not all(isinstance(n, (str, int)) for n in names):
            raise ConfigurationError(
                f"batch={where!r} must be the names or positions of input and target, as "
                'batch=("image", "label"), and after them those of what else forward takes, or a '
                "function batch -> (x, target)"
            )
        return cls(names)

    def taking(self, names: Sequence[str]) -> BatchForm:
        """The form for a forward whose arguments after x have these names."""
        return replace(self, taken=tuple(names))

    def within(self, batch: Any) -> BatchForm:
        """The form without the names that batches like this one do not have."""
        held = _entries(batch)
        return self.taking([name for name in self.taken if name in held])

    def is_pair(self, batch: Any) -> bool:
        """Whether a batch is a list or tuple with input and target in front, which has no names."""
        if callable(self.where) or not _is_plain(batch):
            return False
        first = None if self.where is None else self.where[:2]
        named = any(isinstance(one, str) for one in self.where or ())
        return first is None or named or self.where == (0, 1)

    def read(self, batch: Any) -> tuple[Tensor, Tensor, Beside]:
        """Inputs (n, ...) and targets (n, ...) of a batch, and what else forward takes.

        Raises:
            ConfigurationError: they are not there, or are no tensors that can be an input to
                perturb and its target.
        """
        x, targets, more = self._picked(batch)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ConfigurationError(
                f"inputs are {getattr(x, 'dtype', type(x).__name__)}; the perturbation needs "
                f"floating-point tensors: convert in the data set, or {_SAY}"
            )
        if not isinstance(targets, Tensor):
            raise ConfigurationError(
                f"targets are a {type(targets).__name__}; a tensor of one target a point is "
                f"expected: convert them in the data set or in collate_fn, or {_SAY}"
            )
        entries = _entries(batch)
        found: dict[Name, Any] = {
            name: entries[name]
            for name in self.taken
            if name in entries and not any(entries[name] is one for one in (x, targets))
        }
        beside = {**found, **more}
        return x, targets, Beside.of(beside, len(x) if x.ndim else 0)

    def _picked(self, batch: Any) -> tuple[Any, Any, dict[Name, Any]]:
        if callable(self.where):
            return _called(self.where, batch)
        entries = _entries(batch)
        names = self._names(batch)
        missing = [name for name in names if not _has(batch, entries, name)]
        if missing:
            raise ConfigurationError(
                f"a batch has no entry {missing[0]!r}; it is {_described(batch)}: {_SAY}"
            )
        x, targets, *others = (_get(batch, entries, name) for name in names)
        keys = [k if isinstance(name, int) else name for k, name in enumerate(names[2:])]
        return x, targets, dict(zip(keys, others, strict=True))

    def _names(self, batch: Any) -> tuple[Name, ...]:
        """Names or positions of input and target in a batch, then of what else is named."""
        if self.where is None or callable(self.where) or self.is_pair(batch):
            return _found(batch)
        return self.where

    def put(self, batch: Any, x: Tensor, perturbed: Tensor) -> Callable[[], None]:
        """Replace the input ``x`` of a batch by ``perturbed``; what puts it back where it must.

        A list, a dictionary or an object gets the new tensor in the place of the old one. Inside
        a tuple or a frozen object the tensor itself shows other values until it is put back, so
        that no tensor of the data set keeps them.

        Raises:
            ConfigurationError: ``x`` is no tensor of the batch.
        """
        if callable(self.where):
            done = _replaced(batch, x, perturbed)
        else:
            done = _assigned(batch, self._names(batch)[0], perturbed)
        if done:
            return _nothing
        if not _holds(batch, x):
            raise ConfigurationError(
                "batch= returns an input that is no tensor of the batch itself: training_step "
                "would never see the perturbed one; return the batch's own tensor, and convert it "
                "in the data set or in collate_fn"
            )
        own = x.data
        x.data = perturbed.to(x)

        def back() -> None:
            x.data = own

        return back


#: what is found by itself
FOUND = BatchForm()


def _nothing() -> None:
    """Nothing has to be put back."""


def _called(function: Callable[[Any], Any], batch: Any) -> tuple[Any, Any, dict[Name, Any]]:
    """Input, target and what else a function finds: values by position, mappings by name."""
    try:
        found = function(batch)
    except Exception as error:
        raise ConfigurationError(
            f"batch= failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}; it "
            f"is called with {_described(batch)} and must return (x, target)"
        ) from error
    if not isinstance(found, (tuple, list)) or len(found) < 2:
        raise ConfigurationError(
            f"batch= returned a {type(found).__name__}; it must return (x, target), and after them "
            "what else forward takes: values in its order, or a dictionary by its names"
        )
    x, targets, *others = found
    more: dict[Name, Any] = {}
    for position, one in enumerate(others):
        more |= one if isinstance(one, Mapping) else {position: one}
    return x, targets, more


def _is_plain(batch: Any) -> bool:
    return isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields")


def _entries(batch: Any) -> dict[Name, Any]:
    """What a batch holds, by name or position."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if _is_plain(batch):
        return dict(enumerate(batch))
    if hasattr(batch, "_asdict"):
        return dict(batch._asdict())
    if dataclasses.is_dataclass(batch):
        return {one.name: getattr(batch, one.name) for one in dataclasses.fields(batch)}
    if isinstance(batch, Tensor) or not hasattr(batch, "__dict__"):
        return {}
    return dict(vars(batch))


def _has(batch: Any, entries: Mapping[Name, Any], name: Name) -> bool:
    inside = isinstance(name, int) and isinstance(batch, tuple) and -len(batch) <= name < len(batch)
    return name in entries or inside


def _get(batch: Any, entries: Mapping[Name, Any], name: Name) -> Any:
    return entries[name] if name in entries else batch[name]


def _found(batch: Any) -> tuple[Name, Name]:
    """Where input and target are, where there is one way."""
    entries = _entries(batch)
    if _is_plain(batch):
        if len(entries) < 2:
            raise ConfigurationError(
                f"a batch is {_described(batch)}; expected (input, target) tensors: {_SAY}"
            )
        return 0, 1
    tensors = {name: one for name, one in entries.items() if isinstance(one, Tensor)}
    floating: list[Name] = [name for name, one in tensors.items() if one.is_floating_point()]
    targets: list[Name] = [name for name in tensors if name in _TARGETS]
    inputs: list[Name] = [name for name in floating if name in _INPUTS]
    inputs = inputs or [name for name in floating if name not in targets]
    targets = targets or [name for name in tensors if name not in inputs]
    if len(inputs) != 1 or len(targets) != 1:
        raise ConfigurationError(
            f"a batch is {_described(batch)}: which is the input and which the target is not "
            f"clear (inputs may be {inputs}, targets {targets}); {_SAY}"
        )
    return inputs[0], targets[0]


def _described(batch: Any) -> str:
    if _is_plain(batch):
        return f"a {type(batch).__name__} of {[type(one).__name__ for one in batch]}"
    entries = _entries(batch)
    kinds = {str(k): str(getattr(v, "dtype", type(v).__name__)) for k, v in entries.items()}
    return f"a {type(batch).__name__} with {kinds}" if kinds else f"a {type(batch).__name__}"


def _replaced(batch: Any, x: Tensor, new: Tensor) -> bool:
    """Put ``new`` where the batch, or a container in it, holds ``x`` and can be changed."""
    return any(
        _assigned(batch, name, new) if one is x else _is_container(one) and _replaced(one, x, new)
        for name, one in _entries(batch).items()
    )


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple)) or dataclasses.is_dataclass(value)


def _assigned(batch: Any, name: Name, new: Tensor) -> bool:
    if isinstance(batch, (list, MutableMapping)):
        batch[name] = new  # type: ignore[index]
        return True
    if isinstance(batch, (tuple, Mapping)):
        return False
    try:
        setattr(batch, str(name), new)
    except AttributeError:  # a frozen dataclass
        return False
    return True


def _holds(batch: Any, x: Tensor) -> bool:
    values = _entries(batch).values()
    return any(one is x or (_is_container(one) and _holds(one, x)) for one in values)
