"""Schedules of other libraries, and at which counts two schedules are compared."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.schedule import by_path

__all__ = ["ForeignSchedule", "ends_of_schedules", "has_schedule", "later_counts"]

# The last count at which schedules are compared, and of how many lengths at most the sums of pairs.
_LAST, _MOST_LENGTHS = 2**30, 8
# Up to which count schedules of others are compared.
_ACCURATE = 2**20


class ForeignSchedule:
    """A schedule that adamjax does not have: an object of Keras, or of a user, that is called.

    It computes in float32, so its values are rounded: those near 0 relatively coarsely.

    Attributes:
      largest: the largest value so far.
    """

    def __init__(self, schedule: Any) -> None:
        self.schedule, self.largest = schedule, 0.0

    def __call__(self, count: Any) -> jax.Array:
        value = float(self.schedule(int(count)))
        self.largest = max(self.largest, abs(value))
        return jnp.asarray(value, float)

    def is_near(self, stated: float, value: float) -> bool:
        """Whether a value is that of the schedule, but for rounding."""
        return math.isclose(stated, value, rel_tol=1e-4, abs_tol=1e-6 * self.largest)

    def numbers(self) -> list[Any]:
        """The numbers that the schedule is made from."""
        config: Any = getattr(self.schedule, "get_config", dict)()
        return [x for x in jax.tree.leaves(config) if isinstance(x, int | float)]


def has_schedule(tx: Any) -> bool:
    """Whether a transform has a rate or a weight decay that follows a schedule, of any leaf."""
    rate = getattr(tx, "learning_rate", getattr(tx, "weight_decay", None))
    return any(map(callable, (*rate.values, rate.default) if isinstance(rate, by_path) else [rate]))


def ends_of_schedules(schedules: Any) -> list[int]:
    """Where a part of a schedule may end: whole numbers among the values, then sums of two."""
    leaves = jax.tree.leaves(schedules)
    foreign = [x for x in leaves if isinstance(x, ForeignSchedule)]
    leaves = [x for x in leaves if x not in foreign] + [y for x in foreign for y in x.numbers()]
    numbers = [x for x in leaves if np.ndim(x) == 0 and not isinstance(x, str)]
    lengths = sorted({int(x) for x in numbers if 1 <= x <= _LAST and x == int(x)})
    if len(lengths) > _MOST_LENGTHS:
        return lengths
    sums = {a + b for a in lengths for b in lengths}
    return [*lengths, *sorted(sums - set(lengths))]


def later_counts(count: int, schedules: Any) -> list[int]:
    """Counts of steps at which two schedules are compared: near ends of parts, and far apart."""
    counts = {end + i for end in ends_of_schedules(schedules) for i in (-1, 0, 1)}
    counts |= {count + (1 << i) for i in range(_LAST.bit_length())}
    if any(isinstance(x, ForeignSchedule) for x in jax.tree.leaves(schedules)):
        # It may have any form, and is inaccurate at very large counts.
        counts |= {count + int(1.05**i) for i in range(_ACCURATE.bit_length() * 14)}
        counts = {x for x in counts if x <= _ACCURATE}
    return sorted(x for x in counts if count < x <= _LAST)
