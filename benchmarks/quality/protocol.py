"""The question, fixed before the runs: metrics, seeds, rates, the test, which differences count.

For each model and each contender:

1. The learning rate is the one of `RATES` with the best mean of the model's first metric on the
   validation split, over the three `SEARCH_SEEDS`, which are not used again. Some contenders have
   the rate of `dense` (`RATE_OF`): `exact` and `adamjax dense`, because they are the same optimizer
   as `dense` and are compared with it seed by seed, and `lazy, same rate`, because it shows what
   happens if a user changes only the mode.
2. With that rate, the model is trained from each of the 20 `SEEDS`. A seed decides the first
   weights and all batches, and these are the same for every contender.
3. The result is a metric on the test split after the last epoch. No choice depends on it.
4. A contender is compared with its reference (`REFERENCE`, mostly `dense`) by the differences
   between runs of the same seed: their mean with its confidence interval, and a paired t-test. The
   p-values of all comparisons of a run of the suite are corrected together, by Holm's method.

A metric's margin says which differences matter. The outcome is

- "same": two one-sided tests at the level 0.05 (`ALPHA`) show that the difference is within the
  margin. They do if its 90% confidence interval is within the margin. (Tables show 95% intervals.)
- "better" or "worse": it is not "same", and the corrected p-value is below 0.05.
- "undecided": all other cases.

The margins are 0.01 for metrics between 0 and 1, and 1% for a loss.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

SEEDS = range(20)
# Not the seeds of the comparison, so that no run counts twice.
SEARCH_SEEDS = range(1000, 1003)
RATES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)

B1, B2, EPS = 0.9, 0.999, 1e-8
# Of the contenders with decay. With a rate of 0.004, a weight shrinks by 45% in 3,000 steps.
DECAY = 0.05

ALPHA = 0.05
CONFIDENCE = 0.95

# The bounds of groups of examples, by how often an example's row is in the training data.
READS = (4, 16, 64, 256)
# A group with fewer examples is not shown.
FEWEST = 50


@dataclass(frozen=True)
class Metric:
    """A measure of a trained model."""

    higher_is_better: bool = True  # false for a loss
    # The largest difference that does not matter; for a loss, relative to the reference's mean.
    margin: float = 0.01

    def absolute_margin(self, mean: float) -> float:
        """The margin in the metric's own unit."""
        return self.margin if self.higher_is_better else self.margin * abs(mean)


METRICS = {
    "HR@10": Metric(),
    "NDCG@10": Metric(),
    "MRR": Metric(),
    "loss": Metric(higher_is_better=False),
    "neighbours": Metric(),
}

# name: description
CONTENDERS = {
    "dense": "optax's Adam, dense gradients",
    "adamjax dense": "adamjax's Adam, dense gradients; it differs from dense only in where it "
    "rounds, so it shows how much rounding changes",
    "exact": "exact_rows",
    "lazy": 'rows="lazy": rows that are not read, and their moments, do not change',
    "lazy, same rate": "lazy with the learning rate of dense",
    "counted": "SmartDecay's idea: the loss reads a row that lags behind; the same step's update "
    "adds the movement that it missed, computed with the v after this step's gradient",
    "local": "HugeCTR's lazy global update: the same with the v of the row's previous read, and a "
    "gradient moves its row only when the row is next read",
    "exact + decay": "exact_rows of AdamW",
    "lazy + decay": 'AdamW with rows="lazy": only rows that are read decay',
}
# The contenders that have the rate of another.
RATE_OF = {"adamjax dense": "dense", "exact": "dense", "lazy, same rate": "dense"}
DENSE = ("dense", "adamjax dense")
# The contender to compare with, if it is not `dense`.
REFERENCE = {"lazy + decay": "exact + decay"}


def references(contenders: Sequence[str]) -> dict[str, str]:
    """The reference of each contender that is compared, if both take part.

    `adamjax dense` shows the effect of rounding, and is not compared.

    >>> references(["dense", "adamjax dense", "lazy", "exact + decay", "lazy + decay"])
    {'lazy': 'dense', 'exact + decay': 'dense', 'lazy + decay': 'exact + decay'}
    """
    of = {n: REFERENCE.get(n, "dense") for n in contenders if n not in DENSE}
    return {name: other for name, other in of.items() if other in contenders}


def group(reads: int) -> int:
    """The number of the group of `READS` for a number of reads.

    >>> [group(n) for n in (0, 3, 4, 255, 256)]
    [0, 0, 1, 3, 4]
    """
    return sum(reads >= bound for bound in READS)


def group_names() -> list[str]:
    """The groups of `READS` in words.

    >>> group_names()
    ['0 to 3', '4 to 15', '16 to 63', '64 to 255', '256 or more']
    """
    ends = [0, *READS]
    between = [f"{low} to {high - 1}" for low, high in itertools.pairwise(ends)]
    return [*between, f"{ends[-1]} or more"]
