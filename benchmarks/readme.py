"""Writes the measured tables into README.md, from the committed results and nothing else."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS
from benchmarks.models import CONTENDERS

__all__ = ["main", "rendered"]

README = Path(__file__).parent.parent / "README.md"


def _range(spread: dict[str, float], digits: int) -> str:
    low, middle, high = (f"{spread[k]:.{digits}f}" for k in ("q25", "median", "q75"))
    return f"{middle} ({low} to {high})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _where(results: dict[str, Any]) -> str:
    env = results["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    cores = f", {env['cores']} cores" if env["platform"] == "cpu" else ""
    rounds = f"{results['sittings']} sittings of {results['rounds']} rounds"
    return f"{env['device']}{cores}; {versions}; {rounds}, {env['date']}."


def dense(results: dict[str, Any]) -> str:
    """The tables of the dense suite."""
    rivals = list(results["times"][0]["ratio"])
    steps = [
        [
            row["workload"],
            row["chain"],
            _range(row["ms"]["adamjax"], 1),
            *(_range(row["ratio"][name], 2) if name in row["ratio"] else "" for name in rivals),
        ]
        for row in results["times"]
    ]
    compiling = [
        [
            row["what"],
            row["chain"],
            _range(row["s"]["adamjax"], 2),
            _range(row["ratio"]["optax"], 2),
        ]
        for row in results["compile"]
    ]
    memory = [
        [
            row["workload"],
            row["chain"],
            f"{row['state_bytes'] / row['parameters']:.4f}",
            f"{row['temporary_bytes'] / row['parameter_bytes']:.4%}",
        ]
        for row in results["memory"]
    ]
    parts = [
        f"{_where(results)} Median (quartiles); a ratio below 1 means that adamjax is faster.",
        _table(["workload", "chain", "step, ms", *(f"of {name}'s time" for name in rivals)], steps),
        "500 leaves, once per program:",
        _table(["what", "chain", "s", "of optax's time"], compiling),
        "Memory of a donated step:",
        _table(
            ["workload", "chain", "state, bytes a parameter", "temporaries, of the parameters"],
            memory,
        ),
    ]
    return "\n\n".join(parts)


def _mega(number: float | None) -> str:
    return "" if number is None else f"{number / 1e6:,.1f}"


def rows(results: dict[str, Any]) -> str:
    """The tables of the rows suite: its main case, what was asked of it, and `exact` everywhere."""
    found = {(r["rows"], r["width"], r["reads"], r["indices"]): r for r in results["times"]}
    kinds = ("Zipf", "uniform")
    zipf, uniform = (found[1_000_000, 64, 8192, kind] for kind in kinds)

    def times(row: dict[str, Any], name: str, own: str = "exact") -> str:
        """How many times as long as ours the contender takes."""
        if name not in row["ratio"][own]:
            return "?"
        longer = 1 / row["ratio"][own][name]["median"]
        return f"{longer:.2g}" if longer < 10 else f"{longer:.0f}"

    def taken(row: dict[str, Any], name: str, own: str) -> list[str]:
        if name not in row["ms"]:
            return ["", ""]
        return [_range(row["ms"][name], 1), "" if name == own else times(row, name, own)]

    contenders = [
        [
            name,
            *taken(zipf, name, "exact step" if "step" in name else "exact"),
            *taken(uniform, name, "exact step" if "step" in name else "exact"),
            _mega(zipf["temporary_bytes"][name]),
            f"{zipf['peak_bytes'][name] / 1e6:,.0f}",
        ]
        for name in zipf["ms"]
    ]
    asked = [
        [
            row["what"],
            row["asked"],
            "" if row["measured"] is None else f"{row['measured']:.3g}",
            {None: "not measured", True: "yes", False: "**no**"}[row["holds"]],
        ]
        for row in results["bounds"]
    ]
    tables = sorted({key[0] for key in found})

    grid = []
    for width, reads in sorted({key[1:3] for key in found}):
        line = [str(width), f"{reads:,}"]
        for kind in kinds:
            for count in tables:
                row = found[count, width, reads, kind]
                both = f"{times(row, 'optax')}, {times(row, 'torch sparse')}"
                line.append(f"{row['ms']['exact']['median']:.1f} ({both})")
        grid.append(line)
    where = f"{_where(results)} The grid's other cases: {results['grid_rounds']} rounds."
    if "tunables" in results["environment"]:
        where += f" With GLIBC_TUNABLES={results['environment']['tunables']}."
    if alone := sum(not row["in_turn"] for row in results["times"]):
        where += f" In {alone} cases, whose tables did not fit in memory at once, the contenders "
        where += "came one after another."
    for row in results["times"]:
        where += "".join(f" {row['case']}: {name}: {why}." for name, why in row["failed"].items())
    return "\n\n".join(
        [
            f"{where} 1M rows of 64, 8,192 indices; median (quartiles). The whole steps read "
            "the rows and differentiate a loss as well; their time is compared with each other's.",
            _table(
                [
                    *("contender", "Zipf, ms", "of exact's time", "uniform, ms", "of exact's time"),
                    *("temporaries, MB", "most memory, MB"),
                ],
                contenders,
            ),
            "The bounds it is held to:",
            _table(["what", "bound", "measured", "holds"], asked),
            "`exact` in ms, by the table's rows (in brackets how many times as long optax with "
            "dense gradients and torch's SparseAdam take):",
            _table(
                ["D", "n", *(f"{kind}, {count:,}" for kind in kinds for count in tables)],
                grid,
            ),
        ]
    )


def models(results: dict[str, Any]) -> str:
    """The tables of the models suite."""
    steps = [
        [
            f"{row['model']}, {row['parameters'] / 1e6:,.1f}M",
            contender,
            _range(ms, 1),
            f"{row['ratio'][name]['median']:.2g}" if name != "exact" else "",
            _range(row["tables_ms"][name], 1) if name in row["tables_ms"] else "",
            _mega(row["temporary_bytes"][name]),
        ]
        for row in results["steps"]
        for name, contender in CONTENDERS.items()
        if (ms := row["ms"].get(name))
    ]
    traces = [
        [row["model"], row["caches"], _range(row["ms"]["rows"], 0), _range(row["ratio"], 2)]
        for row in results["traces"]
    ]
    head = ["model, parameters", "contender", "step, ms", "by exact's"]
    return "\n\n".join(
        [
            f"{_where(results)} Median (quartiles). What the tables add is the step's time less "
            "that of one with frozen tables.",
            _table([*head, "of it tables, ms", "temporaries, MB"], steps),
            "The time to trace a loss with row gradients, by that of `jax.value_and_grad`, with "
            "JAX's own functions traced before (caches warm) and not:",
            _table(["model", "caches", "ms", "of jax.value_and_grad's time"], traces),
        ]
    )


def differences(results: dict[str, Any]) -> str:
    """The table of what other packages do otherwise."""
    systems = list(results["rows"][0]["numbers"])
    table = [
        [row["what"], *(f"{row['numbers'][system]}" for system in systems), row["theirs"]]
        for row in results["rows"]
    ]
    versions = ", ".join(f"{k} {v}" for k, v in results["environment"]["versions"].items())
    return f"{_table(['what is done', *systems, 'to get theirs'], table)}\n\n{versions}."


# The function that writes the tables of a suite's results.
SUITES = {"dense": dense, "rows": rows, "models": models, "differences": differences}


def rendered(text: str) -> str:
    """The README's text with its tables as the committed results say."""
    for suite, tables in SUITES.items():
        for path in sorted(RESULTS.glob(f"*/{suite}.json")):
            name = f"{suite} {path.parent.name}"
            block = re.compile(f"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
            place = block.search(text)
            if not place:
                raise ValueError(f"README.md has no place for {path}: add <!-- {name} --> marks")
            made = f"{place[1]}\n{tables(json.loads(path.read_text()))}\n\n{place[2]}"
            text = text[: place.start()] + made + text[place.end() :]
    return text


def main(argv: list[str]) -> int:
    """Runs; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.parse_args(argv)
    README.write_text(rendered(README.read_text()))
    return 0
