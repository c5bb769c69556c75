"""The results in sentences and in a table of outcomes, for docs/ and the report."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.quality.protocol import FEWEST, METRICS, REFERENCE

Results = dict[str, Any]


class Comparison(NamedTuple):
    """A contender's result with a model, by one metric, and its difference from the reference."""

    model: str
    metric: str
    result: dict[str, Any]


def comparisons(results: Results, name: str) -> Iterator[Comparison]:
    """A contender's comparisons, for each model that it trained and each metric."""
    for row in results["models"]:
        if name in row["contenders"]:
            by_metric = row["contenders"][name]["test"]
            for metric in row["metrics"]:
                yield Comparison(row["model"], metric, by_metric[metric])


def outcome_counts(results: Results, name: str) -> str:
    """How often each outcome occurs, and where: "worse in 1 (NeuMF HR@10), same in 3 of 4 ..."."""
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
    """The contender's worst comparison, in words."""

    def advantage(comparison: Comparison) -> float:
        """How much better the contender is than its reference, in units of the margin."""
        _, metric, result = comparison
        if result["difference"] is None:  # runs that failed
            return -math.inf
        sign = 1 if METRICS[metric].higher_is_better else -1
        return sign * result["difference"] / result["margin"]

    model, metric, result = min(comparisons(results, name), key=advantage)
    mean = f"the method's mean is {result['mean']:.4g}"
    return f"{model}, {metric}: {difference(result)}, where {mean}"


def difference(result: dict[str, Any]) -> str:
    """A mean difference and its confidence interval."""
    if result["difference"] is None:
        return "runs failed"
    low, high = result["interval"]
    return f"{result['difference']:+.2g} ({low:+.2g} to {high:+.2g})"


def relative_difference(comparison: Comparison) -> float:
    """The mean absolute difference from dense runs of the same seeds, as a share of the metric."""
    return comparison.result["mean |difference|"] / abs(comparison.result["mean"])


def ratio_range(results: Results, name: str, field: str, reference: str = "dense") -> str:
    """The range over models of a contender's "rate" or "seconds", divided by the reference's."""
    ratios = [
        row["contenders"][name][field] / row["contenders"][reference][field]
        for row in results["models"]
        if name in row["contenders"]
    ]
    low, high = f"{min(ratios):.2g}", f"{max(ratios):.2g}"
    return low if low == high else f"{low} to {high}"


def group_differences(row: dict[str, Any], name: str) -> tuple[list[int], list[float]]:
    """A model's groups, from few reads to many, and a contender's difference from dense in each.

    The metric is the model's first. Groups with too few examples, which have `None`, are left out.
    """
    own, dense = (row["contenders"][n]["groups"][row["metrics"][0]] for n in (name, "dense"))
    groups = [i for i, pair in enumerate(zip(own, dense, strict=True)) if None not in pair]
    return groups, [own[i] - dense[i] for i in groups]


def rare_and_frequent(results: Results, name: str) -> Iterator[str]:
    """For each model, the difference from dense where rows are read least, and where most."""
    for row in results["models"]:
        if name in row["contenders"]:
            _, differences = group_differences(row, name)
            low, high = (f"{differences[i]:+.2g}" for i in (0, -1))
            yield f"{row['model']} {row['metrics'][0]} {low} and {high}"


def sentences(results: Results) -> list[str]:
    """The answers to the suite's questions, one line each."""
    present = {name for row in results["models"] for name in row["contenders"]}
    lines = []
    if "exact" in present:
        farthest = max(comparisons(results, "exact"), key=relative_difference)
        line = (
            f"**Exact**, against dense: {outcome_counts(results, 'exact')}. (A comparison uses the "
            "mean difference, in which differences of opposite signs cancel.) Single runs can "
            "still differ. The mean absolute difference between runs of the same seed is largest "
            f"for the {farthest.metric} of {farthest.model}: "
            f"{100 * relative_difference(farthest):.2g}% of the metric."
        )
        if "adamjax dense" in present:
            farthest = max(comparisons(results, "adamjax dense"), key=relative_difference)
            line += (
                " Between adamjax's and optax's Adam, both with dense gradients, it is largest for "
                f"the {farthest.metric} of {farthest.model}: "
                f"{100 * relative_difference(farthest):.2g}%."
            )
        lines.append(line)
    labels = {
        "lazy, same rate": "**Lazy with dense's learning rate**, against dense",
        "lazy": "**Lazy with its own rate**, against dense",
        "counted": "**Counted** (as in caffe2's SmartDecaySparseAdam), against dense",
        "local": "**Local** (as in HugeCTR's LazyGlobal), against dense",
        "lazy + decay": "**Lazy AdamW**, against exact AdamW",
    }
    for name, label in labels.items():
        if name in present:
            line = f"{label}: {outcome_counts(results, name)}; at worst {worst(results, name)}."
            if name != "lazy, same rate":
                reference = REFERENCE.get(name, "dense")
                ratio = ratio_range(results, name, "rate", reference)
                other = label.rpartition("against ")[2]
                line += f" Its learning rate is {ratio} times that of {other}."
            lines.append(line)
    if "lazy, same rate" in present:
        lines.append(
            "**Rarely and often read rows**: the metric of lazy minus that of dense, both with "
            "dense's learning rate. The test examples are grouped by how often their row is in the "
            f"training data: {', '.join(results['groups'])} times. The first number is for the "
            "group with the fewest reads, the second for the one with the most. (Groups of fewer "
            f"than {FEWEST} examples are left out. A loss that is larger is worse; any other "
            "metric that is larger is better.) "
            f"{'; '.join(rare_and_frequent(results, 'lazy, same rate'))}."
        )
    if {"exact", "lazy"} <= present:
        lines.append(
            "**Time** of training, divided by the time with dense gradients: exact "
            f"{ratio_range(results, 'exact', 'seconds')}, "
            f"lazy {ratio_range(results, 'lazy', 'seconds')}. "
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
            by_name = {n: entry["test"][metric] for n, entry in row["contenders"].items()}
            cells = [
                f"{difference(by_name[n])}, {marked(by_name[n]['outcome'])}" if n in by_name else ""
                for n in names
            ]
            rows.append([row["model"], metric, f"{by_name['dense']['mean']:.4g}", *cells])
    return ["model", "metric", "dense", *names], rows


def marked(outcome: str) -> str:
    """An outcome in a table: bold if there is a difference."""
    return f"**{outcome}**" if outcome in ("better", "worse") else outcome
