"""Learning rates as data: schedules, and a rate for each leaf by a pattern that its path matches.

A schedule is called with the count of the steps taken so far, 0 before the first, and computes
in float32 (float64 under x64). The formulas and the argument names are those of
`keras.optimizers.schedules`. Any other callable of the count can be a rate too, such as optax's
schedules. Some values can be checked only in a step: values of callables, and arrays that are
traced or set later. There a value below 0 makes the rate NaN, and so do boundaries that do not
increase. (Rounding may leave the last value of a rate that ends at 0 just below 0. So a callable's
value between -1e-6 and 0 counts as 0.) A count below 0 makes the rate NaN too. For example, in
`lambda count: schedule(count - 10)`, clip the difference at 0.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import (
    COUNT,
    FINITE,
    LAST_COUNT,
    NON_NEGATIVE,
    POSITIVE,
    STEPS,
    Data,
    Number,
    Range,
    Tree,
    is_array,
    static,
)
from adamjax.moments import (
    as_count,
    at_least_float32,
    checked_in_range,
    expect_scalar,
    saturating_cast,
)
from adamjax.numpy_arrays import native
from adamjax.paths import (
    checked_rules,
    expect_matches,
    expect_present,
    first_match,
    flatten,
    leaf_paths,
    paired,
)
from adamjax.units import as_float, in_units, power_of

__all__ = [
    "Rate",
    "Schedule",
    "as_rate",
    "by_path",
    "constant",
    "cosine_decay",
    "exponential_decay",
    "inverse_time_decay",
    "is_own_schedule",
    "piecewise_constant",
    "polynomial_decay",
    "rate_at",
    "rates_at",
    "warmup",
]


class Schedule(Data):
    """Base class of schedules: frozen dataclasses that map the count to a scalar.

    `check_range` raises an error for a value that is out of range or no number. The ranges are in
    `adamjax.extend`.

    >>> import adamjax, jax.numpy as jnp
    >>> class halved(adamjax.Schedule):
    ...     initial: float
    ...
    ...     def __post_init__(self):
    ...         self.check_range("initial", adamjax.extend.NON_NEGATIVE)
    ...
    ...     def __call__(self, count):
    ...         return self.initial * 0.5**count
    >>> adamjax.scale_by_learning_rate(halved(0.1))
    scale_by_learning_rate(learning_rate=halved(initial=0.1))
    """

    def __call__(self, count: chex.Numeric) -> chex.Array:
        """The value after `count` steps (int, 0 before the first), a float scalar."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


