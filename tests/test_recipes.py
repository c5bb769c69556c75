"""Every recipe runs as a program, and prints what it promises."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.py"))
SMALL = r"\d(\.\d+)?e-0[6-9]|0e\+00"
# What each prints last.
PRINTS = {
    "accumulation": rf"64 calls, 16 steps\nthe largest difference to .* whole batches: ({SMALL})",
    "eight_devices": r"8 devices; each holds 128 of 1024\nloss (\d\.\d+), on one device \1",
    "equinox_average": r"of the last weights: 0\.00\d+\n.*average: 0\.00\d+\n0.5 \* 0.5 = 0\.2\d",
    "fine_tuning": r"to 0\.00\d+\n.*averaged weights 0\.00\d+\n59 steps, 1 skipped\nfloat32.*",
    "flax_nnx": r"learning rate 0\.\d+\nheld-out loss: 0\.0\d+\n.* has the same weights: True",
    "from_optax": rf"200\nthe .* 100 more steps: ({SMALL})\nwith .*: from_optax refuses it",
    "keras_and_back": rf"the largest difference of a weight: ({SMALL})",
    "optax_chain": r"w = \[ ?1\. +-2\. +3\. ?\], b = 0\.50 .*\nadamjax around .* 200 steps",
    "torch_and_back": rf"the largest difference of a weight: ({SMALL})",
    "torch_sparse_adam": rf"the largest difference of a weight after 50 steps: ({SMALL})",
}


def missing(recipe):
    """The packages that it imports and that are not installed here."""
    nodes = list(ast.walk(ast.parse(recipe.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return [x for x in {name.split(".")[0] for name in names} if not importlib.util.find_spec(x)]


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_runs(recipe, tmp_path):
    if missing(recipe):
        pytest.skip(f"needs {', '.join(missing(recipe))}")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, str(recipe)], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(PRINTS[recipe.stem] + r"\n\Z", done.stdout), done.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_is_short_and_says_how_to_run_it(recipe):
    text = recipe.read_text()
    assert 30 <= len(text.splitlines()) <= 70
    docstring = ast.get_docstring(ast.parse(text))
    assert f"python docs/recipes/{recipe.name}" in docstring
    others = {"equinox", "flax", "keras", "optax", "orbax", "torch"}
    imported = {x for x in others if re.search(rf"^(import|from) {x}\b", text, re.MULTILINE)}
    assert imported == {x for x in others if re.search(rf"Needs .*\b{x}\b", docstring)}
