"""Writes measured tables and figures into README.md and docs/, from the committed results alone."""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.figures import FIGURES
from benchmarks.measure import RESULTS, ROOT
from benchmarks.tables import SUITES

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))

FIGURE = re.compile(r"(<!-- figure (.+?) -->).*?(<!-- end -->)", re.DOTALL)


def with_tables(texts: Mapping[Path, str]) -> dict[Path, str]:
    """Texts of pages with the tables between their marks as the committed results say.

    Raises:
      ValueError: there are results that no page has a place for, or that two have.
    """
    new = dict(texts)
    for suite, tables in SUITES.items():
        for path in sorted(RESULTS.glob(f"*/{suite}.json")):
            name = f"{suite} {path.parent.name}"
            block = re.compile(f"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
            pages = [page for page, text in new.items() if block.search(text)]
            if len(pages) != 1:
                raise ValueError(
                    f"{path} needs one place in README.md or docs/, found {len(pages)}: write the "
                    f"lines <!-- {name} --> and <!-- end {name} --> where its tables belong"
                )
            filled = f"\n{tables(json.loads(path.read_text()))}\n\n"
            text = new[pages[0]]
            new[pages[0]] = block.sub(lambda m, filled=filled: m[1] + filled + m[2], text)
    return new


def with_figures(text: str) -> str:
    """A text with its figures as the committed results say.

    Raises:
      KeyError: there is no figure of a name.
    """
    return FIGURE.sub(lambda m: m[1] + FIGURES[m[2]]() + m[3], text)


def render(texts: Mapping[Path, str]) -> dict[Path, str]:
    """Texts of pages with their tables and figures as the committed results say."""
    return {page: with_figures(text) for page, text in with_tables(texts).items()}


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__).parse_args(
        argv
    )
    texts = {page: page.read_text() for page in PAGES}
    for page, text in render(texts).items():
        if text != texts[page]:
            page.write_text(text)
            print(page.relative_to(ROOT))
    return 0
