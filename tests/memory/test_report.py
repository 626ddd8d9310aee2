"""The evidence of a memory, as data and as a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cases import fit

from lightning_muter import MemoryFormatError, RemovalDataModule
from lightning_muter.memory.evidence import evidence
from lightning_muter.memory.folder import MemoryStore
from lightning_muter.memory.kept_model import verified
from lightning_muter.memory.report import html, write_report


def test_what_was_forgotten_when_and_with_which_evidence(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    trainer, _, _, data = fit(memory_dir=str(folder))
    trainer.unlearn(RemovalDataModule(data, [3, 4]), note="letter <of> 1 March", bound=True)
    first = evidence(MemoryStore(folder))
    assert first["forgotten"] == 2 and first["requests"][0]["note"] == "letter <of> 1 March"
    assert first["requests"][0]["indices"] == [3, 4] and first["requests"][0]["bound"] > 0
    trainer.rebase(data)
    known = evidence(MemoryStore(folder))
    assert known["forgotten"] == 2 and "indices" not in known["requests"][0]
    assert [entry.get("kind") for entry in known["requests"]] == [None, "rebase"]
    assert (
        len(known["chain"]) == 2 and known["fingerprints"]["data"] != first["fingerprints"]["data"]
    )
    page, data_file = write_report(known, tmp_path / "report.html")
    assert json.loads(data_file.read_text()) == json.loads(json.dumps(known))
    text = page.read_text()
    assert "letter &lt;of&gt; 1 March" in text and known["requests"][0]["commitment"] in text
    assert not re.search(r"(src|href)=|url\(|<script", text)  # nothing from elsewhere
    assert "2 requests" in verified(MemoryStore(folder))


def test_numbers_that_are_not_finite_stay_readable_json(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    fit(memory_dir=str(folder))
    known = evidence(MemoryStore(folder))
    known["summary"]["residual_gradient"] = float("nan")
    _, data_file = write_report(known, tmp_path / "report.html")
    text = data_file.read_text()
    assert json.loads(text, parse_constant=pytest.fail)["summary"]["residual_gradient"] == "nan"
    assert "Nothing was forgotten yet" in html(known)


def test_an_altered_memory_has_no_report(tmp_path: Path) -> None:
    fit(memory_dir=str(tmp_path))
    (base,) = tmp_path.glob("base-*")
    content = bytearray(base.read_bytes())
    content[-1] ^= 1
    base.write_bytes(bytes(content))
    for check in (evidence, verified):
        with pytest.raises(MemoryFormatError):
            check(MemoryStore(tmp_path))
