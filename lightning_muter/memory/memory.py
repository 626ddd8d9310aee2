"""The unlearning memory: ω*, M_r, G_r, the ledger, and the digests of the training points."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.dense import DenseCurvature
from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.errors import ConfigurationError, MemoryFormatError, StateError
from lightning_muter.memory import points
from lightning_muter.memory.fingerprint import fingerprint
from lightning_muter.memory.store import Content, TensorSpec, read, write
from lightning_muter.models import ModelView
from lightning_muter.spec import Settings

__all__ = ["Start", "UnlearningMemory", "size_estimate"]

_VECTOR = TensorSpec(torch.float64, ("p",))
_TENSORS = {
    "omega_star": _VECTOR,
    "omega": _VECTOR,
    "matrix": TensorSpec(torch.float64, ("p", "p"), optional=True),
    "gradient": _VECTOR,
    "residual_gradient": _VECTOR,
    "digests": TensorSpec(torch.uint8, ("n", str(points.DIGEST_BYTES))),
    "removed": TensorSpec(torch.bool, ("n",)),
    "weights": TensorSpec(torch.float64, ("n",)),
    "initial": replace(_VECTOR, optional=True),
    "retraced": replace(_VECTOR, optional=True),
}
_OPTIONAL = [name for name, spec in _TENSORS.items() if spec.optional]


def size_estimate(p: int) -> str:
    """How large a dense memory of p parameters is, for a person.

    Example:
        >>> size_estimate(6410)
        'p = 6,410: 329 MB'
    """
    return f"p = {p:,}: {8 * p * p / 1e6:,.0f} MB"


@dataclass(frozen=True)
class Start:
    """Where training that stopped early began, for a step of the same length.

    ``initial`` is the ω (p,) that it started from, ``retraced`` (p,) how far the quadratic model
    of all points comes from there within the horizon.
    """

    initial: Tensor
    retraced: Tensor


@dataclass(frozen=True, repr=False)
class UnlearningMemory:
    """ω* (p,), M_r (p, p), G_r (p,), the current ω^u, the ledger and the points' digests.

    Immutable: `forget` returns the memory after a request, so that a failure changes nothing.
    ``curvature`` is None for the methods that keep none, ``start`` where there is no horizon.
    ``weights`` (n,) is how much each point counted in training, 0 for one that it never saw.

    All tensors are float64 but ``digests`` (n, 16) uint8 and ``removed`` (n,) bool. ``warnings``
    says what was found wrong when the memory was built; every result repeats it.

    Source: the paper's Algorithm 1 and Corollary 1 (ω* stays the expansion point).
    """

    settings: Settings
    omega_star: Tensor
    omega: Tensor
    curvature: DenseCurvature | None
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

    def __repr__(self) -> str:
        return (
            f"UnlearningMemory(method={self.settings.method!r}, n={self.n}, p={self.p}, "
            f"requests={len(self.ledger)}, forgotten={int(self.removed.sum())}, "
            f"warnings={len(self.warnings)})"
        )

    @property
    def n(self) -> int:
        """How many points the model was trained on."""
        return len(self.removed)

    @property
    def p(self) -> int:
        """How many parameters the memory covers."""
        return len(self.omega_star)

    @property
    def remaining(self) -> list[int]:
        """The indices that were trained on and have not been forgotten."""
        indices: list[int] = torch.nonzero(~self.removed & (self.weights > 0)).flatten().tolist()
        return indices

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the memory has, by its name in a file."""
        found = {name: getattr(self, name) for name in _TENSORS if name not in _OPTIONAL}
        if self.curvature is not None:
            found["matrix"] = self.curvature.matrix
        if self.start is not None:
            found |= {"initial": self.start.initial, "retraced": self.start.retraced}
        return found

    def to(self, device: torch.device | str) -> UnlearningMemory:
        """The memory with what it computes with on another device; its points stay."""
        if self.omega_star.device == torch.device(device):
            return self
        names = ("omega_star", "omega", "gradient", "residual_gradient")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        if self.curvature is not None:
            moved["curvature"] = self.curvature.to(device, moved["omega_star"])
        if self.start is not None:
            moved["start"] = Start(self.start.initial.to(device), self.start.retraced.to(device))
        return replace(self, **moved)

    def forget(
        self,
        indices: list[int],
        remaining: DenseCurvature | None,
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
        flags[indices] = True
        record = {"request": len(self.ledger) + 1, "indices": indices, **entry}
        return replace(
            self,
            curvature=remaining,
            gradient=self.gradient + gradient,
            omega=omega,
            removed=flags,
            ledger=(*self.ledger, record),
            pending=(*self.pending, removed),
        )

    def at(self, omega: Tensor) -> UnlearningMemory:
        """The memory with another current ω^u (p,), as corrector steps leave it."""
        return replace(self, omega=omega.to(self.omega))

    def without(self, indices: list[int]) -> UnlearningMemory:
        """The memory with points marked as removed, and nothing else changed."""
        removed = self.removed.clone()
        removed[indices] = True
        return replace(self, removed=removed)

    # --- checks -----------------------------------------------------------------------------

    def check_indices(self, indices: list[int]) -> None:
        """Refuse an empty request, a double, an unknown or a forgotten index.

        Raises:
            RemovalError: with the offending values; nothing was changed.
        """
        points.check_range(indices, self.n)
        points.check_free(indices, self.removed, self.weights)

    def check_content(self, indices: list[int], x: Tensor, targets: Tensor) -> None:
        """Refuse a point that is not the one the memory was built on, and one with NaN.

        Raises:
            RemovalError: with the offending indices.
        """
        points.check_content(self.key, self.digests, indices, x, targets)

    def changed(self, indices: list[int], x: Tensor, targets: Tensor) -> list[int]:
        """Those of ``indices`` whose content is not what the memory was built on."""
        return points.changed(self.key, self.digests, indices, x, targets)

    def find(self, x: Tensor, targets: Tensor) -> list[int]:
        """The indices of points given by content.

        Raises:
            RemovalError: a point was never trained on, or is gone already.
        """
        return points.find(self.key, self.digests, self.removed, self.weights, x, targets)

    def check_model(self, view: ModelView) -> None:
        """Refuse a module that is not the memory's: architecture, frozen weights, head.

        Raises:
            StateError: with what differs.
        """
        if view.p != self.p:
            raise StateError(
                f"the model has {view.p} trained parameters, the memory {self.p}: it "
                "belongs to another head or architecture"
            )
        if fingerprint(view.module, view.names) != self.fingerprint:
            raise StateError(
                "the model's architecture, precision or frozen weights are not the memory's (it "
                f"computes in {view.dtype}): load the checkpoint that was saved when the "
                "memory was built, in the precision of training"
            )
        now = view.get().to(self.omega.device)
        expected = [w.to(view.dtype).double() for w in (self.omega, self.omega_star)]
        if not any(torch.allclose(now, w, rtol=1e-6, atol=1e-8) for w in expected):
            distance = float(torch.linalg.vector_norm(now - expected[0]))
            raise StateError(
                f"the model's parameters are {distance:.3g} away from the memory's: it was "
                "trained on or edited since; rebuild the memory, or load the right checkpoint"
            )

    # --- disk -------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the memory to a folder; the manifest is replaced last, in one step.

        A reader sees the state before or the state after, never one in between.
        """
        tensors: dict[str, Tensor] = {}
        places: set[int] = set()
        for name, tensor in self.tensors().items():
            value = tensor.detach().cpu().contiguous()
            shared = value.data_ptr() in places  # ω may be ω*: a file keeps two of them
            tensors[name] = value.clone() if shared else value
            places.add(value.data_ptr())
        content = Content(
            tensors=tensors,
            ledger=self.ledger,
            settings=self.settings.to_dict(),
            key=self.key,
            fingerprint=self.fingerprint,
            summary=self.summary,
            warnings=self.warnings,
            sizes={"p": self.p, "n": self.n},
        )
        write(directory, content)

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
        content = read(directory, _TENSORS)
        return cls(
            settings=_settings(content.settings, settings),
            key=content.key,
            fingerprint=content.fingerprint,
            summary=content.summary,
            ledger=content.ledger,
            warnings=content.warnings,
            **_fields(content.tensors),
        )


def _fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors by their names in a file as fields of a memory."""
    found: dict[str, Any] = {name: tensors[name] for name in _TENSORS if name not in _OPTIONAL}
    matrix, initial = tensors.get("matrix"), tensors.get("initial")
    found["curvature"] = None if matrix is None else DenseCurvature(matrix)
    found["start"] = None if initial is None else Start(initial, tensors["retraced"])
    return found


def _settings(saved: dict[str, Any], given: Settings | None) -> Settings:
    if given is None:
        return Settings.from_dict(saved)
    decay: Any = given.weight_decay or saved.get("weight_decay")
    horizon = saved.get("horizon") if given.horizon is None else given.horizon
    try:
        trained = given.trained(decay, horizon)
    except (TypeError, ValueError) as error:
        raise MemoryFormatError(
            f"the memory says weight_decay={decay!r} and horizon={horizon!r} ({error}): restore a "
            "backup"
        ) from error
    different = trained.differences(saved)
    if different:
        said = "; ".join(
            f"{name}: {before!r} (memory), {now!r} (callback)"
            for name, (before, now) in different.items()
        )
        raise ConfigurationError(
            f"the callback is not the one that built the memory: {said}. Use the memory's "
            "settings, with functions and classes whose code is as it was, in the same Python "
            "version; or rebuild the memory"
        )
    return trained
