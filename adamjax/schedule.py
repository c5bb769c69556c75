"""Learning rates as data: schedules, and a rate per leaf by the pattern its path matches.

A schedule is called with the count of the steps taken so far, 0 before the first, and computes
in float32 (float64 under x64). The formulas and the argument names are those of
`keras.optimizers.schedules`. Wherever a rate is expected, any other callable of the count does
as well, optax's schedules among them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from adamjax.data import COUNT, FINITE, NON_NEGATIVE, POSITIVE, Data, Number, Tree, is_array, static
from adamjax.paths import checked_rules, expect_matches, first_match, flatten, leaf_paths

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


class wrapped(Schedule):
    """Any callable of the count as a schedule; the function is part of the structure."""

    function: Callable[[Any], Any] = static()

    def __call__(self, count: chex.Numeric) -> chex.Array:
        return jnp.asarray(self.function(count))

    def __repr__(self) -> str:
        return repr(self.function)


def _steps(count: chex.Numeric) -> chex.Array:
    return jnp.asarray(count, dtype=float)


class constant(Schedule):
    """The same value at every count; at least 0.

    >>> import adamjax
    >>> float(adamjax.constant(0.5)(7))
    0.5
    """

    value: Number

    def __post_init__(self) -> None:
        self._check("value", NON_NEGATIVE)

    def __call__(self, count: chex.Numeric) -> chex.Array:
        return jnp.asarray(self.value, dtype=float)


class inverse_time_decay(Schedule):
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

    def __post_init__(self) -> None:
        self._set(initial_learning_rate=as_rate(self, "initial_learning_rate", per_leaf=False))
        self._check("decay_steps", POSITIVE)
        self._check("decay_rate", NON_NEGATIVE)

    def __call__(self, count: chex.Numeric) -> chex.Array:
        units = _steps(count) / self.decay_steps
        if self.staircase:
            units = jnp.floor(units)
        return rate_at(self.initial_learning_rate, count) / (1 + self.decay_rate * units)


class exponential_decay(Schedule):
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

    def __post_init__(self) -> None:
        self._check("initial_learning_rate", NON_NEGATIVE)
        self._check("decay_steps", POSITIVE)
        self._check("decay_rate", POSITIVE)

    def __call__(self, count: chex.Numeric) -> chex.Array:
        units = _steps(count) / self.decay_steps
        if self.staircase:
            units = jnp.floor(units)
        return self.initial_learning_rate * self.decay_rate**units


class piecewise_constant(Schedule):
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
        for name, allowed in (("boundaries", FINITE), ("values", NON_NEGATIVE)):
            items = enumerate(getattr(self, name))
            checked = tuple(self._checked(f"{name}[{i}]", x, allowed) for i, x in items)
            self._set(**{name: checked})
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"piecewise_constant: values must be one more than boundaries, got "
                f"{len(self.values)} values for {len(self.boundaries)} boundaries"
            )
        if all(not is_array(b) for b in self.boundaries) and np.any(np.diff(self.boundaries) <= 0):
            raise ValueError(
                f"piecewise_constant: boundaries must increase, got {list(self.boundaries)}"
            )

    def __call__(self, count: chex.Numeric) -> chex.Array:
        step = _steps(count)
        passed = sum((step > b).astype(jnp.int32) for b in self.boundaries)
        return jnp.stack([jnp.asarray(v, dtype=float) for v in self.values])[passed]


class polynomial_decay(Schedule):
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

    def __post_init__(self) -> None:
        self._check("initial_learning_rate", NON_NEGATIVE)
        self._check("decay_steps", POSITIVE)
        self._check("end_learning_rate", NON_NEGATIVE)
        self._check("power", POSITIVE)

    def __call__(self, count: chex.Numeric) -> chex.Array:
        units = _steps(count) / self.decay_steps
        done = units / jnp.maximum(jnp.ceil(units), 1) if self.cycle else jnp.minimum(units, 1)
        span = self.initial_learning_rate - self.end_learning_rate
        return self.end_learning_rate + span * (1 - done) ** self.power


class cosine_decay(Schedule):
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

    def __post_init__(self) -> None:
        self._check("initial_learning_rate", NON_NEGATIVE)
        self._check("decay_steps", POSITIVE)
        self._check("alpha", NON_NEGATIVE)

    def __call__(self, count: chex.Numeric) -> chex.Array:
        done = jnp.minimum(_steps(count) / self.decay_steps, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
        return self.initial_learning_rate * ((1 - self.alpha) * cosine + self.alpha)


class warmup(Schedule):
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

    def __post_init__(self) -> None:
        self._set(schedule=as_rate(self, "schedule", per_leaf=False))
        self._check("steps", COUNT)
        self._check("start", NON_NEGATIVE)

    def __call__(self, count: chex.Numeric) -> chex.Array:
        count = jnp.asarray(count)
        first = rate_at(self.schedule, jnp.zeros_like(count))
        line = self.start + (first - self.start) * (_steps(count) / self.steps)
        later = rate_at(self.schedule, jnp.maximum(count - self.steps, 0))
        return jnp.where(count < self.steps, line, later)


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
        `None` do not count; integer ones do. `adamjax.optional(pattern)` allows it.

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
        self._set(
            patterns=tuple(pattern for pattern, _ in rules),
            values=tuple(rate for _, rate in rules),
            default=default,
        )
        self.__post_init__()

    def __post_init__(self) -> None:
        rules = checked_rules("by_path", zip(self.patterns, self.values, strict=True))
        self._set(
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
        now._set(
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


def rate_at(rate: Any, count: chex.Numeric) -> Any:
    """The rate after `count` steps: a number or a scalar array; for `by_path`, one of numbers."""
    if isinstance(rate, by_path):
        return rate.resolve(count)
    value = rate(count) if callable(rate) else rate
    if np.ndim(value) != 0:
        raise ValueError(
            f"a rate must be a scalar, got one of shape {np.shape(value)}; "
            "to train with many rates at once, map over the transform with jax.vmap"
        )
    return value


def rates_at(rate: Any, count: chex.Numeric, tree: Tree) -> list[Any]:
    """The rate of every leaf after `count` steps; one object for all leaves of one rule."""
    now = rate_at(rate, count)
    if isinstance(now, by_path):
        return [now.at(path) for path in leaf_paths(tree)]
    return [now] * len(flatten(tree)[0])
