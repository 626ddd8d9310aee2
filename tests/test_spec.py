"""Settings on disk: classes and functions by path and fingerprint, never by a bare name."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muter import ConfigurationError, L2Ball, LinfBall, MemoryFormatError, MUterCallback
from lightning_muter.identity import fingerprint_of, import_path
from lightning_muter.spec import Settings


def settings(**changes: Any) -> Settings:
    return MUterCallback(**{"threat": L2Ball(0.5), "head": "classifier", **changes}).settings


def saved(one: Settings) -> dict[str, Any]:
    """As a manifest gives them back."""
    return json.loads(json.dumps(one.to_dict()))  # type: ignore[no-any-return]


def defined(code: str, name: str = "users") -> types.SimpleNamespace:
    """A user's module, as imported under this name."""
    space: dict[str, Any] = {"__name__": name, "F": F, "L2Ball": L2Ball, "torch": torch}
    exec(code, space)
    return types.SimpleNamespace(**space)


LOSS = """
SCALE = 1.0
def helper(z, y):
    return F.cross_entropy(z, y, reduction="none")
def cross_entropy(z, y, weight=2.0):
    return SCALE * weight * helper(z, y)
"""


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"loss": "logistic"},
        {"loss": "squared", "threat": LinfBall(0.1, data_range=(0, float("inf")))},
        {"threat": L2Ball(1, data_range=(-1.0, 2.0), temperature=0.1), "solver": "direct"},
        {"head": None, "parameters": ["a", "b"], "damping": 1e-3, "weight_decay": 1e-2},
    ],
)
def test_the_packages_own_are_rebuilt(own: dict[str, Any]) -> None:
    one = settings(**own)
    assert Settings.from_dict(saved(one)) == one
    assert one.differences(saved(one)) == {}


def test_a_users_function_or_class_of_a_known_name_is_none_of_ours() -> None:
    loss = defined(LOSS).cross_entropy
    ball = defined("class L2Ball(L2Ball):\n    pass").L2Ball
    for one in (settings(loss=loss), settings(threat=ball(0.5))):
        with pytest.raises(ConfigurationError, match="users:.*MUterCallback"):
            Settings.from_dict(saved(one))
        assert one.differences(saved(one)) == {}
        assert settings().differences(saved(one)).keys() <= {"loss", "threat"} != set()
        assert one.differences(saved(settings()))
    with pytest.raises(ConfigurationError, match="MUterCallback"):
        Settings.from_dict(saved(settings(loss=lambda z, y: z.sum(dim=1))))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("weight=2.0", "weight=2.5"),
        ("SCALE = 1.0", "SCALE = 2.0"),
        ("SCALE * weight", "weight * SCALE * 1"),
        ('reduction="none")', 'reduction="none", label_smoothing=0.1)'),
        ("F.cross_entropy", "F.multi_margin_loss"),
    ],
)
def test_changed_code_is_seen(before: str, after: str) -> None:
    old, new = defined(LOSS).cross_entropy, defined(LOSS.replace(before, after)).cross_entropy
    assert fingerprint_of(old) == fingerprint_of(defined("\n\n# a comment\n" + LOSS).cross_entropy)
    assert fingerprint_of(old) != fingerprint_of(new)
    assert settings(loss=new).differences(saved(settings(loss=old))).keys() == {"loss"}


def test_the_same_code_elsewhere_is_another_function() -> None:
    here, there = defined(LOSS).cross_entropy, defined(LOSS, "others").cross_entropy
    assert settings(loss=there).differences(saved(settings(loss=here))).keys() == {"loss"}
    assert import_path(here) == "users:cross_entropy"


CLASS = """
class Base(L2Ball):
    def radius(self):
        return 1.0
class Ball(Base):
    limit = 3
    def project(self, x, delta):
        \"\"\"Words.\"\"\"
        return self.radius() * super().project(x, delta)
"""


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("return 1.0", "return 2.0", False),
        ("limit = 3", "limit = 4", False),
        ("super().project", "2 * super().project", False),
        ("Words.", "Other words.", True),
    ],
)
def test_a_users_threat_by_its_methods_and_bases(before: str, after: str, same: bool) -> None:
    old, new = defined(CLASS).Ball, defined(CLASS.replace(before, after)).Ball
    one, other = settings(threat=old(0.5)), settings(threat=new(0.5))
    assert (other.differences(saved(one)) == {}) is same
    assert settings(threat=old(0.6)).differences(saved(one)).keys() == {"threat"}


