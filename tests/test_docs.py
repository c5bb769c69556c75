"""The map of the code, docs/house.md, compared with the files and their imports."""

import ast
import re
from pathlib import Path

import pytest
from support import ROOT

HOUSE = ROOT / "docs" / "house.md"


def syntax_trees(package):
    """The syntax trees of a package's modules, by their paths in the repository."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def mapped_files(package):
    """The map's files of a package, in its order, with the description beside each."""
    rows = re.findall(rf"^\| `({package}/[^`]+)` \| (.*) \|$", HOUSE.read_text(), re.M)
    assert rows
    return dict(rows)


@pytest.mark.parametrize("package", ["adamjax", "benchmarks"])
def test_the_map_has_every_file_with_its_first_line(package):
    first_lines = {
        path: ast.get_docstring(tree).split("\n")[0] for path, tree in syntax_trees(package).items()
    }
    assert mapped_files(package) == first_lines


def imported_modules(tree):
    """The modules of adamjax that a module imports, and imported names that may be modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adamjax"):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.slow
def test_files_import_only_those_that_the_map_lists_before_them():
    """So there are no cycles of imports."""
    order = {Path(path): i for i, path in enumerate(mapped_files("adamjax"))}
    # `from adamjax import x` names the package as well, but needs only x.
    package = Path("adamjax/__init__.py")
    for path, tree in syntax_trees("adamjax").items():
        for name in imported_modules(tree):
            base = Path(name.replace(".", "/"))
            for file in (base.with_suffix(".py"), base / "__init__.py"):
                if file in order and file != package:
                    assert order[file] < order[Path(path)], f"{path} imports {file}"
