"""Collected where the published packages are; where CI asks for them, missing ones are failures."""

from __future__ import annotations

import importlib.util
import os

PACKAGES = ("lightly", "lightning_uq_box", "torchgeo", "transformers", "timm", "torchvision")

_asked = bool(os.environ.get("LIGHTNING_MUTER_PUBLISHED"))
_there = all(importlib.util.find_spec(name) is not None for name in PACKAGES)
collect_ignore_glob = [] if _asked or _there else ["test_*.py"]
