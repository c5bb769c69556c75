"""The API reference is made from docstrings: every public name has one, with an example."""

import doctest
import inspect
import subprocess
import sys

import pytest

import adamjax


@pytest.mark.parametrize("name", adamjax.__all__)
def test_every_public_name_has_a_docstring_with_an_example(name):
    # `--doctest-modules` runs them.
    doc = inspect.getdoc(getattr(adamjax, name))
    assert doctest.DocTestParser().get_examples(doc), f"{name} shows no example"


def test_the_reference_is_built_without_warnings(tmp_path):
    pytest.importorskip("pdoc")
    command = [sys.executable, "-W", "error", "-m", "pdoc", "--docformat", "google"]
    done = subprocess.run(
        [*command, "adamjax", "-o", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    page = (tmp_path / "adamjax.html").read_text()
    missing = [name for name in adamjax.__all__ if f'id="{name}"' not in page]
    missing = [name for name in missing if not (tmp_path / "adamjax" / f"{name}.html").exists()]
    assert not missing
