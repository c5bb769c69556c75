"""The API reference is made from docstrings: every public name has one, with an example."""

import doctest
import html
import inspect
import re
import subprocess
import sys

import pytest
from support import ROOT

import adamjax
import adamjax.testing


@pytest.mark.parametrize("name", adamjax.__all__)
def test_every_public_name_has_a_docstring_with_an_example(name):
    # pytest runs the examples (`--doctest-modules` in pyproject.toml).
    doc = inspect.getdoc(getattr(adamjax, name))
    assert doctest.DocTestParser().get_examples(doc), f"{name} shows no example"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the pages and the reference, built as `make docs` builds them."""
    for package in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q"]
    done = subprocess.run(
        [*command, "-b", "html", str(ROOT / "docs"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_public_name_is_in_the_reference_once(built):
    text = "".join(page.read_text() for page in sorted((built / "reference").glob("*.html")))
    ids = re.findall(r'id="(?:module-)?(adamjax\.[\w.]+)"', text)
    assert len(ids) == len(set(ids))
    names = {f"adamjax.{name}" for name in adamjax.__all__}
    modules = (adamjax.convert, adamjax.extend, adamjax.layout, adamjax.states, adamjax.testing)
    for module in modules:
        # A name that the package exports too is described as a name of the package.
        own = set(module.__all__) - set(adamjax.__all__)
        names |= {f"{module.__name__}.{name}" for name in own}
    assert not names - set(ids)


def text_of(page):
    """The text of a page of the reference."""
    shown = re.sub(r"<[^>]+>", "", page.read_text())
    return " ".join(html.unescape(shown).replace("\u2019", "'").split())


def test_the_reference_shows_defaults_and_no_internals(built):
    text = text_of(built / "reference" / "optimizers.html").replace(" ", "")
    assert re.search(r"\badam\(learning_rate=0.001,b1=0.9,b2=0.999", text)
    assert "resolve_masks" not in "".join(x.read_text() for x in built.rglob("*.html"))


def test_the_reference_shows_the_methods_and_ranges_of_rules(built):
    page = built / "reference" / "extend.html"
    for name in ("step", "coast", "momentum_coefficient", "with_wide_slots"):
        assert f'id="adamjax.extend.Rule.{name}"' in page.read_text()
    text = text_of(page)
    for name in ("BETA", "UNIT", "NON_NEGATIVE"):
        interval = getattr(adamjax.extend, name).text
        assert f"{name}¶ {interval[0].upper()}{interval[1:]}." in text
    assert "momentum_coefficient * m / (x + eps)" in text


def test_the_reference_shows_the_laws_with_their_sentences(built):
    text = text_of(built / "reference" / "testing.html")
    for name, sentence in adamjax.testing.LAWS.items():
        assert f"{name}: {sentence.replace('`', '')}" in text


def test_pages_link_to_the_reference_and_can_be_searched(built):
    page = (built / "getting-started.html").read_text()
    assert 'href="reference/steps.html#adamjax.apply_updates"' in page
    # On that page, `from_config` is a function of Keras.
    coming_from = (built / "coming-from.html").read_text()
    assert 'href="reference/configs.html#adamjax.from_config"' not in coming_from
    index = (built / "searchindex.js").read_text()
    assert "skip_not_finite" in index
    front = (built / "index.html").read_text()
    assert 'href="tables.html"' in front
    assert "reference/index.html" in front
