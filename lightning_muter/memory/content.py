"""The fields of a memory as its folder holds them, and back: tensors, requests, and JSON."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.removed import RemovedPoints
from lightning_muter.memory import blocks as point_blocks
from lightning_muter.memory.kept_curvature import kept_curvature
from lightning_muter.memory.kept_model import CURRENT
from lightning_muter.memory.rebase_policy import RebasePolicy
from lightning_muter.memory.records import Content, Request
from lightning_muter.memory.start import Start
from lightning_muter.spec import Settings, agreed

__all__ = ["content_of", "fields_of", "new_requests"]

#: ω^u without a publication's noise, among the tensors of the last request
_PRIVATE = "private_omega"


def content_of(fields: Mapping[str, Any]) -> Content:
    """All of a memory's fields, with the forgotten points' factors gone into the matrix."""
    start, curvature, n = fields["start"], fields["curvature"], len(fields["removed"])
    base = {
        name: fields[name]
        for name in ("omega_star", "residual_gradient", "digests", "weights", "ids", "blocks")
        if fields[name] is not None
    }
    if curvature is not None:
        base |= curvature.kept()
    if start is not None:
        base |= start.tensors()
    facts = {
        "ids_key": fields["ids_key"].hex(),
        "rebase": fields["rebase_policy"].to_dict(),
        "settings": fields["settings"].to_dict(),
        "flow": None if start is None else start.flow.to_dict(),
        "fingerprint": fields["fingerprint"],
        "summary": fields["summary"],
        "warnings": list(fields["warnings"]),
        "parameters": [[name, list(shape)] for name, shape in fields["parameters"]],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    requests = [Request(entry, [], {}) for entry in fields["ledger"]]
    return Content(
        base=base,
        current={name: fields[name] for name in CURRENT},
        requests=tuple(_with_private(requests, fields["private"])),
        facts=facts,
        key=fields["key"],
        sizes={"p": len(fields["omega_star"]), "n": n, "k": point_blocks.count(n)},
        memory_id=fields["memory_id"],
        generation=fields["generation"],
    )


def fields_of(content: Content, settings: Settings | None) -> dict[str, Any]:
    """The inverse of `content_of`, the settings by the callback's own where those are given.

    Raises:
        ConfigurationError: ``settings`` are not those of the memory.
        MemoryFormatError: what was saved are no settings.
    """
    base, facts, requests = content.base, content.facts, content.requests
    own = agreed(facts["settings"], settings)
    removed = torch.zeros(content.sizes["n"], dtype=torch.bool)
    for request in requests:
        removed[request.entry.get("indices", [])] = True
    start = Start.restore(base, facts["flow"])
    return {
        "settings": own,
        "omega_star": base["omega_star"],
        "omega": content.current["omega"],
        "curvature": kept_curvature(content, own, torch.nonzero(removed).flatten().tolist()),
        "gradient": content.current["gradient"],
        "residual_gradient": base["residual_gradient"],
        "digests": base["digests"],
        "removed": removed,
        "weights": base["weights"],
        "key": content.key,
        "fingerprint": facts["fingerprint"],
        "start": start,
        "summary": facts["summary"],
        "ledger": tuple(request.entry for request in requests),
        "warnings": tuple(facts["warnings"]),
        "ids": base.get("ids"),
        "blocks": base.get("blocks"),
        "ids_key": bytes.fromhex(facts["ids_key"]),
        "rebase_policy": RebasePolicy(**facts["rebase"]),
        "parameters": tuple((name, tuple(shape)) for name, shape in facts["parameters"]),
        "memory_id": content.memory_id,
        "generation": content.generation,
        "private": requests[-1].tensors.get(_PRIVATE) if requests else None,
    }


def new_requests(
    ledger: Sequence[dict[str, Any]], pending: Sequence[RemovedPoints], private: Tensor | None
) -> list[Request]:
    """The last lines of a ledger, of requests that are not written yet.

    Args:
        ledger: of all requests.
        pending: what each of the new ones took out of the curvature.
        private: ω^u (p,) before a publication's noise.
    """
    requests = [
        Request(entry, [removed.facts()], removed.tensors())
        for entry, removed in zip(ledger[len(ledger) - len(pending) :], pending, strict=True)
    ]
    return _with_private(requests, private)


def _with_private(requests: list[Request], private: Tensor | None) -> list[Request]:
    """ω^u as it was before a publication's noise, with the last of the requests."""
    if private is None:
        return requests
    return [
        *requests[:-1],
        *(replace(one, tensors={**one.tensors, _PRIVATE: private}) for one in requests[-1:]),
    ]
