"""The pages in docs/ against what is there."""

import ast
import re
from pathlib import Path

import pytest
from support import ROOT

HOUSE = ROOT / "docs" / "house.md"


def files(package):
    """The modules of a package, by their paths in the repository."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def listed(package):
    """The files of a package in the map of the house, in its order, with the line beside each."""
    rows = re.findall(rf"^\| `({package}/[^`]+)` \| (.*) \|$", HOUSE.read_text(), re.M)
    assert rows
    return dict(rows)


@pytest.mark.parametrize("package", ["adamjax", "benchmarks"])
def test_the_map_has_every_file_with_its_first_line(package):
    first = {path: ast.get_docstring(tree).split("\n")[0] for path, tree in files(package).items()}
    assert listed(package) == first


def imported(tree):
    """The modules of adamjax that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adamjax"):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.slow
def test_files_import_only_those_above_them():
    """The map goes from the ground up: there is no circle, and nothing imports upward."""
    order = {Path(path): i for i, path in enumerate(listed("adamjax"))}
    for path, tree in files("adamjax").items():
        for module in imported(tree):
            place = Path(module.replace(".", "/"))
            for other in (place.with_suffix(".py"), place / "__init__.py"):
                if other in order and other != Path("adamjax/__init__.py"):
                    assert order[other] < order[Path(path)], f"{path} imports {other}"
