"""Whether a module is the one that a memory was built with."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.errors import StateError
from lightning_muter.memory.fingerprint import fingerprint
from lightning_muter.models import ModelView

__all__ = ["check_architecture", "check_parameters"]


def check_architecture(view: ModelView, p: int, known: str) -> None:
    """Refuse a module whose names, shapes, dtype or frozen weights are not the memory's.

    Args:
        view: of the module.
        p: how many parameters the memory covers.
        known: the memory's fingerprint of its module.

    Raises:
        StateError: with what differs.
    """
    if view.p != p:
        raise StateError(
            f"the model has {view.p} trained parameters, the memory {p}: it belongs to another "
            "head or architecture"
        )
    if fingerprint(view.module, view.names) != known:
        raise StateError(
            "the model's architecture, precision or frozen weights are not the memory's (it "
            f"computes in {view.dtype}): load the checkpoint that was saved when the memory was "
            "built, in the precision of training"
        )


def check_parameters(view: ModelView, *known: Tensor) -> None:
    """Refuse parameters that are none of the memory's.

    Args:
        view: of the module.
        known: each ω (p,) that the memory serves from, the current one first.

    Raises:
        StateError: with how far away they are.
    """
    now = view.get().to(known[0].device)

    def kept(one: Tensor) -> Tensor:
        return one.to(view.kept_as).double()

    def same(one: Tensor) -> bool:
        return torch.equal(now, one) or torch.allclose(now, one, rtol=1e-6, atol=1e-8)

    if not any(same(kept(one)) for one in known):
        distance = float(torch.linalg.vector_norm(now - kept(known[0])))
        raise StateError(
            f"the model's parameters are {distance:.3g} away from the memory's: it was trained on "
            "or edited since, or another process served a request meanwhile; put the memory's own "
            "back (memory.restore(model), or load model.ckpt from its folder), or rebuild the "
            "memory"
        )
