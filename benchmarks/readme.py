"""Writes measured tables and numbers into README.md and docs/, from the committed results alone.

A number in a sentence is between `<!-- number NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.measure import RESULTS, ROOT
from benchmarks.tables import SUITES, Results, main_rows, span, two_digits

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))

NUMBER_MARK = re.compile(r"(<!-- number (.+?) -->).*?(<!-- end -->)", re.DOTALL)


def cpu_results(suite: str) -> Results:
    """The committed results of a suite on a CPU."""
    return json.loads((RESULTS / "cpu" / f"{suite}.json").read_text())


def numbers() -> dict[str, str]:
    """The numbers in sentences, by name."""
    dense, rows, models = cpu_results("dense")["times"], cpu_results("rows"), cpu_results("models")
    soak, train = cpu_results("soak")["cases"]["Adam"], cpu_results("train")
    main = main_rows(rows)

    def time_over_exact(contender: str) -> str:
        """The contender's time divided by exact's, over the main cases."""
        return span(1 / row["ratio"]["exact"][contender]["median"] for row in main)

    optax_clipped = [row["ratio"]["optax"] for row in dense if row["chain"] == "clip + adam"]
    adam = {row["workload"]: row["ratio"] for row in dense if row["chain"] == "adam"}
    adam_over_optax = {name: ratio["optax"]["median"] for name, ratio in adam.items()}
    adam_bfloat16 = [x for name, x in adam_over_optax.items() if "bfloat16" in name]
    adam_float32 = [x for name, x in adam_over_optax.items() if "bfloat16" not in name]
    exact_over_optax = [
        row["ratio"]["exact"]["optax"]["median"] for row in rows["times"] if "exact" in row["ratio"]
    ]
    model_ratios = {row["model"]: row["ratio"] for row in models["steps"]}
    compile_seconds = {
        row["model"]: row["s"]["compile"]["median"]
        for row in models["programs"]
        if row["contender"] == "exact"
    }
    temporaries = {row["mode"]: row["temporary_bytes"] for row in cpu_results("memory")["tables"]}
    return {
        "table optax": time_over_exact("optax"),
        "table torch": time_over_exact("torch sparse"),
        "table exact ms": span((row["ms"]["exact"]["median"] for row in main), 1),
        # How many times as fast a dense gradient is at most; 1 if exact is never slower.
        "table worst": two_digits(max(1.0, *exact_over_optax)),
        "clip adam optax": span(1 / ratio["median"] for ratio in optax_clipped),
        "adam float32": span(adam_float32, 2),
        "adam bfloat16": span(adam_bfloat16, 2),
        "adam torch": f"{max(ratio['torch']['median'] for ratio in adam.values()):.2f}",
        "soak steps": f"{soak['steps'][-1]:,}",
        "soak exact": f"{soak['weights']['exact']['mean'][-1]:.1e}",
        "soak dense": f"{soak['weights']['dense']['mean'][-1]:.1e}",
        "dlrm optax": two_digits(model_ratios["DLRM"]["optax"]["median"]),
        "towers optax": two_digits(model_ratios["two towers"]["optax"]["median"]),
        "models lazy": span((ratio["lazy"]["median"] for ratio in model_ratios.values()), 2),
        "compile one table": two_digits(compile_seconds["click, one table"]),
        "compile 26 tables": two_digits(compile_seconds["click, 26 tables"]),
        "train steps": f"{train['config']['steps']}",
        **{
            f"train {mode} loss": f"{train['rows'][mode]['held_out_loss']:.3f}"
            for mode in ("none", "exact", "lazy")
        },
        **{
            f"train {mode} time": f"{train['rows'][mode]['ratio_to_none']['median']:.2f}"
            for mode in ("exact", "lazy")
        },
        "table temporaries dense gradient": f"{temporaries['dense gradient'] / 1e6:.0f}",
        "table temporaries exact": f"{temporaries['exact_rows'] / 1e6:.0f}",
    }


def render(texts: Mapping[Path, str]) -> dict[Path, str]:
    """The texts of pages, with the tables and numbers of the committed results.

    Raises:
      ValueError: the marks of some results are not on exactly one page.
      KeyError: a mark has an unknown name.
    """
    by_name = numbers()
    new = {
        page: NUMBER_MARK.sub(lambda m: m[1] + by_name[m[2]] + m[3], text)
        for page, text in texts.items()
    }
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
            page = pages[0]
            new[page] = block.sub(lambda m, filled=filled: m[1] + filled + m[2], new[page])
    return new


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.parse_args(argv)
    for page, text in render({page: page.read_text() for page in PAGES}).items():
        if text != page.read_text():
            page.write_text(text)
            print(page.relative_to(ROOT))
    return 0
