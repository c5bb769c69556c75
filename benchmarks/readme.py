"""Writes the measured tables into README.md, from the committed results and nothing else."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

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


def rendered(text: str) -> str:
    """The README's text with its tables as the committed results say."""
    for path in sorted(RESULTS.glob("*/dense.json")):
        name = f"dense {path.parent.name}"
        block = re.compile(f"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"README.md has no place for {path}: add <!-- {name} --> marks")
        table = dense(json.loads(path.read_text()))
        text = block.sub(lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", text)
    return text


def main(argv: list[str]) -> int:
    """Runs; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.parse_args(argv)
    README.write_text(rendered(README.read_text()))
    return 0
