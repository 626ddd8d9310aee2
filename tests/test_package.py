"""What is shipped: the contents of wheel and sdist, and the wheel as a stranger uses it."""

from __future__ import annotations

import email
import email.message
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lightning_muter

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist, and the wheel that is built from it."""
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(output), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as content:
        (name,) = (one for one in content.namelist() if one.endswith("METADATA"))
        return email.message_from_bytes(content.read(name))


def needed(about: email.message.Message) -> list[str]:
    """What a plain install brings."""
    return [one for one in about.get_all("Requires-Dist") or [] if "extra ==" not in one]


def test_the_wheel_holds_the_package_its_presets_and_nothing_else(
    built: tuple[Path, Path],
) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        for preset in (ROOT / "callbacks").glob("*.yaml"):
            assert wheel.read(f"lightning_muter/presets/{preset.name}") == preset.read_bytes()
    about = metadata(built[1])
    assert about["Version"] == lightning_muter.__version__
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lightning_muter").rglob("*")
        if path.suffix in (".py", ".html", ".typed")
    }
    assert source <= names and "lightning_muter/py.typed" in source
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_muter"}
    assert not [one for one in needed(about) if one.startswith(("torchattacks", "torchvision"))]


def test_the_sdist_holds_what_the_tests_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    some = ["setup.py", "pyproject.toml", "callbacks/muter_l2.yaml", "examples/quickstart.py"]
    some += ["tests/test_package.py", "docs/theory.md", "CITATION.cff", "SECURITY.md"]
    assert set(some) <= names


def test_a_stranger_in_an_empty_folder(built: tuple[Path, Path], tmp_path: Path) -> None:
    target, folder = tmp_path / "installed", tmp_path / "empty"
    folder.mkdir()
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(built[1])]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "stranger.py")],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(target),
            "LIGHTNING_MUTER_PACKAGE": "pytorch_lightning",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"with {target}" in done.stdout


def test_the_lower_ends_are_those_that_are_tested(built: tuple[Path, Path]) -> None:
    pinned = [
        line.replace("==", ">=").removesuffix(".0")
        for line in (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    bounded = [one for one in needed(metadata(built[1])) if ">=" in one]
    assert sorted(bounded) == sorted(pinned)
    table = (ROOT / "docs" / "compatibility.md").read_text()
    for one in bounded:
        name, _, version = one.partition(">=")
        assert f"| {name.partition('[')[0]} | {version} |" in table, one
