"""The unlearning memory: ω*, M_r, G_r, the ledger, and the digests of the training points."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.curvature.base import Curvature
from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.display import card
from lightning_muter.errors import MemoryFormatError, MuterError
from lightning_muter.memory import blocks as point_blocks
from lightning_muter.memory import ids as point_ids
from lightning_muter.memory import points
from lightning_muter.memory.content import content_of, fields_of, new_requests
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.kept_model import BASE, CURRENT, named
from lightning_muter.memory.known_points import KnownPoints
from lightning_muter.memory.model_check import check_architecture, check_parameters
from lightning_muter.memory.rebase_policy import RebasePolicy
from lightning_muter.memory.start import Start
from lightning_muter.models import NOTHING, Beside, ModelView
from lightning_muter.parallel import Group
from lightning_muter.spec import Settings

__all__ = ["UnlearningMemory"]


@dataclass(frozen=True, repr=False)
class UnlearningMemory:
    """ω* (p,), M_r (p, p), G_r (p,), the current ω^u, the ledger and the points' digests.

    Immutable: `forget` returns the memory after a request, so that a failure changes nothing.
    ``curvature`` is M_r as a matrix or as rows, None for the methods that keep none, ``start`` is
    None where there is no horizon.
    ``weights`` (n,) is how much each point counted in training, 0 for one that it never saw.
    ``pending`` is what requests took out of the curvature since the last write, ``parameters`` the
    names and shapes of ω. ``memory_id`` and ``generation`` say which memory of which folder it is.
    ``blocks`` (k, 16) uint8 are digests of 512 points each; without them rows are told one by one.

    ``residual_gradient`` is ∇F(ω*) (p,); zeros after a rebase without a horizon, where nothing
    needs it.

    All tensors are float64 but ``digests`` (n, 16) uint8 and ``removed`` (n,) bool. ``warnings``
    says what was found wrong when the memory was built; every result repeats it. ``ids`` (n, 16)
    uint8 are digests, keyed by ``ids_key``, of the user's own keys of the points, where there are
    any. ``private`` is ω^u (p,) without the noise where ``omega`` was published with a
    certificate, else None.

    Source: the paper's Algorithm 1 and Corollary 1 (ω* stays the expansion point).
    """

    settings: Settings
    omega_star: Tensor
    omega: Tensor
    curvature: Curvature | None
    gradient: Tensor
    residual_gradient: Tensor
    digests: Tensor
    removed: Tensor
    weights: Tensor
    key: bytes
    fingerprint: str
    start: Start | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    ledger: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    pending: tuple[RemovedPoints, ...] = ()
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    memory_id: str = field(default_factory=lambda: os.urandom(16).hex())
    generation: int = 0
    ids: Tensor | None = None
    ids_key: bytes = b""
    rebase_policy: RebasePolicy = RebasePolicy()
    private: Tensor | None = None
    blocks: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"UnlearningMemory(method={self.settings.method!r}, n={self.n}, p={self.p}, "
            f"requests={len(self.ledger)}, forgotten={int(self.removed.sum())}, "
            f"warnings={len(self.warnings)})"
        )

    def _repr_html_(self) -> str:
        said = {"requests": len(self.ledger), "forgotten": int(self.removed.sum())}
        return card(f"Memory of {self.settings.method}", self.summary | said, self.warnings)

    @property
    def n(self) -> int:
        """How many points the model was trained on."""
        return len(self.removed)

    @property
    def p(self) -> int:
        """How many parameters the memory covers."""
        return self.omega_star.shape[0]

    @property
    def remaining(self) -> list[int]:
        """The indices that were trained on and have not been forgotten."""
        indices: list[int] = torch.nonzero(~self.removed & (self.weights > 0)).flatten().tolist()
        return indices

    def to(self, device: torch.device | str) -> UnlearningMemory:
        """The memory with what it computes with on another device; its points stay."""
        if self.omega_star.device == torch.device(device):
            return self
        names = ("omega_star", "omega", "gradient", "residual_gradient")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        if self.curvature is not None:
            moved["curvature"] = self.curvature.to(device, moved["omega_star"])
        if self.private is not None:
            moved["private"] = self.private.to(device)
        if self.start is not None:
            moved["start"] = self.start.to(device)
        return replace(self, **moved)

    def shared(self, group: Group) -> UnlearningMemory:
        """The memory with this process's share of the points' curvature, where it can be shared."""
        kept = None if self.curvature is None else self.curvature.shared(group)
        return self if kept is self.curvature else replace(self, curvature=kept)

    def whole(self) -> UnlearningMemory:
        """The memory with all of its curvature, as a folder needs it; every process must ask."""
        kept = self.curvature
        return self if kept is None else replace(self, curvature=kept.whole())

    def forget(
        self,
        indices: list[int],
        remaining: Curvature | None,
        removed: RemovedPoints,
        gradient: Tensor,
        omega: Tensor,
        entry: dict[str, Any],
    ) -> UnlearningMemory:
        """Stage III: M - ΣD (p, p), G + Σ(∇l + λω*) (p,), and the request in the ledger.

        Args:
            indices: the points that go.
            remaining: M_{r+1} = M_r - Σ_S D_i.
            removed: Σ_S D_i, by its factors.
            gradient: Σ_S (∇l_i + λω*) (p,), added to G_r.
            omega: the current ω^u (p,).
            entry: what else the ledger should say of the request.
        """
        flags = self.removed.clone()
        flags.numpy()[indices] = True
        record = {"request": len(self.ledger) + 1, "indices": indices, **entry}
        return replace(
            self,
            curvature=remaining,
            gradient=self.gradient + gradient,
            omega=omega,
            private=None,
            removed=flags,
            ledger=(*self.ledger, record),
            pending=(*self.pending, removed),
        )

    def annotated(self, more: Mapping[str, Any]) -> UnlearningMemory:
        """The memory with more said of the requests since the last write."""
        first = len(self.ledger) - len(self.pending)
        entries = ({**entry, **more} for entry in self.ledger[first:])
        return replace(self, ledger=(*self.ledger[:first], *entries))

    def dated(self, time: str) -> UnlearningMemory:
        """The memory whose last line of the ledger happened at a time."""
        return replace(self, ledger=(*self.ledger[:-1], {**self.ledger[-1], "time": time}))

    def at(self, omega: Tensor) -> UnlearningMemory:
        """The memory with another current ω^u (p,), as corrector steps leave it."""
        return replace(self, omega=omega.to(self.omega), private=None)

    def published(self, omega: Tensor) -> UnlearningMemory:
        """The memory whose ω^u is private, and another one (p,) the current model's."""
        return replace(self, omega=omega.to(self.omega), private=self.omega)

    def without(self, indices: list[int]) -> UnlearningMemory:
        """The memory with points marked as removed, and nothing else changed."""
        removed = self.removed.clone()
        removed[indices] = True
        return replace(self, removed=removed)

    # --- checks -----------------------------------------------------------------------------

    def changed(
        self, indices: list[int], x: Tensor, targets: Tensor, beside: Beside = NOTHING
    ) -> list[int]:
        """Those of ``indices`` whose content is not what the memory was built on."""
        return points.changed(self.key, self.digests, indices, x, targets, beside)

    @property
    def known(self) -> KnownPoints:
        """The training points by content."""
        return KnownPoints(self.digests, self.removed, self.weights, self.ledger)

    def recognised(
        self, first: int, x: Tensor, targets: Tensor, beside: Beside = NOTHING
    ) -> Tensor:
        """The digests (m, 16) of rows of a data set from position ``first``, a multiple of 512.

        Of blocks that are as the memory was built on they are known.
        """
        known = self.key, self.digests, self.blocks
        return point_blocks.recognised(*known, first, x, targets, beside)

    def owned(self, ids: list[str]) -> list[int]:
        """The training indices of all points that keys own, in the order of the keys.

        A key's points that training never saw are left out where it has others.

        Raises:
            RemovalError: a key that owns no point, or a memory without keys.
        """
        return point_ids.owned(self.ids_key, self.ids, self.weights, ids)

    def check_model(self, view: ModelView) -> None:
        """Refuse a module that is not the memory's: architecture, frozen weights, head.

        Raises:
            StateError: with what differs.
        """
        self.check_architecture(view)
        check_parameters(view, self.omega, self.omega_star)

    def check_architecture(self, view: ModelView) -> None:
        """Refuse a module whose names, shapes, dtype or frozen weights are not the memory's.

        Raises:
            StateError: with what differs.
        """
        check_architecture(view, self.p, self.fingerprint)

    # --- the module -------------------------------------------------------------------------

    def restore(self, module: nn.Module) -> None:
        """Put the current ω^u into a module whose other weights are the memory's.

        Raises:
            StateError: it is of another architecture, precision or frozen part.
        """
        view = self.settings.view(module)
        self.check_architecture(view)
        view.set(self.omega)

    def state(self) -> dict[str, Tensor]:
        """The current ω^u by the names and shapes of the module's parameters."""
        return named(self.omega, self.parameters)

    # --- disk -------------------------------------------------------------------------------

    def save(
        self,
        directory: str | os.PathLike[str],
        model: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> UnlearningMemory:
        """Write the memory to a new folder, and return it as it is kept there.

        Args:
            directory: made where there is none.
            model: the checkpoint of its model, which becomes ``model.ckpt``.
            overwrite: take the place of a memory that is there.

        Raises:
            StateError: the folder holds a memory, or cannot be written.
        """
        kept = replace(self, pending=(), generation=0)
        MemoryStore(directory).create(content_of(vars(kept)), model, overwrite)
        return kept

    def commit(self, store: MemoryStore) -> UnlearningMemory:
        """Append the requests since the last write to a folder, in one step.

        Raises:
            StateError: another process changed the folder meanwhile; nothing was changed.
        """
        requests = new_requests(self.ledger, self.pending, self.private)
        current = {name: getattr(self, name) for name in CURRENT}
        generation = store.commit(self.generation, current, requests)
        return replace(self, pending=(), generation=generation)

    def replace_in(self, store: MemoryStore) -> UnlearningMemory:
        """Take the place of all that a folder holds of this memory.

        Raises:
            StateError: another process changed the folder meanwhile; nothing was changed.
        """
        generation = store.replace(self.generation, content_of(vars(self)))
        return replace(self, pending=(), generation=generation)

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], settings: Settings | None = None
    ) -> UnlearningMemory:
        """Read a memory and check every field; nothing is unpickled, imported or run.

        Args:
            directory: the folder that `save` wrote.
            settings: needed where the threat or the loss is the user's own class or function;
                every field must be the memory's, a λ of 0 and a horizon of None excepted, which
                stand for training's own.

        Raises:
            MemoryFormatError: missing, truncated, altered or of another format version.
            ConfigurationError: ``settings`` are not those of the memory.
        """
        return cls.read(MemoryStore(directory), settings)

    @classmethod
    def read(cls, store: MemoryStore, settings: Settings | None = None) -> UnlearningMemory:
        """`load` from a store at hand."""
        content = store.read(BASE, CURRENT)
        try:
            return cls(**fields_of(content, settings))
        except MuterError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise MemoryFormatError(
                f"{store.folder} is damaged ({type(error).__name__}: {error}): restore a backup"
            ) from error
