"""Every recipe runs as a program, and prints the expected last lines."""

import ast
import importlib.util
import os
import re
import subprocess
import sys

import pytest
from support import ROOT, imported_packages

pytestmark = pytest.mark.slow

RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.py"))
# A number below 1e-5, or 0.
SMALL = r"\d(\.\d+)?e-(0[6-9]|[1-9]\d)|0e\+00"
# Patterns of the last lines that each recipe prints.
LAST_LINES = {
    "accumulation": rf"64 calls, 16 steps\nthe largest difference to .* whole batches: ({SMALL})",
    "eight_devices": r"8 devices; each holds 128 of 1024\nloss (\d\.\d+), on one device \1",
    "equinox_average": r"of the last weights: 0\.00\d+\n.*average: 0\.00\d+\n0.5 \* 0.5 = 0\.2\d",
    "fine_tuning": r"to 0\.00\d+\n.*averaged weights 0\.00\d+\n59 steps, 1 skipped\nfloat32.*",
    "flax_nnx": r"learning rate 0\.\d+\nheld-out loss: 0\.0\d+\n.* has the same weights: True",
    "from_optax": rf"200\nthe .* 100 more steps: ({SMALL})\nwith .*: from_optax refuses it",
    "keras_and_back": rf"the largest difference of a weight: ({SMALL})",
    "optax_chain": r"w = \[ ?1\. +-2\. +3\. ?\], b = 0\.50 .*\nadamjax around .* 200 steps",
    "other_devices": rf"devices of the table: 8 2\nthe largest difference of a weight: ({SMALL})",
    "torch_and_back": rf"the largest difference of a weight: ({SMALL})",
    "torch_sparse_adam": rf"the largest difference of a weight after 50 steps: ({SMALL})",
}


def missing_packages(recipe):
    """The packages that a recipe imports and that are not installed here."""
    packages = sorted(imported_packages(recipe.read_text()))
    return [name for name in packages if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_a_recipe_runs_and_prints_its_last_lines(recipe, tmp_path):
    if missing_packages(recipe):
        pytest.skip(f"needs {', '.join(missing_packages(recipe))}")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("XLA_FLAGS", None)  # a recipe sets the flags that it needs
    done = subprocess.run(
        [sys.executable, str(recipe)], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(LAST_LINES[recipe.stem] + r"\n\Z", done.stdout), done.stdout
    assert not any(tmp_path.iterdir())  # it leaves no files


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_a_recipe_is_short_and_says_how_to_run_it(recipe):
    text = recipe.read_text()
    assert 30 <= len(text.splitlines()) <= 70
    docstring = ast.get_docstring(ast.parse(text))
    assert f"python docs/recipes/{recipe.name}" in docstring
    optional = {"equinox", "flax", "keras", "optax", "orbax", "torch"}
    needed = {name for name in optional if re.search(rf"Needs .*\b{name}\b", docstring)}
    assert imported_packages(text) & optional == needed
