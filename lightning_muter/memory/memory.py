"""The unlearning memory: ω*, M_r, G_r, the ledger, and the digests of the training points."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_muter.errors import (
    ConfigurationError,
    MemoryFormatError,
    RemovalError,
    StateError,
)
from lightning_muter.models import Derivatives
from lightning_muter.spec import Settings

__all__ = ["FORMAT_VERSION", "UnlearningMemory", "digest", "fingerprint", "size_estimate"]

FORMAT_VERSION = 2
_TENSORS = (
    "omega_star",
    "omega",
    "matrix",
    "gradient",
    "residual_gradient",
    "digests",
    "removed",
    "initial",
    "retraced",
)


def digest(key: bytes, x: Tensor, target: Tensor) -> bytes:
    """A keyed 16-byte digest of one training point, by its values.

    Floating-point values count as float64: a point is the same in single and double precision.
    """
    state = hashlib.blake2b(key=key, digest_size=16)
    for tensor in (x, target):
        value = tensor.detach().cpu().contiguous()
        value = value.double() if value.is_floating_point() else value
        state.update(f"{value.dtype}{tuple(value.shape)}".encode())
        state.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.digest()


def fingerprint(module: nn.Module, trained: list[str]) -> str:
    """A digest of the module's names, shapes and frozen values; the trained ones' values left out.

    State of metrics and of other callbacks is no part of a ``state_dict`` and so none of this.
    """
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        name = name.replace("_orig_mod.", "")
        state.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        if name not in trained:
            data = value.detach().cpu().contiguous().reshape(-1)
            state.update(data.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def size_estimate(p: int) -> str:
    """How large a dense memory of p parameters is, for a person.

    Example:
        >>> size_estimate(6410)
        'p = 6,410: 329 MB'
    """
    return f"p = {p:,}: {8 * p * p / 1e6:,.0f} MB"


def _nothing() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class UnlearningMemory:
    """ω* (p,), M_r (p, p), G_r (p,), the current ω^u, the ledger and the points' digests.

    Immutable: `forget` returns the memory after a request, so that a failure changes nothing.
    Where training stopped early, ``initial`` is the ω (p,) that it started from and ``retraced``
    (p,) how far the quadratic model of all points comes from there within the horizon.
    ``warnings`` say where training was not what the memory assumes (``strict=False``).

    All tensors are float64 but ``digests`` (n, 16) uint8 and ``removed`` (n,) bool.

    Source: the paper's Algorithm 1 and Corollary 1 (ω* stays the expansion point).
    """

    settings: Settings
    omega_star: Tensor
    omega: Tensor
    matrix: Tensor
    gradient: Tensor
    residual_gradient: Tensor
    digests: Tensor
    removed: Tensor
    key: bytes
    fingerprint: str
    initial: Tensor = field(default_factory=_nothing)
    retraced: Tensor = field(default_factory=_nothing)
    summary: dict[str, Any] = field(default_factory=dict)
    ledger: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()

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
        """The indices that have not been forgotten."""
        return [int(i) for i in torch.nonzero(~self.removed).flatten()]

    def to(self, device: torch.device | str) -> UnlearningMemory:
        """The memory on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def forget(
        self,
        indices: list[int],
        remaining: Tensor,
        gradient: Tensor,
        omega: Tensor,
        entry: dict[str, Any],
    ) -> UnlearningMemory:
        """Stage III: M - ΣD (p, p), G + Σ(∇l + λω*) (p,), and the request in the ledger.

        Args:
            indices: the points that go.
            remaining: M_{r+1} = M_r - Σ_S D_i (p, p).
            gradient: Σ_S (∇l_i + λω*) (p,), added to G_r.
            omega: the current ω^u (p,).
            entry: what else the ledger should say of the request.
        """
        removed = self.removed.clone()
        removed[indices] = True
        record = {"request": len(self.ledger) + 1, "indices": indices, **entry}
        return replace(
            self,
            matrix=remaining,
            gradient=self.gradient + gradient,
            omega=omega,
            removed=removed,
            ledger=(*self.ledger, record),
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
        if not indices:
            raise RemovalError("the request is empty: name at least one training index to forget")
        outside = [i for i in indices if not 0 <= i < self.n]
        if outside:
            raise RemovalError(
                f"indices {outside} are out of range: the memory was built on {self.n} points, "
                f"0 to {self.n - 1}"
            )
        twice = sorted({i for i in indices if indices.count(i) > 1})
        if twice:
            raise RemovalError(f"indices {twice} occur twice in the request: name each once")
        gone = [i for i in indices if bool(self.removed[i])]
        if gone:
            raise RemovalError(f"indices {gone} were forgotten already: leave them out")
        if len(indices) >= int((~self.removed).sum()):
            raise RemovalError(
                f"the request would forget all {len(indices)} remaining points: there is no model "
                "of no data; delete the model instead"
            )

    def check_content(self, indices: list[int], x: Tensor, targets: Tensor) -> None:
        """Refuse a point that is not the one the memory was built on, and one with NaN.

        Raises:
            RemovalError: with the offending indices.
        """
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise RemovalError("the removal batch has NaN or infinite inputs: mend the data set")
        changed = [
            i
            for i, point, target in zip(indices, x, targets, strict=True)
            if digest(self.key, point, target) != bytes(self.digests[i].tolist())
        ]
        if changed:
            raise RemovalError(
                f"points {changed} are not what the memory was built on: the data set changed, or "
                "the points pass through a random transform; give the points as they were trained"
            )

    def find(self, x: Tensor, targets: Tensor) -> list[int]:
        """The indices of points given by content.

        Raises:
            RemovalError: a point was never trained on, or is gone already.
        """
        by_digest: dict[bytes, list[int]] = {}
        for i, row in enumerate(self.digests.tolist()):
            by_digest.setdefault(bytes(row), []).append(i)
        found: list[int] = []
        for position, (point, target) in enumerate(zip(x, targets, strict=True)):
            known = by_digest.get(digest(self.key, point, target), [])
            if not known:
                raise RemovalError(
                    f"point {position} of the batch was never trained on: no training point has "
                    "its content (same values, dtype and shape)"
                )
            free = [i for i in known if not bool(self.removed[i]) and i not in found]
            if not free:
                raise RemovalError(f"point {position} of the batch was forgotten already: {known}")
            found.append(free[0])
        return found

    def check_model(self, derivatives: Derivatives) -> None:
        """Refuse a module that is not the memory's: architecture, frozen weights, head.

        Raises:
            StateError: with what differs.
        """
        if derivatives.p != self.p:
            raise StateError(
                f"the model has {derivatives.p} trained parameters, the memory {self.p}: it "
                "belongs to another head or architecture"
            )
        if fingerprint(derivatives.module, derivatives.names) != self.fingerprint:
            raise StateError(
                "the model's architecture or frozen weights are not the memory's: load the "
                "checkpoint that was saved when the memory was built"
            )
        now = derivatives.get().to(self.omega.device)
        expected = [w.to(derivatives.dtype).double() for w in (self.omega, self.omega_star)]
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
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"state-{len(self.ledger):06d}-{os.urandom(4).hex()}.safetensors"
        tensors = {key: getattr(self, key).detach().cpu() for key in _TENSORS}
        tensors["omega"] = tensors["omega"].clone()  # it may share ω*'s memory
        tensors["removed"] = tensors["removed"].to(torch.uint8)
        save_file(tensors, folder / name)
        ledger = "".join(json.dumps(entry) + "\n" for entry in self.ledger)
        manifest = {
            "format_version": FORMAT_VERSION,
            "p": self.p,
            "n": self.n,
            "state": name,
            "state_blake2b": _file_digest(folder / name),
            "ledger_lines": len(self.ledger),
            "key": self.key.hex(),
            "model_fingerprint": self.fingerprint,
            "data_fingerprint": self._data_fingerprint(),
            "settings": self.settings.to_dict(),
            "summary": self.summary,
            "warnings": list(self.warnings),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        _replace(folder / "ledger.jsonl", ledger)
        _replace(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        for old in folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def _data_fingerprint(self) -> str:
        return hashlib.blake2b(self.digests.cpu().numpy().tobytes(), digest_size=16).hexdigest()

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], settings: Settings | None = None
    ) -> UnlearningMemory:
        """Read a memory; nothing is unpickled.

        Args:
            directory: the folder that `save` wrote.
            settings: needed where the threat or the loss is the user's own class or function.

        Raises:
            MemoryFormatError: missing, truncated, altered or of another format version.
        """
        folder = Path(directory)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise MemoryFormatError(
                f"{folder} holds no readable manifest.json ({error}): give the folder that a "
                "MUterCallback(memory_dir=...) wrote"
            ) from error
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise MemoryFormatError(
                f"format version {version} cannot be read, {FORMAT_VERSION} is expected: use the "
                "lightning-muter release that wrote it, or rebuild the memory"
            )
        try:
            path = folder / manifest["state"]
            if _file_digest(path) != manifest["state_blake2b"]:
                raise MemoryFormatError(f"{path} was truncated or altered: restore a backup")
            tensors = load_file(path)
            lines = (folder / "ledger.jsonl").read_text().splitlines()
            ledger = [json.loads(line) for line in lines[: manifest["ledger_lines"]]]
            saved = manifest["settings"]
            if len(ledger) != manifest["ledger_lines"]:
                raise MemoryFormatError(f"{folder}/ledger.jsonl was truncated: restore a backup")
        except (OSError, KeyError, ValueError) as error:
            raise MemoryFormatError(f"{folder} is damaged ({error}): restore a backup") from error
        tensors["removed"] = tensors["removed"].bool()
        if settings is None:
            settings = Settings.from_dict(saved)
        else:
            settings = settings.trained(saved["weight_decay"], saved["horizon"])
            _check_settings(settings, saved)
        return cls(
            settings=settings,
            key=bytes.fromhex(manifest["key"]),
            fingerprint=manifest["model_fingerprint"],
            summary=manifest["summary"],
            ledger=tuple(ledger),
            warnings=tuple(manifest.get("warnings", ())),
            **{key: tensors[key] for key in _TENSORS},
        )


def _check_settings(settings: Settings, saved: dict[str, Any]) -> None:
    given = json.loads(json.dumps(settings.to_dict()))
    different = {k: (saved[k], given[k]) for k in saved if saved[k] != given.get(k)}
    different.pop("solver", None)
    if different:
        raise ConfigurationError(
            f"the callback is not the one that built the memory: {different} (memory, callback); "
            "use the memory's settings, or rebuild it"
        )


def _file_digest(path: Path) -> str:
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".new")
    temporary.write_text(text)
    os.replace(temporary, path)
