"""The house's rules: dependencies point down, nothing is circular, an import loads little."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_muter

ROOT = Path(lightning_muter.__file__).parent
#: from the ground up; a folder or module imports from its own floor and those before it
FLOORS = [
    ["errors"],
    ["arguments", "options"],
    ["linalg", "parallel", "identity", "display"],
    ["threats", "objectives"],
    ["responses", "adversary"],
    ["curvature"],
    ["models"],
    ["spec", "memory", "unlearning"],
    ["lightning"],
    ["evaluation"],
]
#: `memory` and `spec` name methods and problems that `unlearning` defines; the CLI runs evaluations
UPWARD = {("lightning.cli", "evaluation")}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def own(tree: ast.AST, known: set[str]) -> set[str]:
    """The package's modules that a module imports."""
    names = {name.removeprefix("lightning_muter.") for name in imports(tree)}
    packages = {name.removesuffix(".__init__") for name in known}
    return {name for name in names if name in packages}


def floor(name: str) -> int:
    top = name.split(".")[0]
    return next(k for k, floor in enumerate(FLOORS) if top in floor)


def test_dependencies_point_down() -> None:
    trees = modules()
    for name, tree in trees.items():
        if name in ("__init__", "__main__"):
            continue
        for other in own(tree, set(trees)):
            if (name, other.split(".")[0]) not in UPWARD:
                assert floor(other) <= floor(name), f"{name} imports {other}"


def test_no_module_imports_itself_through_others() -> None:
    trees = modules()
    graph = {
        name.removesuffix(".__init__"): own(tree, set(trees)) - {name.removesuffix(".__init__")}
        for name, tree in trees.items()
        if name not in ("__init__", "__main__")
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_outermost_floors_know_lightning() -> None:
    for name, tree in modules().items():
        known = any(
            other.split(".")[0] in ("pytorch_lightning", "lightning") for other in imports(tree)
        )
        if known:
            assert name.split(".")[0] in ("lightning", "evaluation"), name


def test_no_import_of_ours_inside_a_function() -> None:
    for name, tree in modules().items():
        if name == "__init__":  # the command line is loaded when it is asked for
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = {other for other in imports(node) if other.startswith("lightning_muter")}
                assert not inner, f"{name}.{node.name} imports {inner} inside"


def test_importing_the_package_loads_neither_command_line_nor_evaluation() -> None:
    code = (
        "import sys, lightning_muter; "
        "print([m for m in sys.modules if m.startswith(('lightning_muter.evaluation', "
        "'lightning_muter.lightning.cli'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in lightning_muter.__all__:
        assert getattr(lightning_muter, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightning_muter.nothing  # type: ignore[attr-defined]
