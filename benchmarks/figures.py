"""Figures in sentences: what README.md and the pages in docs/ quote from the committed results.

A figure stands between `<!-- figure NAME -->` and `<!-- end -->`; `benchmarks.readme` writes it.
"""

import functools
import json
from collections.abc import Iterable
from typing import Any

from benchmarks.measure import RESULTS
from benchmarks.tables import main_rows

Results = dict[str, Any]


@functools.cache
def results(suite: str) -> Results:
    """The committed results of a suite on a CPU."""
    found: Results = json.loads((RESULTS / "cpu" / f"{suite}.json").read_text())
    return found


def span(numbers: Iterable[float], digits: int | None = None) -> str:
    """The smallest and the largest number: with these decimals, or with two figures."""
    ends = sorted(numbers)
    written = [two_figures(x) if digits is None else f"{x:.{digits}f}" for x in ends]
    return " to ".join(dict.fromkeys((written[0], written[-1])))


def two_figures(number: float) -> str:
    """A number with two figures, or all of those in front of its point."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def of_times(contender: str, own: str = "exact") -> list[float]:
    """How many times as long as `own` a contender takes, in each main case of the rows suite."""
    rows = main_rows(results("rows"))
    return [1 / row["ratio"][own][contender]["median"] for row in rows]


def dense_ratios(chain: str, rival: str) -> list[float]:
    """adamjax's time by a rival's, in every workload of the dense suite with this chain."""
    rows = results("dense")["times"]
    return [row["ratio"][rival]["median"] for row in rows if row["chain"] == chain]


def losses_of_exact() -> list[float]:
    """By how much `exact` is slower than dense gradients in optax, where it is slower."""
    rows = results("rows")["times"]
    ratios = [r["ratio"]["exact"]["optax"]["median"] for r in rows if "exact" in r["ratio"]]
    return [ratio for ratio in ratios if ratio > 1]


def soaked(contender: str) -> str:
    """The mean difference of a weight from float64, after the last step of the soak."""
    return f"{results('soak')['cases']['Adam']['weights'][contender]['mean'][-1]:.1e}"


def model_ratio(model: str, contender: str) -> float:
    """How many times as long as that with `exact_rows` a model's train step takes."""
    rows = {row["model"]: row["ratio"] for row in results("models")["steps"]}
    return float(rows[model][contender]["median"])


def temporaries(mode: str) -> str:
    """The temporaries of a train step on a table, in MB."""
    modes = {row["mode"]: row["temporary_bytes"] for row in results("memory")["tables"]}
    return f"{modes[mode] / 1e6:.0f}"


def trained(mode: str, name: str) -> float:
    """A figure of the training job with `--rows mode`, at the end or a median."""
    figure = results("train")["rows"][mode][name]
    return float(figure["median"] if isinstance(figure, dict) else figure)


FIGURES = {
    "table optax": lambda: span(of_times("optax")),
    "table torch": lambda: span(of_times("torch sparse")),
    "table exact ms": lambda: span(
        (row["ms"]["exact"]["median"] for row in main_rows(results("rows"))), 1
    ),
    "table worst": lambda: span([max(losses_of_exact(), default=1.0)]),
    "clip adam optax": lambda: span(1 / x for x in dense_ratios("clip + adam", "optax")),
    "adam optax": lambda: span(dense_ratios("adam", "optax"), 2),
    "adam torch": lambda: span([max(dense_ratios("adam", "torch"))], 2),
    "soak steps": lambda: f"{results('soak')['cases']['Adam']['steps'][-1]:,}",
    "soak exact": lambda: soaked("exact"),
    "soak dense": lambda: soaked("dense"),
    "dlrm optax": lambda: span([model_ratio("DLRM", "optax")]),
    "towers optax": lambda: span([model_ratio("two towers", "optax")]),
    "train steps": lambda: f"{results('train')['config']['steps']}",
    "train none loss": lambda: f"{trained('none', 'held_out_loss'):.3f}",
    "train exact loss": lambda: f"{trained('exact', 'held_out_loss'):.3f}",
    "train lazy loss": lambda: f"{trained('lazy', 'held_out_loss'):.3f}",
    "train exact time": lambda: f"{trained('exact', 'ratio_to_none'):.2f}",
    "train lazy time": lambda: f"{trained('lazy', 'ratio_to_none'):.2f}",
    "table temporaries dense gradient": lambda: temporaries("dense gradient"),
    "table temporaries exact": lambda: temporaries("exact_rows"),
}
