"""Learning rates as data: schedules, and a rate per leaf by the pattern its path matches.

A schedule is called with the count of the steps taken so far, 0 before the first, and computes
in float32 (float64 under x64). The formulas and the argument names are those of
`keras.optimizers.schedules`. Wherever a rate is expected, any other callable of the count does
as well, optax's schedules among them. What only a step can see, an array that is traced or set,
or what a callable returns, makes NaN where it is below 0, and where boundaries do not increase.
(What a callable returns between -1e-6 and 0 is 0: rounding leaves that of a rate that ends at 0.)
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

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
from adamjax.moments import as_count, expect_scalar, ranged, saturated
from adamjax.paths import (
    checked_rules,
    expect_matches,
    expect_present,
    first_match,
    flatten,
    leaf_paths,
    paired,
)

__all__ = [
    "Rate",
    "Schedule",
    "as_rate",
    "by_path",
    "constant",
    "cosine_decay",
    "exponential_decay",
    "inverse_time_decay",
    "piecewise_constant",
    "polynomial_decay",
    "rate_at",
    "rates_at",
    "warmup",
]


class Schedule(Data):
    """Base class: a frozen dataclass that is called with the count and returns a scalar.

    >>> import adamjax, jax.numpy as jnp
    >>> class halved(adamjax.Schedule):
    ...     initial: float
    ...
    ...     def __call__(self, count):
    ...         return self.initial * 0.5**count
    >>> adamjax.scale_by_learning_rate(halved(0.1))
    scale_by_learning_rate(learning_rate=halved(initial=0.1))
    """

    def __call__(self, count: chex.Numeric) -> chex.Array:
        """The value after `count` steps (int, 0 before the first), a float scalar."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its value is")


