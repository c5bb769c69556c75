"""The results in sentences and in a table of outcomes, for docs/ and the report."""

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.quality.protocol import METRICS

Results = dict[str, Any]


def comparisons(results: Results, name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The model, the metric and the result of each comparison of a contender."""
    for row in results["models"]:
        for metric in row["metrics"]:
            if name in row["contenders"]:
                yield row["model"], metric, row["contenders"][name]["test"][metric]


def outcome_counts(results: Results, name: str) -> str:
    """How often each outcome came, and where, as in "worse in 1 (NeuMF HR@10), same in 3 of 4"."""
    places: dict[str, list[str]] = {}
    for model, metric, result in comparisons(results, name):
        places.setdefault(result["outcome"], []).append(f"{model} {metric}")
    parts = []
    for outcome in ("better", "worse", "undecided", "same"):
        if where := places.get(outcome, []):
            listed = f" ({', '.join(where)})" if outcome != "same" else ""
            parts.append(f"{outcome} in {len(where)}{listed}")
    return f"{', '.join(parts)} of {sum(map(len, places.values()))} comparisons"


def worst(results: Results, name: str) -> str:
    """The comparison with the largest effect against the contender, in words."""

    def advantage(comparison: tuple[str, str, dict[str, Any]]) -> float:
        _, metric, result = comparison
        if result["difference"] is None:  # runs that failed
            return -math.inf
        sign = 1 if METRICS[metric].higher_is_better else -1
        return sign * result["difference"] / result["margin"]

    model, metric, result = min(comparisons(results, name), key=advantage)
    return f"{model}, {metric}: {difference(result)} beside {result['mean']:.4g}"


def difference(result: dict[str, Any]) -> str:
    """A mean difference and its confidence interval."""
    if result["difference"] is None:
        return "runs failed"
    low, high = result["interval"]
    return f"{result['difference']:+.2g} ({low:+.2g} to {high:+.2g})"


def ratios(results: Results, name: str, field: str) -> str:
    """The range of a contender's rate or time, divided by that of dense."""
    quotients = [
        row["contenders"][name][field] / row["contenders"]["dense"][field]
        for row in results["models"]
        if name in row["contenders"]
    ]
    low, high = f"{min(quotients):.2g}", f"{max(quotients):.2g}"
    return low if low == high else f"{low} to {high}"


def rare_and_frequent(results: Results, name: str) -> Iterator[str]:
    """By model, the difference from dense where rows are read least, and where most."""
    for row in results["models"]:
        metric = row["metrics"][0]
        if name not in row["contenders"]:
            continue
        own, dense = (row["contenders"][n]["groups"][metric] for n in (name, "dense"))
        pairs = [x - y for x, y in zip(own, dense, strict=True) if x is not None and y is not None]
        yield f"{row['model']} {metric} {pairs[0]:+.2g} and {pairs[-1]:+.2g}"


def sentences(results: Results) -> list[str]:
    """The answers of the runs, a line for each question."""
    present = {name for row in results["models"] for name in row["contenders"]}
    largest = {
        name: max(
            comparisons(results, name), key=lambda x: x[2]["mean |difference|"] / abs(x[2]["mean"])
        )
        for name in ("exact", "adamjax dense")
        if name in present
    }
    shares = {
        name: result["mean |difference|"] / abs(result["mean"])
        for name, (_, _, result) in largest.items()
    }
    lines = []
    if "exact" in shares:
        line = (
            f"**Exact has dense's result**: {outcome_counts(results, 'exact')}. Runs of the same "
            f"seed differ by {100 * shares['exact']:.2g}% of a metric on average where they differ "
            f"most ({largest['exact'][0]}, {largest['exact'][1]})"
        )
        if "adamjax dense" in shares:
            where = largest["adamjax dense"]
            line += (
                "; those of optax's and adamjax's Adam, both with dense gradients, by "
                f"{100 * shares['adamjax dense']:.2g}% ({where[0]}, {where[1]})"
            )
        lines.append(f"{line}.")
    labels = {
        "lazy, same rate": "**Lazy with dense's learning rate**, against dense",
        "lazy": "**Lazy with its own rate**, against dense",
        "counted": "**A step count for each row (SmartDecay's idea)**, against dense",
        "local": "**HugeCTR's lazy global update**, against dense",
        "lazy + decay": "**Lazy AdamW**, against exact AdamW",
    }
    for name, label in labels.items():
        if name in present:
            rate = "" if "same rate" in name else f" Its rate is {ratios(results, name, 'rate')} "
            rate += "times that of dense." if rate else ""
            lines.append(
                f"{label}: {outcome_counts(results, name)}; at worst {worst(results, name)}.{rate}"
            )
    if "lazy, same rate" in present:
        lines.append(
            "**Rows that are read least, and most** (lazy with dense's rate, minus dense): "
            f"{'; '.join(rare_and_frequent(results, 'lazy, same rate'))}."
        )
    if {"exact", "lazy"} <= present:
        lines.append(
            "**Time** of training, divided by that of dense gradients: exact "
            f"{ratios(results, 'exact', 'seconds')}, lazy {ratios(results, 'lazy', 'seconds')}. "
            "The tables are small; [performance](performance.md) has large ones."
        )
    return lines


def outcome_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table of outcomes."""
    names = ["exact", "lazy, same rate", "lazy", "counted", "local", "lazy + decay"]
    names = [n for n in names if any(n in row["contenders"] for row in results["models"])]
    rows = []
    for row in results["models"]:
        for metric in row["metrics"]:
            tests = {n: row["contenders"][n]["test"][metric] for n in row["contenders"]}
            cells = [
                f"{difference(tests[n])}, {shown(tests[n]['outcome'])}" if n in tests else ""
                for n in names
            ]
            rows.append([row["model"], metric, f"{tests['dense']['mean']:.4g}", *cells])
    return ["model", "metric", "dense", *names], rows


def shown(outcome: str) -> str:
    """An outcome in a table: bold if it is a difference."""
    return f"**{outcome}**" if outcome in ("better", "worse") else outcome
