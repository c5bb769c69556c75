"""README.md and docs/: their code, measured numbers, links, and names of tests and commands.

A block of text after a block of Python is its output. Numbers in it may differ by one unit of the
last digit that is shown.
"""

import contextlib
import importlib.util
import io
import os
import re
from typing import NamedTuple

import pytest
from support import ROOT, imported_packages

import adamjax
import adamjax.testing
from benchmarks import readme

TEXTS = {page: page.read_text() for page in readme.PAGES}
NAMES = {page: page.relative_to(ROOT).as_posix() for page in readme.PAGES}
BASE = "https://github.com/adamjax/adamjax/blob/main/"
# Packages that README.md and docs/ may import, and that not every environment of the tests has.
OPTIONAL = ("equinox", "flax", "haiku", "keras", "orbax", "torch")


class Block(NamedTuple):
    """A block of Python, and the text that it prints, if the page shows it."""

    page: str
    line: int
    code: str
    printed: str | None


def blocks():
    fence = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
    for page, text in TEXTS.items():
        for found in fence.finditer(text):
            yield Block(NAMES[page], text.count("\n", 0, found.start()) + 1, *found.groups())


BLOCKS = list(blocks())
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def agrees(found, shown):
    """Whether two texts are the same, up to one unit of the last digit of each shown number."""
    found, shown = " ".join(found.split()), " ".join(shown.split())
    if NUMBER.sub("#", found) != NUMBER.sub("#", shown):
        return False
    for x, y in zip(NUMBER.findall(found), NUMBER.findall(shown), strict=True):
        mantissa, _, exponent = y.partition("e")
        decimals = len(mantissa.partition(".")[2])
        if abs(float(x) - float(y)) > 10.0 ** (int(exponent or 0) - decimals):
            return False
    return True


def test_numbers_agree_up_to_one_unit_of_the_last_digit():
    assert agrees("loss 0.2512\n(3,)", "loss 0.25 (3,)")
    assert agrees("1.2e-07", "1.1e-07")
    assert not agrees("loss 0.27", "loss 0.25")
    assert not agrees("3", "5")
    assert not agrees("w = [1.]", "b = [1.]")


# When JAX reads a variable of Keras, NumPy warns about the variable's `__array__`.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=[f"{b.page}:{b.line}" for b in BLOCKS])
def test_code_prints_the_output_that_is_shown(block, monkeypatch):
    for package in OPTIONAL:
        if package in imported_packages(block.code) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "jax")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.code, block.page, "exec"), {"__name__": "page"})
    if block.printed is None:
        assert not printed.getvalue(), f"the page does not show {printed.getvalue()!r}"
    else:
        assert agrees(printed.getvalue(), block.printed), printed.getvalue()


def test_tables_and_numbers_are_the_committed_results():
    for page, text in readme.render(TEXTS).items():
        assert text == TEXTS[page], f"{NAMES[page]}: run `make readme`"


def test_every_measured_number_is_used():
    used = {found[2] for text in TEXTS.values() for found in readme.NUMBER_MARK.finditer(text)}
    assert used == set(readme.numbers())


def test_marks_of_numbers_are_pairs_within_lines():
    """A mark at the start of a line would end the paragraph, as any comment in Markdown does."""
    for page, text in TEXTS.items():
        assert not re.search(r"^\s*<!-- number ", text, re.M), NAMES[page]
        for line in text.splitlines():
            assert line.count("<!-- number ") == line.count("<!-- end -->"), NAMES[page]


def test_each_result_needs_exactly_one_place_in_the_pages():
    page = next(page for page, text in TEXTS.items() if "<!-- end dense cpu -->" in text)
    without = TEXTS | {page: TEXTS[page].replace("<!-- end dense cpu -->", "")}
    with pytest.raises(ValueError, match=r"cpu/dense\.json needs one place .* found 0"):
        readme.render(without)
    twice = TEXTS | {readme.README: "<!-- dense cpu -->\n<!-- end dense cpu -->\n"}
    with pytest.raises(ValueError, match="found 2"):
        readme.render(twice)


def test_the_front_page_is_short():
    assert len(TEXTS[readme.README].splitlines()) < 200


def hand_written(text):
    """A page without its generated tables."""
    return re.sub(r"(<!-- (\w+ [\w-]+) -->\n).*?<!-- end \2 -->", r"\1", text, flags=re.DOTALL)


def test_pages_are_short():
    for page, text in TEXTS.items():
        assert len(hand_written(text).splitlines()) < 250, NAMES[page]


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_targets_of_links_exist():
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            address, _, anchor = target.partition("#")
            if target.startswith(BASE):
                path = ROOT / address.removeprefix(BASE)
            elif target.startswith("http"):
                continue
            else:
                # PyPI shows README.md too, where a relative link has no target.
                assert page != readme.README, f"README.md has a link that is not a URL: {target}"
                path = page.parent / address if address else page
                assert (ROOT / "docs") in path.resolve().parents, f"{NAMES[page]}: {target}"
            assert path.exists(), f"{NAMES[page]}: {target}"
            if anchor:
                assert anchor in anchors(path.read_text()), f"{NAMES[page]}: {target}"


def test_the_front_page_names_every_public_name():
    names = set(re.findall(r"`(\w+)`", TEXTS[readme.README]))
    assert not set(adamjax.__all__) - names


def test_every_test_that_a_page_names_exists():
    tests = ROOT / "tests"
    # The patterns below must find something.
    decisions = TEXTS[ROOT / "docs" / "decisions.md"]
    assert re.search(r"`test_\w+\.py::\w+`", decisions)
    assert re.search(r"the law `\w+`", decisions)
    for page, text in TEXTS.items():
        for file, function in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", text):
            # A page may name a file alone: then `function` is empty.
            assert f"def {function}" in (tests / file).read_text(), f"{NAMES[page]}: {function}"
        assert set(re.findall(r"the law `(\w+)`", text)) <= set(adamjax.testing.LAWS)


def test_commands_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    suites = {path.stem for path in (ROOT / "benchmarks").iterdir()}
    for page, text in TEXTS.items():
        # A command is after a backtick in prose, and at the start of a line in a block.
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
            assert target in targets, f"{NAMES[page]}: make {target}"
        for suite in re.findall(r"python -m benchmarks ([a-z]\w*)", text):
            assert suite in suites, f"{NAMES[page]}: {suite}"


def test_the_front_page_names_make_test():
    assert "`make test`" in TEXTS[readme.README]