class _Compiled(Schedule):
    """Base class of the schedules here: read outside `jit`, the value is what a step computes.

    Compiled, a division by a constant is a product with its reciprocal, and sums and products are
    rounded together. Operation by operation the last bit would often be another. Python's numbers
    are constants here as in a step, arrays are arguments.

    Of an array that is traced or set, the value is not checked: what is below 0, infinite or NaN
    makes NaN, and 0 does what is near to it.
    """

    # What the fields may be that are numbers.
    _ranges: ClassVar[Mapping[str, Range]] = {}

    def __post_init__(self) -> None:
        for name, allowed in self._ranges.items():
            self.check_range(name, allowed)

    def __call__(self, count: chex.Numeric) -> chex.Array:
        count = _as_count(count)
        leaves, treedef = jax.tree.flatten(self)
        traced = any(isinstance(x, jax.core.Tracer) for x in (count, *leaves))
        if traced or not _is_ours(self):
            return self._checked_at(count)
        constants = tuple(None if is_array(x) else x for x in leaves)
        return _read(treedef, constants, [x if is_array(x) else None for x in leaves], count)

    def _checked_at(self, count: chex.Array) -> chex.Array:
        for path, x in jax.tree_util.tree_leaves_with_path(self):
            if np.ndim(x) != 0:
                field = jax.tree_util.keystr(path).lstrip(".")
                expect_scalar(f"{type(self).__name__}: {field}", x)
        made = copy.copy(self)
        for name, allowed in self._ranges.items():
            # Lengths, which may be whole, are looked at where they divide.
            if allowed.whole == "never":
                made.set_fields(**{name: ranged(getattr(self, name), NON_NEGATIVE)})
        return made.at(count)

    def at(self, count: chex.Array) -> chex.Array:
        """The value after `count` steps, an integer of 32 bits at least or a float.

        Fields are scalars, and NaN where they are out of their range.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its value is")


def _is_ours(schedule: Any) -> bool:
    """Whether nothing in a schedule is a function from elsewhere, which might not be traceable."""
    inner = (getattr(schedule, f.name) for f in dataclasses.fields(schedule))
    return isinstance(schedule, _Compiled) and all(
        _is_ours(x) for x in inner if isinstance(x, Schedule)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(treedef: Any, constants: Any, arrays: Any, count: chex.Array) -> chex.Array:
    pairs = zip(constants, arrays, strict=True)
    schedule = treedef.unflatten([c if x is None else x for c, x in pairs])
    return schedule._checked_at(count)


def _as_count(count: chex.Numeric) -> chex.Array:
    """A count as an array of at least 32 bits, signed; one that JAX would cut to 32 is refused.

    Of an unsigned array, which may be traced, what is beyond all counts is the largest.
    """
    if not isinstance(count, jax.Array):
        x = np.asarray(count)
        wide = jax.dtypes.canonicalize_dtype(np.int64) == np.int64
        if x.dtype == object or (not wide and x.dtype.kind in "iu" and np.any(x > LAST_COUNT)):
            raise ValueError(
                f"a schedule is called with a count of steps, a number up to {LAST_COUNT}; "
                f"got {count!r}"
            )
        count = jnp.asarray(x)
    if jnp.issubdtype(count.dtype, jnp.unsignedinteger):
        return saturated(count, jax.dtypes.canonicalize_dtype(np.int64))
    is_narrow = jnp.issubdtype(count.dtype, jnp.integer) and count.dtype.itemsize < 4
    return count.astype(jnp.int32) if is_narrow or count.dtype == bool else count


class wrapped(Schedule):
    """Any callable of the count as a schedule; the function is part of the structure."""

    function: Callable[[Any], Any] = static()

    def __call__(self, count: chex.Numeric) -> chex.Array:
        return _returned(self, self.function(count))

    def __repr__(self) -> str:
        return repr(self.function)


def _returned(rate: Any, value: Any) -> chex.Array:
    """What a callable returned as a rate, as an array; what is no real number is refused."""
    try:
        x = None if value is None else jnp.asarray(value)
    except (TypeError, ValueError):
        x = None
    kinds = (jnp.integer, jnp.floating)
    if x is None or not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        what = f"{value!r} of type {type(value).__name__}" if x is None else f"a {x.dtype.name}"
        raise TypeError(f"a rate must be a real number, got {what} from {rate!r}")
    return x


def _float(x: Any) -> chex.Array:
    return jnp.asarray(x, dtype=float)


def _product(factor: Number, x: chex.Array) -> chex.Array:
    """`factor * x`, which for a factor of 0 is 0 also where `x` is too large for a float."""
    if not is_array(factor) and factor != 0:
        return factor * x
    return factor * jnp.where((factor == 0) & jnp.isinf(x), 0, x)


class _Units(NamedTuple):
    """A count, measured in units of so many steps.

    Attributes:
      whole: the units that have passed, a float without a fraction.
      part: how much of the next one has, in [0, 1), exactly 0 at a multiple.
      left: how much of it is to come, in (0, 1].
    """

    whole: chex.Array
    part: chex.Array
    left: chex.Array

    @property
    def passed(self) -> chex.Array:
        return self.whole + self.part


def _units(count: chex.Array, steps: Number) -> _Units:
    """A count in units of `steps`; exact for whole steps, of which a float may be too coarse.

    A compiled quotient of floats is a product with a rounded reciprocal, so it may be a bit below
    a whole number where the count is a multiple. An array of steps, which may be traced, is not
    checked: 0 does what the least steps of its dtype do, and what is below makes NaN.
    """
    if not is_array(steps):
        if steps == math.floor(steps) and jnp.issubdtype(count.dtype, jnp.integer):
            return _whole_units(count, int(steps))
        return _float_units(_float(count), _float(steps))
    if jnp.issubdtype(steps.dtype, jnp.integer) and jnp.issubdtype(count.dtype, jnp.integer):
        both = jax.dtypes.canonicalize_dtype(jnp.promote_types(steps.dtype, count.dtype))
    else:
        both = None
    if both is not None and jnp.iinfo(both).max >= jnp.iinfo(steps.dtype).max:
        units = _whole_units(count.astype(both), jnp.maximum(steps, 1).astype(both))
    else:
        units = _float_units(_float(count), _float(steps))
    return _Units(*(jnp.where(steps >= 0, x, jnp.nan) for x in units))


def _whole_units(count: chex.Array, steps: Any) -> _Units:
    if isinstance(steps, int) and steps > jnp.iinfo(count.dtype).max:
        # No count gets there.
        part = _float(count) / float(steps)
        return _Units(jnp.zeros_like(part), part, 1 - part)
    whole = count // steps
    rest = count - whole * steps
    left = jnp.where(rest == 0, 1, _float(steps - rest) / _float(steps))
    return _Units(_float(whole), _float(rest) / _float(steps), left)


def _float_units(count: chex.Array, steps: chex.Array) -> _Units:
    """The same in floats: exact where products of `steps` with whole numbers are."""
    steps = jnp.maximum(steps, jnp.finfo(steps.dtype).tiny)
    near = jnp.floor(count / steps)
    near = jnp.where((near + 1) * steps <= count, near + 1, near)
    whole = jnp.where(near * steps > count, near - 1, near)
    # Of so many that they are infinite, no part counts.
    part = jnp.where(jnp.isinf(whole), 0, (count - whole * steps) / steps)
    return _Units(whole, part, 1 - part)


def _is_before(count: chex.Array, boundary: Number) -> chex.Array:
    """Whether `boundary < count`, compared as whole numbers where the count is one."""
    if not jnp.issubdtype(count.dtype, jnp.integer):
        return _float(boundary) < count
    limits = jnp.iinfo(count.dtype)
    if not is_array(boundary):
        # No count is between a number and the whole number below.
        below = math.floor(boundary)
        if not limits.min <= below < limits.max:
            return jnp.full(count.shape, below < limits.min)
        return np.asarray(below, count.dtype) < count
    if jnp.issubdtype(boundary.dtype, jnp.integer):
        return saturated(boundary, count.dtype) < count
    # Floats from the end on are above all counts.
    boundary = boundary.astype(jnp.promote_types(boundary.dtype, jnp.float32))
    end = np.asarray(float(limits.max) + 1, boundary.dtype)
    most = np.nextafter(end, np.zeros_like(end))
    below = jnp.clip(jnp.floor(boundary), float(limits.min), most).astype(count.dtype)
    return (below < count) & (boundary < end)


def _point(boundary: Number) -> chex.Array:
    """A boundary as an array: an integer where it can be one."""
    if not is_array(boundary) and boundary == math.floor(boundary) and abs(boundary) <= LAST_COUNT:
        return jnp.asarray(int(boundary), jnp.int32)
    return jnp.asarray(boundary)


class constant(_Compiled):
    """The same value at every count; at least 0.

    >>> import adamjax
    >>> float(adamjax.constant(0.5)(7))
    0.5
    """

    value: Number

    _ranges: ClassVar[Mapping[str, Range]] = {"value": NON_NEGATIVE}

    def at(self, count: chex.Array) -> chex.Array:
        return _float(self.value)


class inverse_time_decay(_Compiled):
    """`initial / (1 + decay_rate * count / decay_steps)`; `staircase` rounds the quotient down.

    With `decay_steps=1` this is what the legacy option `decay` of Keras does, so the initial
    rate may itself be a schedule, which is then multiplied.

    Args:
      initial_learning_rate: the rate at count 0, at least 0; or a schedule.
      decay_steps: steps per unit of decay, above 0.
      decay_rate: at least 0.
      staircase: decay at whole multiples of `decay_steps` only.

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
        units = _units(count, self.decay_steps)
        passed = units.whole if self.staircase else units.passed
        return rate_at(self.initial_learning_rate, count) / (1 + _product(self.decay_rate, passed))


