"""Writes measured tables and numbers into README.md and docs/, from the committed results alone.

A number stands in a sentence, between `<!-- number NAME -->` and `<!-- end -->`.
"""

import argparse
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.measure import RESULTS, ROOT
from benchmarks.tables import SUITES, Results, main_rows, span, two_digits

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))

NUMBER_MARK = re.compile(r"(<!-- number (.+?) -->).*?(<!-- end -->)", re.DOTALL)


# --- numbers --------------------------------------------------------------------------------------


@functools.cache
def results(suite: str) -> Results:
    """The committed results of a suite on a CPU."""
    return json.loads((RESULTS / "cpu" / f"{suite}.json").read_text())


def times_over_exact(contender: str) -> list[float]:
    """A contender's time divided by that of `exact`, in each main case of the rows suite."""
    rows = main_rows(results("rows"))
    # The results have the time of `exact` divided by that of the contender.
    return [1 / row["ratio"]["exact"][contender]["median"] for row in rows]


def dense_times_over(rival: str, chain: str, workloads: str = "") -> list[float]:
    """adamjax's time divided by a rival's, in workloads of the dense suite with this chain.

    Args:
      workloads: a pattern that selects workloads by their names.
    """
    return [
        row["ratio"][rival]["median"]
        for row in results("dense")["times"]
        if row["chain"] == chain and re.search(workloads, row["workload"])
    ]


def worst_slowdown_of_exact() -> float:
    """The largest ratio of `exact`'s time to that of dense gradients in optax, 1 at least."""
    rows = results("rows")["times"]
    ratios = [r["ratio"]["exact"]["optax"]["median"] for r in rows if "exact" in r["ratio"]]
    return max([1.0, *ratios])


def soak_error(contender: str) -> str:
    """The mean difference of a weight from its value in float64, after the soak's last step."""
    return f"{results('soak')['cases']['Adam']['weights'][contender]['mean'][-1]:.1e}"


def model_ratio(model: str, contender: str) -> float:
    """A contender's time for a model's train step, divided by the time with `exact_rows`."""
    rows = {row["model"]: row["ratio"] for row in results("models")["steps"]}
    return float(rows[model][contender]["median"])


def seconds_to_compile(model: str) -> str:
    """The time to compile a model's train step with `exact_rows`."""
    rows = results("models")["programs"]
    seconds = {(row["model"], row["contender"]): row["s"]["compile"]["median"] for row in rows}
    return two_digits(seconds[model, "exact"])


def temporaries(mode: str) -> str:
    """The temporaries of a train step on a table, in MB."""
    by_mode = {row["mode"]: row["temporary_bytes"] for row in results("memory")["tables"]}
    return f"{by_mode[mode] / 1e6:.0f}"


def training_number(mode: str, name: str) -> float:
    """A number of the training job with `--rows MODE`; if it is a spread, its median."""
    number = results("train")["rows"][mode][name]
    return float(number["median"] if isinstance(number, dict) else number)


NUMBERS = {
    "table optax": lambda: span(times_over_exact("optax")),
    "table torch": lambda: span(times_over_exact("torch sparse")),
    "table exact ms": lambda: span(
        (row["ms"]["exact"]["median"] for row in main_rows(results("rows"))), 1
    ),
    "table worst": lambda: two_digits(worst_slowdown_of_exact()),
    "clip adam optax": lambda: span(1 / x for x in dense_times_over("optax", "clip + adam")),
    "adam float32": lambda: span(dense_times_over("optax", "adam", "^(?!.*bfloat16)"), 2),
    "adam bfloat16": lambda: span(dense_times_over("optax", "adam", "bfloat16"), 2),
    "adam torch": lambda: f"{max(dense_times_over('torch', 'adam')):.2f}",
    "soak steps": lambda: f"{results('soak')['cases']['Adam']['steps'][-1]:,}",
    "soak exact": lambda: soak_error("exact"),
    "soak dense": lambda: soak_error("dense"),
    "dlrm optax": lambda: two_digits(model_ratio("DLRM", "optax")),
    "towers optax": lambda: two_digits(model_ratio("two towers", "optax")),
    "models lazy": lambda: span(
        (row["ratio"]["lazy"]["median"] for row in results("models")["steps"]), 2
    ),
    "compile one table": lambda: seconds_to_compile("click, one table"),
    "compile 26 tables": lambda: seconds_to_compile("click, 26 tables"),
    "train steps": lambda: f"{results('train')['config']['steps']}",
    "train none loss": lambda: f"{training_number('none', 'held_out_loss'):.3f}",
    "train exact loss": lambda: f"{training_number('exact', 'held_out_loss'):.3f}",
    "train lazy loss": lambda: f"{training_number('lazy', 'held_out_loss'):.3f}",
    "train exact time": lambda: f"{training_number('exact', 'ratio_to_none'):.2f}",
    "train lazy time": lambda: f"{training_number('lazy', 'ratio_to_none'):.2f}",
    "table temporaries dense gradient": lambda: temporaries("dense gradient"),
    "table temporaries exact": lambda: temporaries("exact_rows"),
}


# --- pages ----------------------------------------------------------------------------------------


def with_tables(texts: Mapping[Path, str]) -> dict[Path, str]:
    """Texts of pages with the tables between their marks as the committed results say.

    Raises:
      ValueError: for some results there is not exactly one page that has the marks.
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


def render(texts: Mapping[Path, str]) -> dict[Path, str]:
    """Texts of pages with their tables and numbers as the committed results say.

    Raises:
      KeyError: there is no number of a name.
    """
    return {
        page: NUMBER_MARK.sub(lambda m: m[1] + NUMBERS[m[2]]() + m[3], text)
        for page, text in with_tables(texts).items()
    }


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
