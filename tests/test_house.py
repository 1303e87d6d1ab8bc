"""The shape of the source: imports go one way, and no function is longer than a screen."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (".", "engine", "benchmarks", "lab")
    for path in sorted((ROOT / folder).glob("*.py"))
}
# What a file of each place may import, of the project's own. engine/ is what the others stand on; its files that
# measure and write down know the four roles.
MAY = {
    "data": set(),
    "config": {"data"},
    "engine": {"data", "config", "engine", "model", "rubric"},
    "model": {"data", "config", "engine"},
    "rubric": {"data", "config", "engine", "model"},
    "pop": {"data", "config", "engine", "model", "rubric", "lab"},  # lab: the plan, and the report at a run's end
    "benchmarks": {"data", "config", "engine", "model", "rubric", "pop", "benchmarks"},
    "eval": {"data", "config", "engine", "model", "rubric", "pop", "benchmarks"},
    "lab": {"data", "config", "engine", "model", "rubric", "pop", "benchmarks", "eval", "lab"},
}


def imports(tree: ast.AST) -> set[str]:
    """The project's own modules that are imported anywhere in a tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(FILES)


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
GRAPH = {name: imports(tree) for name, tree in TREES.items()}


def test_imports_have_no_circle():
    assert len(list(graphlib.TopologicalSorter(GRAPH).static_order())) == len(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_stands_below_it(name):
    assert {other.split(".")[0] for other in GRAPH[name]} <= MAY[name.split(".")[0]]


@pytest.mark.parametrize("name", FILES)
def test_the_projects_own_modules_are_imported_at_the_top(name):
    """Not inside a function, nor for type checkers alone: both only hide a circle."""
    inner = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef | ast.If)]
    assert [imports(node) for node in inner if imports(node)] == []


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_longer_than_a_screen(name):
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60}
    assert {f: lines for f, lines in long.items() if not f.startswith("parse")} == {}  # tables of arguments may be


def test_the_readme_says_how_long_the_files_to_read_are():
    said = dict(re.findall(r"`(\w+\.py)` \((\d+)[ :]", (ROOT / "README.md").read_text(encoding="utf-8")))
    scripts = ("pop.py", "rubric.py", "model.py", "data.py", "config.py", "eval.py")
    assert said == {name: str(len((ROOT / name).read_text(encoding="utf-8").splitlines())) for name in scripts}
