"""What a person can file of a memory: its identity, its ledger, and what proves it whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.kept_model import BASE, CURRENT
from lightning_muter.memory.records import START, Content, chained
from lightning_muter.unlearning.certificate import COVERED, NOT_COVERED, spent

__all__ = ["evidence"]

#: what a page says of one request, in this order
_REQUEST = (
    "request",
    "kind",
    "time",
    "m",
    "indices",
    "commitment",
    "status",
    "residual",
    "stationary",
    "active",
    "bound",
    "certificate",
    "publication",
    "noise_std",
    "corrector_steps",
    "points",
    "gradient_before",
    "gradient",
    "gradient_of_training",
    "newton_steps",
    "note",
    "warnings",
)


def evidence(store: MemoryStore) -> dict[str, Any]:
    """The report of a memory as plain data, after every byte of the folder was checked.

    Raises:
        MemoryFormatError: anything was altered.
    """
    content = store.read(BASE, CURRENT)
    facts = content.facts
    requests = [_request(entry.entry) for entry in content.requests]
    forgotten = sum(int(entry.get("m", 0)) for entry in requests)
    return {
        "format": "lightning-muter evidence 1",
        "memory": content.memory_id,
        "generation": content.generation,
        "model_file_generation": store.model_generation(),
        "points": content.sizes["n"],
        "parameters": content.sizes["p"],
        "fingerprints": {
            "model": facts["fingerprint"],
            "data": _digest(content.base["digests"].numpy().tobytes()),
            "settings": _digest(json.dumps(facts["settings"], sort_keys=True).encode()),
        },
        "settings": facts["settings"],
        "summary": facts["summary"],
        "warnings": facts["warnings"],
        "versions": facts["versions"],
        "requests": requests,
        "forgotten": forgotten,
        "certified": _certified(content),
        "chain": _chain(content),
    }


def _certified(content: Content) -> dict[str, Any] | None:
    """What all certified publications add up to, and what that does and does not say."""
    total = spent(request.entry for request in content.requests)
    if total is None:
        return None
    return {
        **asdict(total),
        "uncertified": list(total.uncertified),
        "covered": list(COVERED),
        "not_covered": list(NOT_COVERED),
    }


def _request(entry: dict[str, Any]) -> dict[str, Any]:
    known = {name: entry[name] for name in _REQUEST if name in entry}
    return known | {name: value for name, value in entry.items() if name not in known}


def _chain(content: Content) -> list[str]:
    """The chain's link after each request; the last one stands for the whole ledger."""
    return [row.chain.hex() for row in chained(content.requests, START, 0)]


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
