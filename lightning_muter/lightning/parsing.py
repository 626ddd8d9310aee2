"""Parsers whose errors are one paragraph, where jsonargparse prints a screen of usage."""

from __future__ import annotations

import importlib
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentParser

from lightning_muter.lightning.flavour import NAME, VARIABLE, pl

__all__ = ["CommandParser", "MUterParser", "paragraph"]

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningArgumentParser
else:
    LightningArgumentParser = importlib.import_module(f"{pl.__name__}.cli").LightningArgumentParser

#: what says of a value only that it is of none of an argument's types, and what comes with it
_GENERAL = re.compile(
    r"^(Does not validate|Subtypes:|Errors:|Not a valid subclass|Subclass types expect|"
    r"a class path|a dict with|Expected a <class 'NoneType'>|Given value|Problem with given)"
)
_KEY = re.compile(r'^(Validation failed: )?(Parser key|Problem with|Key) "?(?P<key>[\w.+]+)"?:?\s*')
#: how releases of jsonargparse before 4.40 say that an argument is missing
_MISSING = re.compile(r'(Validation failed: )?Key "(?P<key>[\w.]+)" is required but not[^\n]*')
#: what a class of the other one of Lightning's packages is told
_OTHER = re.compile(r"not correspond to a subclass of .*Lightning(Data)?Module")
_LENGTH = 600


class _OneParagraph:
    """`error` in one paragraph; of any parser of jsonargparse."""

    prog: str
    exit_on_error: bool

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]
        name = self.prog.replace(" [options]", "")
        sys.stderr.write(f"{name}: {paragraph(message)} ({name} --help lists all options)\n")
        sys.exit(2)


class CommandParser(_OneParagraph, ArgumentParser):
    """``ArgumentParser`` of jsonargparse with short errors."""


class MUterParser(_OneParagraph, LightningArgumentParser):
    """``LightningArgumentParser`` with short errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.exit_on_error and _OTHER.search(message):
            message = (
                f"{paragraph(message)}; lightning_muter was loaded with {NAME!r}: set {VARIABLE} "
                "to the one of Lightning's two packages that the class is of"
            )
        super().error(message, ex)


def paragraph(message: Any) -> str:
    """The part of a parser's error that says what is wrong, in one paragraph.

    Example:
        >>> paragraph('''Parser key "indices":
        ...   Does not validate against any of the Union subtypes
        ...   Subtypes: [list[int], <class 'int'>]
        ...   Errors:
        ...     - Expected a <class 'list'>
        ...     - Expected a <class 'int'>
        ...   Given value type: <class 'str'>
        ...   Given value: x''')
        "indices: 'x' is given; Expected a list; Expected an int"
    """
    text = _MISSING.sub(r"the following arguments are required: \g<key>", str(message))
    key = _KEY.match(text)
    lines = [line.strip().removeprefix("- ").strip() for line in _KEY.sub("", text).splitlines()]
    said = [line for line in lines if line and not _GENERAL.match(line)]
    typed = bool(said) and all(line.startswith("Expected a <class") for line in said)
    value = next((x.partition(": ")[2] for x in lines if x.startswith("Given value: ")), "")
    if typed:
        said = [re.sub(r"a <class '(\w+)'>", _article, line) for line in said]
        said.insert(0, f"{value!r} is given")
    found = "; ".join(dict.fromkeys(said)) or " ".join(text.split())
    if len(found) > _LENGTH:
        found = f"{found[:_LENGTH]} …"
    return f"{key['key']}: {found}" if key else found


def _article(match: re.Match[str]) -> str:
    return f"{'an' if match[1][0] in 'aeiou' else 'a'} {match[1]}"
