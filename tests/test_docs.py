"""The documentation: its code runs, its names are all there, its notebook explains its numbers."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import lightning_muter

DOCS = Path(__file__).parent.parent / "docs"
#: before a block that the tests leave out: it is of a part that is not there yet
UNCHECKED = "<!-- unchecked -->"


def blocks(page: Path) -> list[str]:
    """The Python of a page, without what is marked as unchecked."""
    parts = page.read_text().split("\n```python\n")
    found = []
    for before, part in zip(parts, parts[1:], strict=False):
        if not before.rstrip().endswith(UNCHECKED):
            found.append(part.partition("\n```")[0])
    return found


PAGES = [
    page.relative_to(DOCS).as_posix()
    for page in [*DOCS.glob("howto/*.md"), *DOCS.glob("api/*.md"), DOCS / "extending.md"]
    if blocks(page) and page.name != "index.md"
]


@pytest.fixture
def _methods_as_they_were() -> Iterator[None]:
    kept = dict(lightning_muter.METHODS)
    yield
    lightning_muter.METHODS.clear()
    lightning_muter.METHODS.update(kept)


@pytest.mark.slow
@pytest.mark.usefixtures("_methods_as_they_were")
@pytest.mark.filterwarnings(
    "ignore:.*sys.argv.*", "ignore:.*srun.*", "ignore:the memory is of a model that was trained"
)
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["python"])
    namespace: dict[str, Any] = {"__name__": "docs"}
    for code in [*blocks(DOCS / "api" / "index.md"), *blocks(DOCS / page)]:
        exec(compile(code, page, "exec", dont_inherit=True), namespace)


def test_code_within_a_list_is_indented_as_the_site_needs_it() -> None:
    for page in DOCS.rglob("*.md"):
        assert not re.search(r"^ {1,3}```", page.read_text(), re.M), f"{page.name}: four spaces"


def test_links_of_the_pages_outside_the_site_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        text = (DOCS.parent / page).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (DOCS.parent / target).exists(), f"{page}: {target}"


@pytest.fixture
def _benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS.parent / "benchmarks"))


@pytest.mark.usefixtures("_benchmarks_can_be_imported")
def test_every_picture_of_a_claim_is_drawn_by_the_script_and_said_in_words() -> None:
    drawn = set(importlib.import_module("pictures").PICTURES)
    shown = set()
    for page in DOCS.glob("*.md"):
        for words, name in re.findall(
            r"!\[([^]]*)\]\(results/pictures/(\w+)\.png\)", page.read_text()
        ):
            assert len(words) > 40, f"{page.name}: {name} has no words for who cannot see it"
            assert (DOCS / "results" / "pictures" / f"{name}.png").stat().st_size < 60_000
            assert f"`python benchmarks/pictures.py {name}`" in page.read_text()
            shown.add(name)
    assert shown == drawn


@pytest.mark.usefixtures("_benchmarks_can_be_imported")
def test_the_table_of_reproduced_records_is_of_its_file() -> None:
    reproduce = importlib.import_module("reproduce")
    page = (DOCS / "results.md").read_text()
    assert "| record | removed |" in page
    assert reproduce.with_table(page, reproduce.kept()) == page
    assert reproduce.with_table(page, {}) != page


def test_every_public_name_has_an_entry_with_an_example_that_runs() -> None:
    pages = {page: page.read_text() for page in (DOCS / "api").glob("*.md")}
    for name in lightning_muter.__all__:
        (page,) = [page for page, text in pages.items() if f"::: lightning_muter.{name}\n" in text]
        documented = getattr(lightning_muter, name).__doc__ or ""
        example = ">>>" in documented or re.search(rf"\b{name}\b", "\n".join(blocks(page)))
        assert example, f"{name} has no example in its docstring or in {page.name}"


@pytest.mark.slow
def test_the_notebook_says_what_it_prints(tmp_path: Path) -> None:
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the client's own event loop
        client.execute()
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", [])]
    printed = "\n".join(one.get("text", "") for one in outputs)
    for line in (
        "; Stage I will take",
        "Kept: ",
        "Trust: nothing speaks against it",
        "A request: ",
    ):
        assert line in printed
    assert "forgot 20 points (muter): converged" in printed
    relative = re.search(r"muter +[\d.]+ +([\d.]+)", printed)
    assert relative is not None and float(relative[1]) < 0.8
    summary = set(re.findall(r"^(\w+) +[-\d.e]+$", printed, re.M)) - {"none", "muter"}
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert {"n", "p", "retrace_error"} < summary
    for name in summary:
        assert f"`{name}`" in prose, f"{name} is printed and not explained"
    assert not [one for one in outputs if one.get("name") == "stderr" and "Warning" in one.text]