class exponential_decay(_Compiled):
    """`initial * decay_rate ** (count / decay_steps)`; `staircase` rounds the exponent down.

    Args:
      initial_learning_rate: the rate at count 0, at least 0.
      decay_steps: steps until the rate has been multiplied by `decay_rate` once, above 0.
      decay_rate: above 0.
      staircase: decay at whole multiples of `decay_steps` only.

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
        units = _units(count, self.decay_steps)
        passed = units.whole if self.staircase else units.passed
        return _product(self.initial_learning_rate, self.decay_rate**passed)


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
        times = FINITE._replace(whole="kept")
        for name, allowed in (("boundaries", times), ("values", NON_NEGATIVE)):
            given: Any = getattr(self, name)
            if (is_array(given) and given.ndim == 0) or not isinstance(given, Iterable):
                raise TypeError(
                    f"piecewise_constant: {name} must be a list of numbers, got {given!r}; a rate "
                    "that never changes is constant(value)"
                )
            items = enumerate(given)
            checked = tuple(self._checked(f"{name}[{i}]", x, allowed) for i, x in items)
            self.set_fields(**{name: checked})
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"piecewise_constant: values must be one more than boundaries, got "
                f"{len(self.values)} values for {len(self.boundaries)} boundaries"
            )
        # Those mapped over have a shape, and their order is seen as they are called.
        known = [
            None if isinstance(b, jax.core.Tracer) or np.ndim(b) else np.asarray(b, np.float64)
            for b in self.boundaries
        ]
        for before, b in itertools.pairwise(known):
            if before is not None and b is not None and before >= b:
                raise ValueError(
                    f"piecewise_constant: boundaries must increase, got {list(self.boundaries)}"
                )

    def at(self, count: chex.Array) -> chex.Array:
        passed = sum(_is_before(count, b).astype(jnp.int32) for b in self.boundaries)
        values = [_float(ranged(v, NON_NEGATIVE)) for v in self.values]
        value = jnp.stack(values)[passed]
        for before, b in itertools.pairwise(self.boundaries):
            if is_array(before) or is_array(b):
                value = jnp.where(_is_before(_point(b), before), value, jnp.nan)
        return value


class polynomial_decay(_Compiled):
    """From the initial rate to `end_learning_rate` along `(1 - count / decay_steps) ** power`.

    Args:
      initial_learning_rate: the rate at count 0, at least 0.
      decay_steps: steps until the end is reached, above 0.
      end_learning_rate: the rate from then on, at least 0.
      power: of the decay, above 0; 1 is a straight line.
      cycle: rather than stay at the end, start again from the initial rate, with `decay_steps`
        stretched to the next of its multiples.

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
        units = _units(count, self.decay_steps)
        # What is left of the line: of the unit that the count is in, the first begins at 0.
        if self.cycle:
            at_end = (units.part == 0) & (units.whole > 0)
            length = units.whole + (units.part > 0)
            left = jnp.where(at_end, 0, units.left) / jnp.maximum(length, 1)
        else:
            left = jnp.where(units.whole >= 1, 0, units.left)
        falls = left**self.power
        if is_array(self.power):
            # A traced power of 0 ends where the smallest does.
            falls = jnp.where(left > 0, falls, 0 * falls)
        span = self.initial_learning_rate - self.end_learning_rate
        return self.end_learning_rate + span * falls