class Scaled:
    """A callable object."""

    def __init__(self, scale: float, weights: Tensor | None = None) -> None:
        self.scale, self.weights = scale, weights

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(z, y, reduction="none")

    def method(self, z: Tensor, y: Tensor) -> Tensor:
        return self(z, y)


def _closure(scale: Any) -> Any:
    return lambda z, y: scale * F.cross_entropy(z, y, reduction="none")


@pytest.mark.parametrize(
    "make",
    [
        lambda s: Scaled(s),
        lambda s: Scaled(1.0, torch.tensor([s])),
        lambda s: Scaled(s).method,
        lambda s: _closure(s),
        lambda s: _closure([s, {"more": (s,)}]),
        lambda s: functools.partial(F.cross_entropy, reduction="none", label_smoothing=s / 4),
        lambda s: nn.CrossEntropyLoss(reduction="none", label_smoothing=s / 4),
        lambda s: nn.CrossEntropyLoss(reduction="none", weight=torch.tensor([s, 1.0])),
    ],
)
def test_objects_partials_and_closures_by_their_state(make: Any) -> None:
    one = settings(loss=make(1.0))
    assert settings(loss=make(1.0)).differences(saved(one)) == {}
    assert settings(loss=make(2.0)).differences(saved(one)).keys() == {"loss"}


@pytest.mark.slow
def test_a_fingerprint_is_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(
        "import torch.nn.functional as F\nfrom lightning_muter import L2Ball\n"
        + LOSS
        + CLASS
        + "KNOWN = {'a', 'b', 'c'}\ndef known(z, y):\n    return z if y in {'u', 'v'} else KNOWN\n"
    )
    code = "import users as u; from lightning_muter.identity import fingerprint_of as f; "
    code += "print(f(u.cross_entropy), f(u.Ball), f(u.known))"
    found = set()
    for seed in ("1", "2"):
        path = os.pathsep.join([str(tmp_path), *sys.path])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert run.returncode == 0, run.stderr
        found.add(run.stdout)
    assert len(found) == 1


def test_nothing_is_imported_because_a_file_says_so(tmp_path: Path) -> None:
    data = saved(settings())
    data["threat"] = {"path": "antigravity:fly", "fingerprint": "0", "python": "3", "fields": {}}
    with pytest.raises(ConfigurationError, match="antigravity"):
        Settings.from_dict(data)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("own", ["Threat", "__init__", None, 3, ["L2Ball"], "users:L2Ball"])
def test_names_that_are_none(own: Any) -> None:
    data = saved(settings())
    for field in ("threat", "loss"):
        with pytest.raises(MemoryFormatError):
            Settings.from_dict({**data, field: {**data[field], "own": own}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_damping_and_decay_are_finite(value: float) -> None:
    for name in ("damping", "weight_decay"):
        with pytest.raises(ConfigurationError, match=name):
            settings(**{name: value})


@pytest.mark.parametrize(
    ("setting", "reads", "other"),
    [
        ("{'w': 2.0}", "G['w']", "{'w': 3.0}"),
        ("types.SimpleNamespace(w=2.0, log=[])", "G.w", "types.SimpleNamespace(w=3.0, log=[])"),
        ("Config(Config(2.0))", "G.w.w", "Config(Config(3.0))"),
        ("Slotted(2.0)", "G.w", "Slotted(3.0)"),
        ("np.array([2.0])", "float(G[0])", "np.array([3.0])"),
        ("Kind.A", "float(G.value)", "Kind.B"),
    ],
)
def test_what_a_function_reads_of_a_global_object_is_part_of_it(
    setting: str, reads: str, other: str
) -> None:
    text = (
        "import enum, types\nimport numpy as np\nimport torch.nn.functional as F\n"
        "class Config:\n    def __init__(self, w):\n        self.w, self.me = w, self\n"
        "class Slotted:\n    __slots__ = ('w',)\n    def __init__(self, w):\n        self.w = w\n"
        "class Kind(enum.Enum):\n    A = 2\n    B = 3\n"
        f"G = {setting}\n"
        f"def loss(z, y):\n    return {reads} * F.cross_entropy(z, y, reduction='none')\n"
    )
    old, same = defined(text), defined(text)
    new = defined(text.replace(f"G = {setting}", f"G = {other}"))
    assert fingerprint_of(old.loss) == fingerprint_of(same.loss)
    assert fingerprint_of(old.loss) != fingerprint_of(new.loss)
    if hasattr(old.G, "log"):  # which the function does not read
        old.G.log.append("a line")
        assert fingerprint_of(old.loss) == fingerprint_of(same.loss)