class _Compiled(Schedule):
    """Base class of the schedules here: a call outside `jit` has the same value as in a step.

    The call is compiled, because compiled code multiplies by the reciprocal of a constant divisor,
    and rounds sums and products together. If the call were not compiled, the last bit would often
    differ. As in a step, Python numbers are constants and arrays are arguments.

    An array that is traced or set later is not checked. A negative, infinite or NaN value, except
    of a boundary, makes the rate NaN. (The `decay_rate` of `exponential_decay` does so only where
    the exponent is not 0, the `power` of `polynomial_decay` only after count 0.) In a field that
    must be above 0, a float 0 acts as the limit of ever smaller numbers. As `decay_steps` an
    integer 0 acts as 1; as the `steps` of `warmup` it means that there is no line.
    """

    # The ranges of the fields that are numbers.
    _ranges: ClassVar[Mapping[str, Range]] = {}
    # Whether the value depends on the count.
    _follows_count: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, allowed in self._ranges.items():
            self.check_range(name, allowed)

    def __call__(self, count: chex.Numeric) -> chex.Array:
        count = _count_array(count)
        leaves, treedef = jax.tree.flatten(self)
        traced = any(isinstance(x, jax.core.Tracer) for x in (count, *leaves))
        if traced or not is_own_schedule(self):  # A user's function might not be traceable.
            return self._checked_at(count)
        constants = tuple(None if is_array(x) else x for x in leaves)
        return _compiled_call(
            treedef, constants, [x if is_array(x) else None for x in leaves], count
        )

    def _checked_at(self, count: chex.Array) -> chex.Array:
        for path, x in jax.tree_util.tree_leaves_with_path(self):
            if np.ndim(x) != 0:
                field = jax.tree_util.keystr(path).lstrip(".")
                expect_scalar(f"{type(self).__name__}: {field}", x)
        checked = copy.copy(self)
        for name, allowed in self._ranges.items():
            # An array below 0 becomes NaN. Numbers of steps may be integers and must stay integers:
            # `in_units` and `as_count` check arrays of them.
            value = getattr(self, name)
            if allowed.whole == "never":
                checked.set_fields(**{name: checked_in_range(value, NON_NEGATIVE)})
            elif not is_array(value):
                checked_in_range(value, allowed)
        value = checked.at(count)
        # Below count 0 the formulas are wrong: a cosine would decay until count 0, and then again.
        return jnp.where(count >= 0, value, jnp.nan) if self._follows_count else value

    def at(self, count: chex.Array) -> chex.Array:
        """The value after `count` steps; the count is a float or an integer of 32 bits or more.

        Fields are scalars, and NaN if they are out of their range.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method at")


def is_own_schedule(schedule: Any) -> bool:
    """Whether a schedule is of this module, with no function of a user in it."""
    fields = (getattr(schedule, f.name) for f in dataclasses.fields(schedule))
    return isinstance(schedule, _Compiled) and all(
        is_own_schedule(x) for x in fields if isinstance(x, Schedule)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled_call(treedef: Any, constants: Any, arrays: Any, count: chex.Array) -> chex.Array:
    pairs = zip(constants, arrays, strict=True)
    schedule = treedef.unflatten([c if x is None else x for c, x in pairs])
    return schedule._checked_at(count)


def _count_array(count: chex.Numeric) -> chex.Array:
    """A count as an array of floats, or of signed integers of 32 bits or more.

    Numbers of an unsigned array that exceed the largest signed integer become that integer.

    Raises:
      ValueError: the count is no real number, or JAX would cut off its upper bits.
    """
    if not isinstance(count, jax.Array):
        x = np.asarray(native("the count of a schedule", count))
        has_int64 = jax.dtypes.canonicalize_dtype(np.int64) == np.int64
        is_cut_off = not has_int64 and x.dtype.kind in "iu" and np.any(x > LAST_COUNT)
        if x.dtype == object or is_cut_off:
            raise _not_a_count(count)
        count = jnp.asarray(x)
    if jnp.issubdtype(count.dtype, jnp.complexfloating):
        raise _not_a_count(count)
    if jnp.issubdtype(count.dtype, jnp.unsignedinteger):
        return saturating_cast(count, jax.dtypes.canonicalize_dtype(np.int64))
    is_narrow = jnp.issubdtype(count.dtype, jnp.integer) and count.dtype.itemsize < 4
    return count.astype(jnp.int32) if is_narrow or count.dtype == bool else count


def _not_a_count(x: Any) -> ValueError:
    return ValueError(
        f"a schedule is called with a count of steps, a number up to {LAST_COUNT}; got {x!r}"
    )


class function_schedule(Schedule):
    """A callable of the count as a schedule; the callable is part of the pytree's structure."""

    function: Callable[[Any], Any] = static()

    def __call__(self, count: chex.Numeric) -> chex.Array:
        return _as_real_array(self, self.function(count))

    def __repr__(self) -> str:
        return repr(self.function)


def _as_real_array(rate: Any, value: Any) -> chex.Array:
    """The result of a rate as an array, or an error if it is not a real number."""
    try:
        x = None if value is None else jnp.asarray(value)
    except (TypeError, ValueError):
        x = None
    kinds = (jnp.integer, jnp.floating)
    if x is None or not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        result = f"{value!r} of type {type(value).__name__}" if x is None else f"a {x.dtype.name}"
        raise TypeError(f"a rate must be a real number, got {result} from {rate!r}")
    return x


