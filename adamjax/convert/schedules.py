"""Which transforms follow a schedule, and at which counts two schedules are compared."""

from typing import Any

import jax
import numpy as np

from adamjax.schedule import by_path

__all__ = ["ends_of_schedules", "has_schedule", "later_counts"]

# The last count at which schedules are compared, and of how many lengths at most the sums of pairs.
_LAST, _MOST_LENGTHS = 2**30, 8


def has_schedule(tx: Any) -> bool:
    """Whether a transform has a rate or a weight decay that follows a schedule, of any leaf."""
    rate = getattr(tx, "learning_rate", getattr(tx, "weight_decay", None))
    return any(map(callable, (*rate.values, rate.default) if isinstance(rate, by_path) else [rate]))


def ends_of_schedules(schedules: Any) -> list[int]:
    """Where a part of a schedule may end: whole numbers among the values, then sums of two."""
    numbers = [x for x in jax.tree.leaves(schedules) if np.ndim(x) == 0 and not isinstance(x, str)]
    lengths = sorted({int(x) for x in numbers if 1 <= x <= _LAST and x == int(x)})
    if len(lengths) > _MOST_LENGTHS:
        return lengths
    sums = {a + b for a in lengths for b in lengths}
    return [*lengths, *sorted(sums - set(lengths))]


def later_counts(count: int, schedules: Any) -> list[int]:
    """Counts of steps at which two schedules are compared: near ends of parts, and far apart."""
    counts = {end + i for end in ends_of_schedules(schedules) for i in (-1, 0, 1)}
    counts |= {count + (1 << i) for i in range(_LAST.bit_length())}
    return sorted(x for x in counts if count < x <= _LAST)
