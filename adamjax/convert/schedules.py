"""Schedules of other libraries, and at which counts two schedules are compared."""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import x64
from adamjax.convert.values import class_name, number_of
from adamjax.schedule import by_path, constant, is_own_schedule, rate_at

__all__ = [
    "ForeignSchedule",
    "ends_of_schedules",
    "follows_count",
    "has_schedule",
    "later_counts",
]

# The last count at which schedules are compared; and up to how many lengths of parts, sums and
# products of two lengths are counts too.
_LAST, _MOST_LENGTHS = 2**30, 8
# The last counts for schedules of other libraries, and for functions of the user: products with
# larger counts easily exceed int32.
_LAST_OF_FOREIGN, _LAST_OF_FUNCTIONS = 2**20, 2**24
# The number of intervals between earlier counts at which a schedule is called.
_EARLIER = 16


class ForeignSchedule:
    """A schedule of another library.

    Attributes:
      schedule: the library's object.
      call: calls it as the library does, for a count.
      known: the same schedule as one of adamjax; `None` if there is none.
      note: a note for errors about the rate.
      values: the values of calls so far, by their counts.
    """

    def __init__(
        self, schedule: Any, call: Callable[[int], Any], known: Any = None, note: str = ""
    ) -> None:
        self.schedule, self.call, self.known, self.note = schedule, call, known, note
        self.values: dict[int, float] = {}

    def stated(self, count: int) -> float:
        """The value at a count: of `known`, in float64, or else of a call.

        Raises:
          ValueError: there is no `known` schedule, and the call raises an error.
        """
        if self.known is None:
            return self.called(count)
        with x64(True):
            return float(rate_at(self.known, jnp.asarray(count, int)))

    def called(self, count: int) -> float:
        """The value that a call returns, computed by the library as in its steps."""
        if count in self.values:
            return self.values[count]
        try:
            value = number_of("a schedule", "its value", self.call(count))
        except Exception as error:
            raise ValueError(
                f"a {class_name(self.schedule)} cannot be called at count {count} "
                f"({type(error).__name__}: {str(error)[:200]})"
            ) from error
        self.values[count] = value
        return value

    def is_near(self, count: int, value: float) -> bool:
        """Whether a value is that of a call, up to rounding relative to the largest one so far."""
        try:
            called = self.called(count)
        except ValueError:
            return False
        if math.isnan(called):
            return math.isnan(value)
        if math.isclose(called, value, rel_tol=1e-4):
            return True
        if abs(called - value) <= 1e-6 * self._largest_until(count):
            return True
        # If the library divides the count by a period in float32, the error of the quotient is that
        # of a count which is off by this many steps. After many periods, this error is large.
        steps = count * 2.0**-22
        try:
            change = max(abs(self.called(max(count + i, 0)) - called) for i in (-1, 1))
        except ValueError:
            return False
        return abs(called - value) <= change * steps

    def _largest_until(self, count: int) -> float:
        """The largest value at some counts up to this one. A rate that grows is larger later.

        The first counts are left out: there, a rate like `1 / count` may be very large.
        """
        first = max(1, count // _EARLIER)
        for i in range(1, _EARLIER + 1):
            with contextlib.suppress(ValueError):
                self.called(count * i // _EARLIER)
        so_far = (x for at, x in self.values.items() if first <= at <= count)
        return max((abs(x) for x in so_far if math.isfinite(x)), default=0.0)

    def numbers(self) -> list[Any]:
        """The numbers that the schedule was built from."""
        if self.known is not None:
            return jax.tree.leaves(self.known)
        try:
            config = jax.tree.leaves(self.schedule.get_config())
        except Exception:  # A user's class need not implement it.
            config = []
        own = jax.tree.leaves(list(getattr(self.schedule, "__dict__", {}).values()))
        return [x for x in (*config, *own) if isinstance(x, int | float | np.number)]


def follows_count(value: Any) -> bool:
    """Whether a rate or a decay is a schedule, other than `constant`."""
    return callable(value) and not isinstance(value, constant)


def has_schedule(tx: Any) -> bool:
    """Whether a transform's rate or weight decay follows a schedule, for any leaf."""
    rate = getattr(tx, "learning_rate", getattr(tx, "weight_decay", None))
    rates = (*rate.values, rate.default) if isinstance(rate, by_path) else [rate]
    return any(map(follows_count, rates))


def ends_of_schedules(schedules: Any) -> list[int]:
    """Counts where parts of schedules may end: whole numbers among the values.

    Sums of two are included, as of a warm-up and a decay, and products of two, as of the steps in
    an epoch and a number of epochs. If there are very many numbers, both are left out.
    """
    numbers: list[Any] = []
    for x in jax.tree.leaves(schedules):
        numbers += x.numbers() if isinstance(x, ForeignSchedule) else [x]
    numbers = [x for x in numbers if np.ndim(x) == 0 and not isinstance(x, str)]
    lengths = sorted({int(x) for x in numbers if 1 <= x <= _LAST and x == int(x)})
    if len(lengths) > _MOST_LENGTHS:
        return lengths
    sums = {a + b for a in lengths for b in lengths} - set(lengths)
    products = {a * b for a in lengths for b in lengths if a * b <= _LAST} - sums - set(lengths)
    return [*lengths, *sorted(sums), *sorted(products)]


def later_counts(count: int, schedule: Any, rates: Iterable[Any]) -> list[int]:
    """Later counts at which two schedules are compared: near ends of parts, and far apart.

    Args:
      count: the present count.
      schedule: the other system's schedule.
      rates: the rates of a leaf in `tx`, numbers and schedules.
    """
    rates = list(rates)
    counts = {end + i for end in ends_of_schedules((schedule, rates)) for i in (-1, 0, 1)}
    counts |= {count + (1 << i) for i in range(_LAST.bit_length())}
    last = _LAST
    is_foreign = isinstance(schedule, ForeignSchedule) and schedule.known is None
    if is_foreign or not all(is_own_schedule(x) for x in rates if callable(x)):
        # A schedule that adamjax does not know may change anywhere.
        counts |= {count + int(1.05**i) for i in range(_LAST_OF_FOREIGN.bit_length() * 14)}
        last = _LAST_OF_FOREIGN if is_foreign else _LAST_OF_FUNCTIONS
    return sorted(x for x in counts if count < x <= last)