def _product(factor: Number, x: chex.Array) -> chex.Array:
    """`factor * x`, and 0 for a factor of 0 even if `x` is infinite."""
    if not is_array(factor) and factor != 0:
        return factor * x
    return factor * jnp.where((factor == 0) & jnp.isinf(x), 0, x)


def _has_passed(count: chex.Array, boundary: Number) -> chex.Array:
    """Whether `count > boundary`, compared as whole numbers if the count is an integer."""
    if not jnp.issubdtype(count.dtype, jnp.integer):
        return as_float(boundary) < count
    limits = jnp.iinfo(count.dtype)
    if not is_array(boundary):
        # Rounding down is safe: no count lies between a number and the whole number below it.
        whole = math.floor(boundary)
        if not limits.min <= whole < limits.max:
            return jnp.full(count.shape, whole < limits.min)
        return np.asarray(whole, count.dtype) < count
    if jnp.issubdtype(boundary.dtype, jnp.integer):
        return saturating_cast(boundary, count.dtype) < count
    # A boundary of `end` or more exceeds all counts.
    boundary = boundary.astype(at_least_float32(boundary.dtype))
    end = np.asarray(float(limits.max) + 1, boundary.dtype)
    most = np.nextafter(end, np.zeros_like(end))
    whole = jnp.clip(jnp.floor(boundary), float(limits.min), most).astype(count.dtype)
    return (whole < count) & (boundary < end)


def _boundary_array(boundary: Number) -> chex.Array:
    """A boundary as an array, an integer if possible."""
    if not is_array(boundary) and boundary == math.floor(boundary) and abs(boundary) <= LAST_COUNT:
        return jnp.asarray(int(boundary), jnp.int32)
    return jnp.asarray(boundary)


class constant(_Compiled):
    """The same value at every count, at least 0.

    >>> import adamjax
    >>> float(adamjax.constant(0.5)(7))
    0.5
    """

    value: Number

    _ranges: ClassVar[Mapping[str, Range]] = {"value": NON_NEGATIVE}
    _follows_count: ClassVar[bool] = False

    def at(self, count: chex.Array) -> chex.Array:
        return as_float(self.value)


class inverse_time_decay(_Compiled):
    """`initial / (1 + decay_rate * count / decay_steps)`.

    `staircase` rounds `count / decay_steps` down. With `decay_steps=1` this is the legacy option
    `decay` of Keras. In Keras, that option may come with a schedule as the learning rate. So the
    initial rate may be a schedule here too. Its value at the count is divided by the denominator.

    Args:
      initial_learning_rate: the rate at count 0, at least 0; or a schedule.
      decay_steps: the number of steps in which `count / decay_steps` grows by 1, above 0.
      decay_rate: at least 0.
      staircase: whether to decay only at whole multiples of `decay_steps`.

    >>> import adamjax
    >>> float(adamjax.inverse_time_decay(1.0, decay_steps=1, decay_rate=0.25)(4))
    0.5
    """

    initial_learning_rate: Any
    decay_steps: Number
    decay_rate: Number
    staircase: bool = static(default=False)

    _ranges: ClassVar[Mapping[str, Range]] = {"decay_steps": STEPS, "decay_rate": NON_NEGATIVE}

    def __post_init__(self) -> None:
        self.set_fields(
            initial_learning_rate=as_rate(self, "initial_learning_rate", per_leaf=False)
        )
        super().__post_init__()
        self.check_flag("staircase")

    def at(self, count: chex.Array) -> chex.Array:
        units = in_units(count, self.decay_steps)
        passed = units.whole if self.staircase else units.passed
        rate = _rate_of_shape(self.initial_learning_rate, count, count.shape)
        return rate / (1 + _product(self.decay_rate, passed))


