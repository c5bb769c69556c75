"""Which transforms follow a schedule, and at which counts two schedules are compared."""

from typing import Any

import jax
import numpy as np

from adamjax.schedule import by_path

__all__ = ["has_schedule", "later_counts"]

# The last count at which schedules are compared, and of how many lengths at most the sums of pairs.
_LAST, _MOST_LENGTHS = 2**30, 8


def has_schedule(tx: Any) -> bool:
    """Whether a transform has a rate or a weight decay that follows a schedule, of any leaf."""
    rate = getattr(tx, "learning_rate", getattr(tx, "weight_decay", None))
    return any(map(callable, (*rate.values, rate.default) if isinstance(rate, by_path) else [rate]))


def later_counts(count: int, schedules: Any) -> list[int]:
    """Counts of steps at which two schedules are compared.

    Where a part of a schedule ends is a whole number among its values, or the sum of two of them.
    """
    numbers = [x for x in jax.tree.leaves(schedules) if np.ndim(x) == 0 and not isinstance(x, str)]
    lengths = {int(x) for x in numbers if 1 <= x <= _LAST and x == int(x)}
    edges = set(lengths)
    if len(lengths) <= _MOST_LENGTHS:
        edges |= {a + b for a in lengths for b in lengths}
    counts = {edge + i for edge in edges for i in (-1, 0, 1)}
    counts |= {count + (1 << i) for i in range(_LAST.bit_length())}
    return sorted(x for x in counts if count < x <= _LAST)
