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
    committed: Results = json.loads((RESULTS / "cpu" / f"{suite}.json").read_text())
    return committed


def span(numbers: Iterable[float], digits: int | None = None) -> str:
    """The smallest and the largest number, with this many decimals or as `two_figures`."""
    ends = sorted(numbers)
    texts = [two_figures(x) if digits is None else f"{x:.{digits}f}" for x in ends]
    return " to ".join(dict.fromkeys((texts[0], texts[-1])))


def two_figures(number: float) -> str:
    """A number with two significant digits, or with no decimals from 10 on."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def times_as_long(contender: str) -> list[float]:
    """A contender's time divided by that of `exact`, in each main case of the rows suite."""
    rows = main_rows(results("rows"))
    return [1 / row["ratio"]["exact"][contender]["median"] for row in rows]


def dense_ratios(chain: str, rival: str) -> list[float]:
    """adamjax's time divided by a rival's, in each workload of the dense suite with this chain."""
    rows = results("dense")["times"]
    return [row["ratio"][rival]["median"] for row in rows if row["chain"] == chain]


def slowdowns_of_exact() -> list[float]:
    """The time of `exact` divided by that of dense gradients in optax, where it is longer."""
    rows = results("rows")["times"]
    ratios = [r["ratio"]["exact"]["optax"]["median"] for r in rows if "exact" in r["ratio"]]
    return [ratio for ratio in ratios if ratio > 1]


def soak_error(contender: str) -> str:
    """The mean difference of a weight from its value in float64, after the soak's last step."""
    return f"{results('soak')['cases']['Adam']['weights'][contender]['mean'][-1]:.1e}"


def model_ratio(model: str, contender: str) -> float:
    """The time of a model's train step divided by that of its step with `exact_rows`."""
    rows = {row["model"]: row["ratio"] for row in results("models")["steps"]}
    return float(rows[model][contender]["median"])


def temporaries(mode: str) -> str:
    """The temporaries of a train step on a table, in MB."""
    modes = {row["mode"]: row["temporary_bytes"] for row in results("memory")["tables"]}
    return f"{modes[mode] / 1e6:.0f}"


def training_figure(mode: str, name: str) -> float:
    """A figure of the training job with `--rows mode`; the median of several, if there are some."""
    figure = results("train")["rows"][mode][name]
    return float(figure["median"] if isinstance(figure, dict) else figure)


FIGURES = {
    "table optax": lambda: span(times_as_long("optax")),
    "table torch": lambda: span(times_as_long("torch sparse")),
    "table exact ms": lambda: span(
        (row["ms"]["exact"]["median"] for row in main_rows(results("rows"))), 1
    ),
    "table worst": lambda: span([max(slowdowns_of_exact(), default=1.0)]),
    "clip adam optax": lambda: span(1 / x for x in dense_ratios("clip + adam", "optax")),
    "adam optax": lambda: span(dense_ratios("adam", "optax"), 2),
    "adam torch": lambda: span([max(dense_ratios("adam", "torch"))], 2),
    "soak steps": lambda: f"{results('soak')['cases']['Adam']['steps'][-1]:,}",
    "soak exact": lambda: soak_error("exact"),
    "soak dense": lambda: soak_error("dense"),
    "dlrm optax": lambda: span([model_ratio("DLRM", "optax")]),
    "towers optax": lambda: span([model_ratio("two towers", "optax")]),
    "models lazy": lambda: span(
        (row["ratio"]["lazy"]["median"] for row in results("models")["steps"]), 2
    ),
    "train steps": lambda: f"{results('train')['config']['steps']}",
    "train none loss": lambda: f"{training_figure('none', 'held_out_loss'):.3f}",
    "train exact loss": lambda: f"{training_figure('exact', 'held_out_loss'):.3f}",
    "train lazy loss": lambda: f"{training_figure('lazy', 'held_out_loss'):.3f}",
    "train exact time": lambda: f"{training_figure('exact', 'ratio_to_none'):.2f}",
    "train lazy time": lambda: f"{training_figure('lazy', 'ratio_to_none'):.2f}",
    "table temporaries dense gradient": lambda: temporaries("dense gradient"),
    "table temporaries exact": lambda: temporaries("exact_rows"),
}
