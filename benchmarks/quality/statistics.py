"""The statistics of differences between paired runs: means, intervals, tests and outcomes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from benchmarks.quality.protocol import ALPHA, CONFIDENCE


@dataclass(frozen=True)
class Paired:
    """The differences between two contenders' runs of the same seeds."""

    mean: float  # of the differences
    low: float  # the lower and the upper end of the mean's confidence interval
    high: float
    effect: float  # the mean divided by the differences' standard deviation (Cohen's d of pairs)
    p: float  # of the paired t-test, two-sided


def interval(differences: Sequence[float], confidence: float) -> tuple[float, float]:
    """The confidence interval of the mean, by Student's t."""
    mean, error = float(np.mean(differences)), float(stats.sem(differences))
    half_width = error * special.stdtrit(len(differences) - 1, (1 + confidence) / 2)
    return mean - half_width, mean + half_width


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """The differences `first - second`.

    If a value is not finite, the p-value is 1 and all else NaN, so that failed runs show no
    difference.

    >>> found = paired([2.0, 3.0, 5.0], [1.0, 1.0, 2.0])
    >>> round(found.mean, 3), round(found.p, 4), round(found.effect, 3)
    (2.0, 0.0742, 2.0)
    """
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    n = len(differences)
    if n < 2:
        raise ValueError(f"paired: got {n} pairs, expected at least 2")
    if not np.isfinite(differences).all():
        return Paired(math.nan, math.nan, math.nan, math.nan, 1.0)
    mean, error = float(differences.mean()), float(stats.sem(differences))
    if error == 0:
        effect = 0.0 if mean == 0 else math.copysign(math.inf, mean)
        return Paired(mean, mean, mean, effect, 1.0 if mean == 0 else 0.0)
    low, high = interval(differences, CONFIDENCE)
    p = 2 * float(special.stdtr(n - 1, -abs(mean / error)))
    return Paired(mean, low, high, mean / error / math.sqrt(n), p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number, by Holm's method.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    corrected, largest = {}, 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def is_within(differences: Sequence[float], margin: float) -> bool:
    """Whether two one-sided tests show that the mean is within the margin."""
    if not np.isfinite(differences).all():
        return False
    low, high = interval(differences, 1 - 2 * ALPHA)
    return -margin < low and high < margin


def outcome(
    differences: Sequence[float], corrected_p: float, margin: float, higher_is_better: bool
) -> str:
    """The outcome of a comparison with a reference, as the protocol defines it."""
    if is_within(differences, margin):
        return "same"
    if corrected_p < ALPHA:
        return "better" if (np.mean(differences) > 0) == higher_is_better else "worse"
    return "undecided"