class exponential_decay(_Compiled):
    """`initial * decay_rate ** (count / decay_steps)`; `staircase` rounds the exponent down.

    Args:
      initial_learning_rate: the rate at count 0, at least 0.
      decay_steps: the steps in which the rate is multiplied by `decay_rate` once, above 0.
      decay_rate: above 0.
      staircase: whether to decay only at whole multiples of `decay_steps`.

    >>> import adamjax
    >>> float(adamjax.exponential_decay(1.0, decay_steps=10, decay_rate=0.25)(5))
    0.5
    """

    initial_learning_rate: Number
    decay_steps: Number
    decay_rate: Number
    staircase: bool = static(default=False)

    _ranges: ClassVar[Mapping[str, Range]] = {
        "initial_learning_rate": NON_NEGATIVE,
        "decay_steps": STEPS,
        "decay_rate": POSITIVE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flag("staircase")

    def at(self, count: chex.Array) -> chex.Array:
        units = in_units(count, self.decay_steps)
        if self.staircase:
            units = units._replace(fraction=jnp.zeros_like(units.fraction))
        is_wide = jnp.finfo(units.whole.dtype).nmant > 50
        if is_array(self.decay_rate) or is_wide:
            power = self.decay_rate**units.passed
        else:
            power = power_of(self.decay_rate, units)
        return _product(self.initial_learning_rate, power)


_NOT_INCREASING = "piecewise_constant: boundaries must increase, got {}"


class piecewise_constant(_Compiled):
    """`values[i]`, where i is the number of boundaries that the count has passed.

    Args:
      boundaries: increasing counts; a count equal to a boundary has not passed it.
      values: rates of at least 0, one more than there are boundaries.

    >>> import adamjax
    >>> rate = adamjax.piecewise_constant([100, 200], [1.0, 0.5, 0.25])
    >>> [float(rate(count)) for count in (0, 100, 101, 200, 201)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    boundaries: Any
    values: Any

    def __post_init__(self) -> None:
        boundary_range = dataclasses.replace(FINITE, whole="kept")
        for name, allowed in (("boundaries", boundary_range), ("values", NON_NEGATIVE)):
            numbers: Any = getattr(self, name)
            # A set has no order. A dictionary is optax's form, which has factors in place of rates.
            unordered = isinstance(numbers, Mapping | set | frozenset)
            is_scalar = is_array(numbers) and numbers.ndim == 0
            if unordered or is_scalar or not isinstance(numbers, Iterable):
                raise TypeError(
                    f"piecewise_constant: {name} must be a list of numbers, got {numbers!r}; a "
                    "rate that never changes is constant(value)"
                )
            items = enumerate(numbers)
            checked = tuple(self._checked(f"{name}[{i}]", x, allowed) for i, x in items)
            self.set_fields(**{name: checked})
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                "piecewise_constant: there must be one more value than boundaries, got "
                f"{len(self.values)} values for {len(self.boundaries)} boundaries"
            )
        # Boundaries that `vmap` will map over have a shape here; `at` checks their order.
        floats = [
            None if isinstance(b, jax.core.Tracer) or np.ndim(b) else np.asarray(b, np.float64)
            for b in self.boundaries
        ]
        for before, b in itertools.pairwise(floats):
            if before is not None and b is not None and before >= b:
                raise ValueError(_NOT_INCREASING.format(list(self.boundaries)))

    def at(self, count: chex.Array) -> chex.Array:
        passed = sum(_has_passed(count, b).astype(jnp.int32) for b in self.boundaries)
        values = [as_float(checked_in_range(v, NON_NEGATIVE)) for v in self.values]
        value = jnp.stack(values)[passed]
        # Boundaries must increase. Compare two of them like a count and a boundary.
        for before, b in itertools.pairwise(self.boundaries):
            if is_array(before) or is_array(b):
                value = jnp.where(_has_passed(_boundary_array(b), before), value, jnp.nan)
            elif before >= b:  # `jax.tree.map` may have set them.
                raise ValueError(_NOT_INCREASING.format(list(self.boundaries)))
        return value


class polynomial_decay(_Compiled):
    """From the initial rate to `end_learning_rate` along `(1 - count / decay_steps) ** power`.

    Args:
      initial_learning_rate: the rate at count 0, at least 0.
      decay_steps: the steps until the end, above 0.
      end_learning_rate: the rate from then on, at least 0.
      power: above 0; 1 is a straight line.
      cycle: whether the rate jumps up after each multiple of `decay_steps` and decays again. The
        formula then has the smallest multiple of `decay_steps` that is not below the count, in
        place of `decay_steps`. So the rate does not jump to the initial rate: with a power of 1
        and an end of 0, it jumps to half the initial rate, then to a third of it.

    >>> import adamjax
    >>> rate = adamjax.polynomial_decay(1.0, decay_steps=100, end_learning_rate=0.5)
    >>> [float(rate(count)) for count in (0, 50, 100, 150)]
    [1.0, 0.75, 0.5, 0.5]
    """

    initial_learning_rate: Number
    decay_steps: Number
    end_learning_rate: Number = 1e-4
    power: Number = 1.0
    cycle: bool = static(default=False)

    _ranges: ClassVar[Mapping[str, Range]] = {
        "initial_learning_rate": NON_NEGATIVE,
        "decay_steps": STEPS,
        "end_learning_rate": NON_NEGATIVE,
        "power": POSITIVE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flag("cycle")

    def at(self, count: chex.Array) -> chex.Array:
        units = in_units(count, self.decay_steps)
        # `left` is the fraction of the decay that is left: 0 at the end of a cycle. There
        # `units.left` is 1, because the next unit begins at that count.
        if self.cycle:
            at_end = (units.fraction == 0) & (units.whole > 0)
            length = units.whole + jnp.sign(units.fraction)
            left = jnp.where(at_end, 0, units.left) / jnp.maximum(length, 1)
        else:
            left = jnp.where(units.whole >= 1, 0, units.left)
        share = left**self.power
        if is_array(self.power):
            # A traced power may be 0, and 0**0 is 1. At the end `share` must be 0, or NaN if it is.
            share = jnp.where(left > 0, share, 0 * share)
        span = self.initial_learning_rate - self.end_learning_rate
        return self.end_learning_rate + span * share


class cosine_decay(_Compiled):
    """Half a cosine from the initial rate to `alpha` times it, then constant.

    Loshchilov & Hutter, arXiv:1608.03983, eq. 5, without restarts.

    Args:
      initial_learning_rate: the rate at count 0, at least 0.
      decay_steps: the steps until the end, above 0.
      alpha: the final rate as a fraction of the initial one, at least 0.

    >>> import adamjax
    >>> rate = adamjax.cosine_decay(1.0, decay_steps=100)
    >>> [round(float(rate(count)), 6) for count in (0, 50, 100, 150)]
    [1.0, 0.5, 0.0, 0.0]
    """

    initial_learning_rate: Number
    decay_steps: Number
    alpha: Number = 0.0

    _ranges: ClassVar[Mapping[str, Range]] = {
        "initial_learning_rate": NON_NEGATIVE,
        "decay_steps": STEPS,
        "alpha": NON_NEGATIVE,
    }

    def at(self, count: chex.Array) -> chex.Array:
        units = in_units(count, self.decay_steps)
        done = jnp.where(units.whole >= 1, 1, units.fraction)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
        alpha = as_float(self.alpha)
        return as_float(self.initial_learning_rate) * ((1 - alpha) * cosine + alpha)


class warmup(_Compiled):
    """A straight line from `start` to the schedule's first value, then the schedule.

    This is the warm-up of `keras.optimizers.schedules.CosineDecay`, for any schedule.

    Args:
      schedule: the rate after the line: a float, an array or a schedule.
      steps: the length of the line, a whole number of at least 1; at count `steps` the schedule
        is at its count 0.
      start: the rate at count 0, at least 0.

    >>> import adamjax
    >>> rate = adamjax.warmup(adamjax.constant(1.0), steps=4)
    >>> [float(rate(count)) for count in (0, 1, 2, 3, 4, 5)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    schedule: Any
    steps: Number
    start: Number = 0.0

    _ranges: ClassVar[Mapping[str, Range]] = {"steps": COUNT, "start": NON_NEGATIVE}

    def __post_init__(self) -> None:
        self.set_fields(schedule=as_rate(self, "schedule", per_leaf=False))
        super().__post_init__()

    def at(self, count: chex.Array) -> chex.Array:
        first = _rate_of_shape(self.schedule, jnp.zeros_like(count), count.shape)
        steps = as_count("warmup: steps", self.steps, count.dtype)
        # If `steps` is 0, the line is not used, but it must not contain 0/0.
        length = as_float(jnp.maximum(self.steps, 1))
        line = self.start + (first - self.start) * (as_float(count) / length)
        later = _rate_of_shape(self.schedule, jnp.maximum(count - steps, 0), count.shape)
        value = jnp.where(count < steps, line, later)
        return jnp.where(steps >= 0, value, jnp.nan) if is_array(self.steps) else value


class by_path(Data):
    """A rate for each leaf: the rate of the first pattern that matches the leaf's path.

    Rates are absolute, not factors (`AdamMultilr` of the package capreolus calls this
    `pattern_lrs`). Use it wherever a learning rate or a weight decay is expected.

    Args:
      rules: pairs (pattern, rate), or a dictionary {pattern: rate}, in the order in which
        they are tried. A pattern is a regular expression for `re.search`; the path of a leaf is its
        keys joined by slashes, like `"encoder/layers/0/kernel"`. A rate is a float or array of at
        least 0, or a schedule.
      default: the rate of a leaf that no pattern matches.

    Raises:
      ValueError: a pattern matches no leaf. `init` and `update` of the transform with this rate
        check that. An integer leaf counts as a match. A leaf that is `None` counts in `update`, but
        not in `init`. `init` also refuses a pattern without effect: earlier patterns match all of
        its leaves. (A pattern for the rest, like `".*"`, is allowed.)
        `adamjax.optional(pattern)` may match no leaf or have no effect.

    >>> import adamjax
    >>> rates = adamjax.by_path({"^bert": 2e-5, "bias$": 0.0}, default=1e-3)
    >>> rates.at("bert/kernel"), rates.at("head/bias"), rates.at("head/kernel")
    (2e-05, 0.0, 0.001)
    """

    patterns: tuple[str, ...] = static()
    values: tuple[Any, ...]
    default: Any

    def __init__(
        self, rules: Iterable[tuple[str, Any]] | Mapping[str, Any], *, default: Any
    ) -> None:
        rules = checked_rules("by_path", rules)
        self.set_fields(
            patterns=tuple(pattern for pattern, _ in rules),
            values=tuple(rate for _, rate in rules),
            default=default,
        )
        self.__post_init__()

    def __post_init__(self) -> None:
        # `replace` and `from_config` set the fields without `__init__`, so all is checked here too.
        rules = checked_rules("by_path", paired("by_path", self.patterns, self.values))
        self.set_fields(
            patterns=tuple(pattern for pattern, _ in rules),
            values=tuple(_checked_rate("by_path: the rate of " + repr(p), r) for p, r in rules),
            default=_checked_rate("by_path: default", self.default),
        )

    def at(self, path: str) -> Any:
        """The rate of the leaf with this path."""
        index = first_match(self.patterns, path)
        return self.default if index is None else self.values[index]

    def expect_matches(self, owner: str, tree: Tree) -> None:
        """Refuses patterns that decide the rate of no leaf of the tree."""
        expect_matches(f"{owner}: by_path", self.patterns, tree, first_decides=True)

    def resolve(self, count: chex.Numeric) -> "by_path":
        """The same patterns with every schedule replaced by its value at the count."""
        resolved = object.__new__(by_path)
        resolved.set_fields(
            patterns=self.patterns,
            values=tuple(rate_at(value, count) for value in self.values),
            default=rate_at(self.default, count),
        )
        return resolved

    def __repr__(self) -> str:
        rules = list(zip(self.patterns, self.values, strict=True))
        return f"by_path({rules!r}, default={self.default!r})"


# A rate of at least 0: a number, an array, a callable of the count, or by_path.
Rate = float | chex.Array | Callable[[Any], Any] | by_path


def _checked_rate(name: str, value: Any, *, per_leaf: bool = False) -> Any:
    """Checks a rate and returns it; a plain callable becomes a schedule."""
    if isinstance(value, by_path) and not per_leaf:
        raise TypeError(
            f"{name} must be the same for all leaves, got by_path; put schedules into by_path "
            "instead, as its rates"
        )
    if isinstance(value, Schedule | by_path):
        return value
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be a number or a callable of the count, got the class {value.__name__}: "
            f"make an instance, {value.__name__}(...)"
        )
    if callable(value):
        return function_schedule(value)
    value = native(name, value)
    try:
        return constant(value).value  # `constant` checks it.
    except (TypeError, ValueError) as error:
        kinds = "a callable of the count or by_path" if per_leaf else "or a callable of the count"
        message = f"{name} must be a number that is {NON_NEGATIVE.text}, {kinds}"
        raise type(error)(f"{message}; got {value!r}") from None


def as_rate(owner: Data, name: str, *, per_leaf: bool = True) -> Any:
    """The field `name` of `owner` as a checked rate; a plain callable becomes a schedule.

    It does not set the field. In `__post_init__`, write
    `self.set_fields(learning_rate=extend.as_rate(self, "learning_rate"))`.

    Args:
      owner: the transform or schedule itself, `self`.
      name: the field's name.
      per_leaf: whether `by_path` is allowed.
    """
    return _checked_rate(f"{type(owner).__name__}: {name}", getattr(owner, name), per_leaf=per_leaf)


# Rounding may leave the last value of a function that ends at 0 below 0, by less than this for
# rates of up to 8: compiled, `optax.linear_schedule(0.1, 0.0, 1000)` ends at -5e-9.
_ROUNDING = 1e-6
# Unlike NON_NEGATIVE, this range includes infinity, which a schedule that grows may reach.
_RATE = Range("at least 0", lambda x: x >= 0)


def rate_at(rate: Any, count: chex.Numeric) -> Any:
    """The rate after `count` steps: a number or a scalar array, or `by_path` with such rates.

    A value below 0 becomes NaN. But if rounding left a callable's value just below 0, it becomes 0.
    (Schedules that grow may become infinite.)

    Raises:
      TypeError, ValueError: a callable did not return a real scalar.
    """
    if isinstance(rate, by_path):
        return rate.resolve(count)
    return _rate_of_shape(rate, count, ())


def _rate_of_shape(rate: Any, count: chex.Numeric, shape: tuple[int, ...]) -> Any:
    """The rate as `rate_at` returns it, a scalar or of this shape.

    A schedule that is called with a vector of counts calls the schedule inside it with a vector.
    """
    value = rate
    if callable(rate):
        value = _as_real_array(rate, rate(count))
        if not isinstance(rate, _Compiled):
            value = jnp.where((value < 0) & (value >= -_ROUNDING), 0, value)
    if np.shape(value) not in ((), shape):
        source = f" from {rate!r}" if callable(rate) else ""
        raise ValueError(
            f"a rate must be a scalar, got one of shape {np.shape(value)}{source}; "
            "to train with many rates at once, map over the transform with jax.vmap"
        )
    # The schedules of this module are at least 0, because their fields are.
    return value if isinstance(rate, _Compiled) else checked_in_range(value, _RATE)


def rates_at(owner: str, rate: Any, count: chex.Numeric, tree: Tree) -> list[Any]:
    """The rate of every leaf after `count` steps; the same object for all leaves of one pattern."""
    value = rate_at(rate, count)
    if isinstance(value, by_path):
        paths = leaf_paths(tree)
        expect_present(f"{owner}: by_path", value.patterns, tree, paths)
        return [value.at(path) for path in paths]
    return [value] * len(flatten(tree)[0])
