"""At which later counts of their schedules the steps of two optimizers are compared."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState
from adamjax.convert.advance import may_count_calls
from adamjax.convert.paired_steps import PairedSteps
from adamjax.convert.programs import whole_numbers
from adamjax.convert.schedules import ends_of_schedules, has_schedule
from adamjax.convert.source import Source
from adamjax.scaling import ScheduleState
from adamjax.schedule import by_path
from adamjax.structure import Part, states_of_class

__all__ = ["Peaks", "later_counts"]

# Later counts are compared without gaps up to the first of these, at intervals of 3% up to the
# second, and at powers of two up to the last; fewer of them if the limits below require it.
_EACH, _CLOSE, _LAST = 500, 1 << 20, 1 << 24
# Limits on the later counts: their number, and for all of them the calls and the updated elements.
# A large model, or one with many micro-batches, is compared at fewer counts. But up to so many near
# the ends of schedules are always compared.
_MOST_COUNTS, _FEWEST_COUNTS, _MOST_CALLS, _MOST_ELEMENTS = 400, 12, 10_000, 1 << 29
_FEWEST_ENDS = 128
# The time that a leaf takes beyond that of its elements, as a number of elements.
_OF_A_LEAF = 5_000


def later_counts(
    ours: AdamjaxState, state: Any, source: Source, steps: PairedSteps, each: int
) -> Iterator[tuple[str, int]]:
    """Later counts at which steps are compared: a name for errors, and the steps until then.

    Args:
      ours, state: the states of adamjax and of optax.
      source: the state of optax in the common form.
      steps: takes the steps.
      each: the number of steps that are compared at each count.
    """
    scheduled = [part for part in ours.parts if has_schedule(part.tx)]
    # Transforms that conversions do not know may follow a count of their own.
    others_count = any(map(may_count_calls, source.other_states))
    if not (scheduled or source.counts or source.accumulated or others_count):
        return
    our_counts = {int(x.count) for x in states_of_class(ScheduleState, ours.state)}
    now = our_counts | {count.value for count in source.counts} or {0}
    calls, size = steps.calls, steps.num_elements + _OF_A_LEAF * len(steps.leaves)
    most = min(_MOST_COUNTS, _MOST_CALLS // (each * calls), _MOST_ELEMENTS // (each * calls * size))
    most = max(most, _FEWEST_COUNTS)
    # From these the steps pass the end of a part of a schedule, which counts steps or calls.
    near_ends: list[int] = []
    ends = _ends(ours, steps.program((ours.state, state)), each)
    units = _units(ours, source, calls)
    for end, count, unit in itertools.product(ends, sorted(now), units):
        start = (end - count) // unit - 2
        if start > 0 and not any(abs(start - other) <= 1 for other in near_ends):
            near_ends.append(start)
    near_ends = near_ends[: max(most - most // 3, _FEWEST_ENDS)]
    grid = {*range(each, _EACH, each), *(1 << i for i in range(_LAST.bit_length()))}
    grid |= {int(_EACH * 1.03**i) for i in range(int(math.log(_CLOSE / _EACH) / 0.03))}
    ordered = sorted(grid)
    most_of_grid = max(most - len(near_ends), _FEWEST_COUNTS)
    chosen = {*near_ends, *ordered[:: -(-len(ordered) // most_of_grid)]}
    for later in sorted(chosen):
        if not any(_is_negative(ours, part, later, calls, each) for part in scheduled):
            yield f"count {min(later + count for count in now)}", later


def _units(ours: AdamjaxState, source: Source, calls: int) -> set[int]:
    """By how much the counts of schedules go up in a step: 1 inside an accumulation."""
    are_inside = {ours.num_accumulations(part) > 0 for part in ours.parts if has_schedule(part.tx)}
    are_inside |= {count.in_accumulating for count in source.counts}
    if not are_inside or any(map(may_count_calls, source.other_states)):
        are_inside = {True, False}
    return {1 if is_inside else calls for is_inside in are_inside}


def _ends(ours: AdamjaxState, program: Any, each: int) -> list[int]:
    """Counts where parts of schedules may end, the likeliest first."""
    ends = dict.fromkeys(ends_of_schedules(ours.tx))
    # A schedule that is a function shows its numbers only in the program of an update.
    ends |= dict.fromkeys(ends_of_schedules([n for n in whole_numbers(program) if n >= each]))
    return list(ends)


def _is_negative(ours: AdamjaxState, part: Part, later: int, calls: int, each: int) -> bool:
    """Whether a rate is below 0 soon after so many steps, as after the end of a training."""
    rate = getattr(part.tx, "learning_rate", None)
    if ours.num_accumulations(part):
        calls = 1  # Inside, the schedule counts steps.
    rates = (*rate.values, rate.default) if isinstance(rate, by_path) else (rate,)
    first = int(getattr(part.state, "count", 0)) + later * calls
    return any(
        callable(x) and float(x(jnp.int32(count))) < 0
        for x, count in itertools.product(rates, (first, first + each * calls))
    )


class Peaks:
    """The later counts at which the updates of leaves are largest, because their rates are.

    Steps with one size of weights are compared with each other alone: a decay of large weights
    makes updates larger.
    """

    def __init__(self) -> None:
        self._largest: dict[float | None, np.ndarray] = {}
        self._steps: dict[float | None, np.ndarray] = {}

    def add(self, weight_size: float | None, largest: np.ndarray, steps: int) -> None:
        """Adds the largest updates by leaf after so many steps."""
        largest = np.where(np.isfinite(largest), largest, 0)
        so_far = self._largest.setdefault(weight_size, np.zeros_like(largest))
        is_larger = largest > so_far
        at = self._steps.setdefault(weight_size, np.zeros(len(largest), int))
        self._steps[weight_size] = np.where(is_larger, steps, at)
        self._largest[weight_size] = np.maximum(largest, so_far)

    def steps(self) -> list[int]:
        """The numbers of steps after which some leaf has its largest update, without 0."""
        found, leaves = np.unique(np.concatenate([[0], *self._steps.values()]), return_counts=True)
        # Those of the most leaves come first.
        return [int(x) for x in found[np.argsort(-leaves, kind="stable")] if x]
