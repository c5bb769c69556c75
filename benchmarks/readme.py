"""Writes the measured tables into README.md, from the committed results and nothing else."""

import argparse
import json
import re

from benchmarks.measure import RESULTS, ROOT
from benchmarks.tables import SUITES

README = ROOT / "README.md"


def rendered(text: str) -> str:
    """The README's text with its tables as the committed results say.

    Raises:
      ValueError: there are results without a place in the text.
    """
    for suite, tables in SUITES.items():
        for path in sorted(RESULTS.glob(f"*/{suite}.json")):
            name = f"{suite} {path.parent.name}"
            block = re.compile(f"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
            place = block.search(text)
            if not place:
                raise ValueError(f"README.md has no place for {path}: add <!-- {name} --> marks")
            filled = f"{place[1]}\n{tables(json.loads(path.read_text()))}\n\n{place[2]}"
            text = text[: place.start()] + filled + text[place.end() :]
    return text


def main(argv: list[str]) -> int:
    """Runs; see `--help`."""
    argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__).parse_args(
        argv
    )
    README.write_text(rendered(README.read_text()))
    return 0
