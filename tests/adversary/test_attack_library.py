"""torchattacks is optional: without it the error names the extra that brings it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from lightning_muter import Attack, ConfigurationError
from lightning_muter.adversary import attack_library


def test_a_library_that_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)

    def absent(name: str) -> Any:
        return None

    monkeypatch.setattr(attack_library, "find_spec", absent)
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning-muter\[attacks\]'"):
        Attack("torchattacks.PGD")
    with pytest.raises(ConfigurationError, match="cannot be imported"):
        Attack("no_such_library.PGD")
