"""Named tensors as safetensors bytes, and what each of them has to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from lightning_muter.errors import MemoryFormatError, StateError

__all__ = ["TensorSpec", "check_dtypes", "check_tensors", "own_storage", "pack", "unpack"]

_DTYPES = frozenset({torch.float64, torch.float32, torch.int64, torch.uint8, torch.bool})


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor: its dtype, its shape in p, n and numbers, may it be left out."""

    dtype: torch.dtype
    shape: tuple[str, ...]
    optional: bool = False

    def fits(self, tensor: Tensor, sizes: Mapping[str, int]) -> bool:
        """Whether a tensor that was read is one of these."""
        expected = tuple(sizes[one] if one in sizes else int(one) for one in self.shape)
        return tensor.dtype == self.dtype and tuple(tensor.shape) == expected


def own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two of them in one storage.

    Raises:
        StateError: a dtype that a memory does not keep.
    """
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.dtype not in _DTYPES:
            raise StateError(
                f"the tensor {name!r} is of {value.dtype}, a memory keeps "
                f"{_said(_DTYPES)}: convert it"
            )
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in taken else value
        taken.add(place)
    return found


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors of any shape as safetensors bytes.

    Raises:
        StateError: a dtype that a memory does not keep.
    """
    return bytes(save(own_storage(tensors)))


def unpack(data: bytes) -> dict[str, Tensor]:
    """The tensors in safetensors bytes; nothing is unpickled.

    Raises:
        MemoryFormatError: a dtype that a memory does not keep.
        SafetensorError: the bytes are none of safetensors.
    """
    tensors = load(data)
    check_dtypes(tensors)
    return dict(tensors)


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that no memory writes.

    Raises:
        MemoryFormatError: with the dtypes that were found.
    """
    others = {tensor.dtype for tensor in tensors.values()} - _DTYPES
    if others:
        raise MemoryFormatError(
            f"tensors of {_said(others)} were read, a memory keeps {_said(_DTYPES)}: restore a "
            "backup"
        )


def check_tensors(
    tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], sizes: Mapping[str, int]
) -> None:
    """Refuse tensors that are not those of the specs.

    A spec named "rows.*" stands for any tensors of such names, which whoever reads them checks.

    Raises:
        MemoryFormatError: with the names of those that are missing, too many or of another kind.
    """
    families = tuple(name.removesuffix("*") for name in specs if name.endswith("*"))
    needed = {name for name, spec in specs.items() if not spec.optional}
    own = {name for name in tensors if not (families and name.startswith(families))}
    wrong = sorted((own - specs.keys()) | (needed - own))
    wrong += [n for n, s in specs.items() if n in tensors and not s.fits(tensors[n], sizes)]
    if wrong:
        raise MemoryFormatError(
            f"the tensors {wrong} are missing, too many, or of another shape or dtype than a "
            f"memory of {dict(sizes)} has: restore a backup"
        )


def _said(dtypes: frozenset[torch.dtype] | set[torch.dtype]) -> str:
    return ", ".join(sorted(str(one).removeprefix("torch.") for one in dtypes))