class cosine_decay(_Compiled):
    """Half a cosine from the initial rate to `alpha` times it, then constant.

    Loshchilov & Hutter, arXiv:1608.03983, eq. 5, without restarts.

    Args:
      initial_learning_rate: the rate at count 0, at least 0.
      decay_steps: steps until the end is reached, above 0.
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
        units = _units(count, self.decay_steps)
        done = jnp.where(units.whole >= 1, 1, units.part)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
        return self.initial_learning_rate * ((1 - self.alpha) * cosine + self.alpha)


class warmup(_Compiled):
    """A straight line from `start` to the schedule's first value, then the schedule from its 0.

    This is the warm-up of `keras.optimizers.schedules.CosineDecay`, for any schedule.

    Args:
      schedule: what follows: a float, an array or a schedule.
      steps: length of the line, a whole number of at least 1; at count `steps` the schedule
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
        first = rate_at(self.schedule, jnp.zeros_like(count))
        steps = as_count("warmup: steps", self.steps, count.dtype)
        # Of no steps the line is not read.
        length = _float(jnp.maximum(self.steps, 1))
        line = self.start + (first - self.start) * (_float(count) / length)
        later = rate_at(self.schedule, jnp.maximum(count - steps, 0))
        value = jnp.where(count < steps, line, later)
        return jnp.where(steps >= 0, value, jnp.nan) if is_array(self.steps) else value


