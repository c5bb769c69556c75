"""Compares the learning rates of torch's or Keras' optimizer with those of a transform."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamjax._compat import x64
from adamjax.convert.routes import SCALINGS, Routes, factor_of, rate_of, step_rate
from adamjax.convert.schedules import ForeignSchedule, later_counts
from adamjax.convert.source import Hyperparams
from adamjax.convert.systems import System
from adamjax.convert.values import same_value
from adamjax.scaling import scale, scale_by_learning_rate, set_to_zero
from adamjax.schedule import rate_at
from adamjax.structure import Part

__all__ = ["RateCheck"]

# The number of intervals between earlier counts at which rates are computed.
_EARLIER = 16


class RateCheck:
    """One comparison of rates and schedules.

    In all methods, `after` has the parts of a leaf's route from its last rule on.
    """

    def __init__(self, routes: Routes, system: System) -> None:
        self.owner, self.routes, self.system = routes.owner, routes, system
        # Schedules of the system, each with rates and scalings of tx that agree with it at all
        # compared counts.
        self._agreeing: list[tuple[Any, Any]] = []

    def check_rate(self, path: str, after: Sequence[Part], hyperparams: Hyperparams) -> None:
        """Compares the rate of the next step, and of later ones."""
        if hyperparams.get("incomparable_rate"):
            self._refuse_incomparable(path, after, hyperparams["incomparable_rate"])
        stated = hyperparams.get("learning_rate")
        if stated is None:
            return
        schedule, count = None, 0
        if callable(stated) or isinstance(stated, ForeignSchedule):
            # The system's schedule is called with the count of tx.
            rates = [part for part in after if isinstance(part.tx, scale_by_learning_rate)]
            schedule, count = stated, int((*rates, after[0])[0].state.count)
            try:
                stated = _stated_rate(schedule, count)
            except ValueError as error:
                self._refuse_incomparable(path, after, str(error))
        in_tx = step_rate(path, after)
        fix = "build tx with that rate (by_path, if leaves have rates of their own)"
        if self.owner.startswith("to_"):
            fix = self.system.set_rate
        if in_tx is not None and not _has_stated_rate(path, after, stated, schedule, count):
            self.system.refuse(
                self.owner,
                path,
                f"a learning rate of {float(stated):g}",
                f"{float(in_tx):g} for the next step",
                fix,
                _note_on_rate(path, after, stated, schedule),
            )
        is_set = self.routes.is_set("learning_rate", path)
        if in_tx is not None and schedule is not None and not is_set:
            self._check_later_rates(path, after, schedule, count)

    def check_schedule(self, path: str, after: Sequence[Part], hyperparams: Hyperparams) -> None:
        """Refuses a constant rate for an unknown schedule, unless the user sets the rate."""
        if not hyperparams.get("unknown_schedule") or self.routes.is_set("learning_rate", path):
            return
        scales = any(isinstance(part.tx, SCALINGS) or part.tx.has_foreign for part in after)
        is_frozen = any(isinstance(part.tx, set_to_zero) for part in after)
        may_follow = any(_may_follow_schedule(path, part) for part in after)
        if scales and (is_frozen or not may_follow):
            evidence, note = hyperparams["unknown_schedule"]
            self.system.refuse(
                self.owner,
                path,
                f"a learning rate that follows a schedule ({evidence})",
                "a constant one",
                "build tx with the schedule, or adamjax.constant(rate) for one that has ended",
                note,
            )

    def _refuse_incomparable(self, path: str, after: Sequence[Part], why: str) -> None:
        rates = [x for x in (rate_of(path, part) for part in after) if x is not None]
        self.system.refuse(
            self.owner,
            path,
            f"a learning rate that cannot be compared: {why}",
            f"the rate {rates[0]!r}" if rates else "none",
            "fix that function, or compare the two rates yourself",
        )

    def _check_later_rates(
        self, path: str, after: Sequence[Part], schedule: Any, count: int
    ) -> None:
        """Compares a schedule with that of a leaf in later steps.

        The steps are those near each count where a part of a schedule may end, and some others far
        apart.
        """
        rates = [rate_of(path, part) for part in after]
        in_tx = rates, _scalings(path, after)
        if any(schedule is agreed and in_tx == same for agreed, same in self._agreeing):
            return
        for later in later_counts(count, schedule, rates):
            try:
                stated = _stated_rate(schedule, later)
            except ValueError:
                continue  # The other library could not take that step.
            steps_later = later - count
            if not _has_stated_rate(path, after, stated, schedule, later, steps_later):
                self.system.refuse(
                    self.owner,
                    path,
                    f"a learning rate of {stated:g} after {later} steps",
                    f"{float(step_rate(path, after, steps_later)):g}",
                    "build tx with the same schedule",
                    _note_on_rate(path, after, stated, schedule, steps_later),
                )
        self._agreeing.append((schedule, in_tx))


def _stated_rate(schedule: Any, count: int) -> float:
    """The rate of a schedule, in float64 if possible; see `ForeignSchedule.stated`."""
    if isinstance(schedule, ForeignSchedule):
        return schedule.stated(count)
    with x64(True):
        return float(rate_at(schedule, jnp.asarray(count, int)))


def _scalings(path: str, after: Sequence[Part]) -> list[tuple[type, Any]]:
    """What the parts multiply a step by: factors, and the counts of rates."""
    scalings: list[tuple[type, Any]] = []
    for part in after:
        if isinstance(part.tx, scale_by_learning_rate):
            scalings.append((type(part.tx), int(part.state.count)))
        elif isinstance(part.tx, scale | set_to_zero):
            scalings.append((type(part.tx), factor_of(path, [part])))
    return scalings


def _may_follow_schedule(path: str, part: Part) -> bool:
    if part.tx.has_foreign:  # A transform without a state cannot count steps.
        return bool(jax.tree.leaves(part.state))
    return callable(rate_of(path, part))


def _has_stated_rate(
    path: str,
    after: Sequence[Part],
    stated: Any,
    schedule: Any = None,
    count: int = 0,
    steps_later: int = 0,
) -> bool:
    """Whether the next step, or a later one, has the stated rate, as `tx` computes it.

    Args:
      stated: the rate, in float64 if possible.
      schedule, count: the schedule that states the rate, if any, and its count.
    """
    in_step = float(step_rate(path, after, steps_later))
    is_foreign = isinstance(schedule, ForeignSchedule)
    if is_foreign and schedule.known is None:
        return schedule.is_near(count, in_step)
    if same_value(stated, in_step) or (is_foreign and schedule.is_near(count, in_step)):
        return True
    if not _has_stated_rate_in_float64(path, after, stated, steps_later):
        return False
    # In float32 some schedules are inaccurate, as a cosine near its end. An error that is small
    # compared with earlier rates is allowed.
    rates = [part for part in after if isinstance(part.tx, scale_by_learning_rate)]
    last = min((int(part.state.count) for part in rates), default=0) + steps_later
    earlier_rates = [
        float(step_rate(path, after, steps_later - last * i // _EARLIER))
        for i in range(_EARLIER + 1)
    ]
    largest = max((abs(x) for x in earlier_rates if math.isfinite(x)), default=0.0)
    return math.isclose(in_step, stated, rel_tol=1e-4, abs_tol=1e-6 * largest)


def _has_stated_rate_in_float64(
    path: str, after: Sequence[Part], stated: Any, steps_later: int = 0
) -> bool:
    """Whether a step would have the stated rate in float64 and with counts in int64."""
    try:
        with x64(True):
            return same_value(stated, step_rate(path, after, steps_later, jnp.int64))
    except TypeError:  # A function of another library may work in float32 only.
        return False


def _note_on_rate(
    path: str,
    after: Sequence[Part],
    stated: Any,
    schedule: Any = None,
    steps_later: int = 0,
) -> str:
    """A note for an error about a rate: why the two rates differ, if that is known."""
    if isinstance(schedule, ForeignSchedule) and schedule.note:
        return schedule.note
    if _has_stated_rate_in_float64(path, after, stated, steps_later):
        return (
            "in float64 the schedule of tx has that rate, but steps compute it in float32, and "
            "products of counts in int32; adamjax's own schedules are accurate in these dtypes"
        )
    return ""
