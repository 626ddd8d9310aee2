"""The presets: configs of the callback that ship with the package, named without their path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_muter.errors import ConfigurationError
from lightning_muter.models.names import suggest

__all__ = ["described", "folder", "with_presets"]

_CONFIG = ("-c", "--config")


def folder() -> Path:
    """Where the presets lie: in the installed package, or in callbacks/ of a source tree."""
    package = Path(__file__).parents[1]
    shipped = package / "presets"
    return shipped if shipped.is_dir() else package.parent / "callbacks"


def _presets() -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def described() -> dict[str, str]:
    """What each preset is for: the comment that it begins with.

    Example:
        >>> described()["retrain"]
        'the yardstick: a request trains again, in the process that trained'
    """
    return {
        name: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        for name, path in _presets().items()
    }


def with_presets(words: Sequence[str]) -> list[str]:
    """A command line with each config that is a preset's name replaced by the preset's path.

    Args:
        words: as the shell gives them; ``-c NAME``, ``--config NAME`` and ``--config=NAME`` count.
            A file of that name comes first.

    Raises:
        ConfigurationError: a name that is neither a file nor a preset; with the nearest ones.
    """
    found, config = [], False
    for word in words:
        option, equals, value = word.partition("=")
        if config:
            word = _path(word)
        elif equals and option in _CONFIG:
            word = f"{option}={_path(value)}"
        config = not config and word in _CONFIG
        found.append(word)
    return found


def _path(name: str) -> str:
    """The path of a preset's name; a file, or text that is YAML itself, as it is."""
    presets = _presets()
    if Path(name).is_file() or not name.isidentifier():
        return name
    if name not in presets:
        raise ConfigurationError(
            f"-c {name}: neither a file nor a preset{suggest([name], presets)}; 'lightning-muter "
            "presets' says what each is for"
        )
    return str(presets[name])