class by_path(Data):
    """A rate for each leaf: that of the first pattern which is found in the leaf's path.

    Rates are absolute, not factors (capreolus' `AdamMultilr` calls this `pattern_lrs`). Use it
    wherever a learning rate or a weight decay is expected.

    Args:
      rules: pairs (pattern, rate), or a dictionary {pattern: rate}, in its order. A pattern is a
        regular expression for `re.search`; the path of a leaf is its keys joined by slashes,
        like `"encoder/layers/0/kernel"`. A rate is a float or array of at least 0, or a schedule.
      default: the rate of a leaf that no pattern matches.

    Raises:
      ValueError: by `init` of the transform whose rate this is, a pattern matches no leaf, or
        none that earlier ones leave (one that matches all leaves may stand last). Leaves that are
        `None` do not count; integer ones do. By `update` too, a pattern matches no leaf, where
        those without a gradient do count. `adamjax.optional(pattern)` allows it.

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
        rules = checked_rules("by_path", paired("by_path", self.patterns, self.values))
        self.set_fields(
            patterns=tuple(pattern for pattern, _ in rules),
            values=tuple(_as_rate("by_path: the rate of " + repr(p), r) for p, r in rules),
            default=_as_rate("by_path: default", self.default),
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
        now = object.__new__(by_path)
        now.set_fields(
            patterns=self.patterns,
            values=tuple(rate_at(value, count) for value in self.values),
            default=rate_at(self.default, count),
        )
        return now

    def __repr__(self) -> str:
        rules = list(zip(self.patterns, self.values, strict=True))
        return f"by_path({rules!r}, default={self.default!r})"


# Anything that gives a rate of at least 0: a number, an array, a callable of the count, by_path.
Rate = float | chex.Array | Callable[[Any], Any] | by_path


def _as_rate(name: str, value: Any, *, per_leaf: bool = False) -> Any:
    if isinstance(value, by_path) and not per_leaf:
        raise TypeError(
            f"{name} must be the same for all leaves, got by_path; turn it around: "
            "by_path takes schedules as its rates"
        )
    if isinstance(value, Schedule | by_path):
        return value
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be a number or a callable of the count, got the class {value.__name__}: "
            f"make one of it, {value.__name__}(...)"
        )
    if callable(value):
        return wrapped(value)
    try:
        return constant(value).value
    except (TypeError, ValueError) as error:
        kinds = "a callable of the count or by_path" if per_leaf else "or a callable of the count"
        wanted = f"{name} must be a number {NON_NEGATIVE.text}, {kinds}"
        raise type(error)(f"{wanted}; got {value!r}") from None


def as_rate(owner: Data, name: str, *, per_leaf: bool = True) -> Any:
    """The owner's field as a rate: checked, and any plain callable made a schedule."""
    return _as_rate(f"{type(owner).__name__}: {name}", getattr(owner, name), per_leaf=per_leaf)


# What the rounding of a function that ends at 0 leaves below it, for rates of up to 8: compiled,
# `optax.linear_schedule(0.1, 0.0, 1000)` ends at -5e-9.
_ROUNDED = 1e-6
_RATE = Range("at least 0", lambda x: x >= 0)


def rate_at(rate: Any, count: chex.Numeric) -> Any:
    """The rate after `count` steps: a number or a scalar array; for `by_path`, one of numbers.

    An array below 0 becomes NaN, but 0 where a callable returned what rounding leaves just below.
    (Schedules that grow may become infinite.)

    Raises:
      TypeError, ValueError: a callable returned what is no real number, or no scalar.
    """
    if isinstance(rate, by_path):
        return rate.resolve(count)
    value = rate
    if callable(rate):
        value = _returned(rate, rate(count))
        if not isinstance(rate, _Compiled):
            value = jnp.where((value < 0) & (value >= -_ROUNDED), 0, value)
    if np.ndim(value) != 0:
        who = f" from {rate!r}" if callable(rate) else ""
        raise ValueError(
            f"a rate must be a scalar, got one of shape {np.shape(value)}{who}; "
            "to train with many rates at once, map over the transform with jax.vmap"
        )
    # Those of this module are at least 0, as what they are made of is.
    return value if isinstance(rate, _Compiled) else ranged(value, _RATE)


def rates_at(owner: str, rate: Any, count: chex.Numeric, tree: Tree) -> list[Any]:
    """The rate of every leaf after `count` steps; one object for all leaves of one rule."""
    now = rate_at(rate, count)
    if isinstance(now, by_path):
        paths = leaf_paths(tree)
        expect_present(f"{owner}: by_path", now.patterns, tree, paths)
        return [now.at(path) for path in paths]
    return [now] * len(flatten(tree)[0])
