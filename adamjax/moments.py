"""Arithmetic on one array: averages, bias corrections, dtypes, a root with a derivative at 0."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import BETA, COUNT, NON_NEGATIVE, Number, Range, is_array
from adamjax.encoding import Scaled8, block_exponents, map_stored
from adamjax.rounding import is_narrow, read_slot, write_slot

__all__ = [
    "Average",
    "Recurrence",
    "WrongResultError",
    "add_update",
    "as_count",
    "at_least_float32",
    "averaging",
    "barrier",
    "checked_in_range",
    "checked_results",
    "complement",
    "compute_dtype",
    "correction",
    "expect_scalar",
    "is_signed",
    "magnitude",
    "next_count",
    "positive_epsilon",
    "promoted_dtype",
    "root",
    "saturating_cast",
    "scalar",
    "square",
    "step_number",
    "widen",
    "widened_dtype",
]


def compute_dtype(*dtypes: Any) -> Any:
    """The real dtype to compute in: float64 if one of the dtypes has that precision, else float32.

    Args:
      *dtypes: real or complex float dtypes. A complex one counts as the dtype of its real part.

    Returns:
      A NumPy dtype.

    Raises:
      ValueError: a dtype is of integers or bools.

    >>> import jax.numpy as jnp
    >>> from adamjax.extend import compute_dtype
    >>> compute_dtype(jnp.bfloat16, jnp.float16), compute_dtype(jnp.float64)
    (dtype('float32'), dtype('float64'))
    """
    wide = any(jnp.finfo(d).dtype == np.float64 for d in dtypes)
    return np.dtype(np.float64 if wide else np.float32)


_COMPUTE_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def _expect_compute_dtype(owner: str, dtype: Any) -> None:
    """Refuses a dtype other than float32 and float64. In integers, factors below 1 would be 0."""
    if np.dtype(dtype) not in _COMPUTE_DTYPES:
        raise TypeError(f"{owner}: the dtype is {np.dtype(dtype)}, expected float32 or float64")


def at_least_float32(dtype: Any) -> Any:
    """The float dtype in which a hyperparameter of this real dtype is used."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def promoted_dtype(*dtypes: Any) -> Any:
    """The dtype of a sum of arrays of these dtypes, whatever `jax.numpy_dtype_promotion` is."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def widened_dtype(dtype: Any, real: Any) -> Any:
    """The dtype that `widen` casts to: `real`, or its complex counterpart for a complex dtype."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.result_type(real, np.complex64)
    return real


def widen(x: chex.Array, real: Any) -> chex.Array:
    """`x` cast to the compute dtype `real`, or to its complex counterpart if `x` is complex."""
    return x.astype(widened_dtype(x.dtype, real))


@functools.cache
def is_signed(dtype: Any) -> bool:
    """Whether a dtype is a float with zero and negative numbers; float8_e8m0fnu has neither."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return False
    return np.dtype(dtype).itemsize > 1 or bool(float(jnp.finfo(dtype).min) < 0)


def scalar(value: Number, real: Any) -> Any:
    """A hyperparameter in the compute dtype; a Python float stays a compile-time constant.

    Raises:
      TypeError: `real` is neither float32 nor float64.
    """
    _expect_compute_dtype("scalar", real)
    if is_array(value):
        return jnp.asarray(value, real)
    return np.asarray(value, real)[()]


def checked_in_range(value: Number, allowed: Range) -> Any:
    """The hyperparameter `value`, if it is in its range.

    A Python number outside its range is refused: `jax.tree.map` may have put it into the field
    without a check. An array may be traced, or set since its range was checked. It becomes float32
    or wider, and NaN if its value is outside.
    """
    if not is_array(value):
        if not allowed.holds(value):
            raise ValueError(f"a hyperparameter must be {allowed.text}, got {value!r}")
        return value
    x = jnp.asarray(value)
    x = x.astype(at_least_float32(x.dtype))
    return jnp.where(allowed.holds(x), x, jnp.nan)


def positive_epsilon(value: Number, real: Any) -> Any:
    """An epsilon in the compute dtype, for a division whose divisor could otherwise be 0.

    A Python number 0.0 stays 0, so check it with `POSITIVE` before. An array may be traced, or set
    later by `set_hyperparams`, so its value raises no error: 0 becomes the smallest normal number,
    and a negative or infinite value becomes NaN.
    """
    eps = scalar(checked_in_range(value, NON_NEGATIVE), real)
    return jnp.maximum(eps, jnp.finfo(real).tiny) if is_array(value) else eps


def as_count(name: str, value: Number, dtype: Any) -> Any:
    """A hyperparameter that counts steps, in the dtype of the count that it is compared with.

    If it is an array, only its shape and dtype are checked: a value outside `dtype` becomes the
    nearest limit of `dtype`.
    """
    if not is_array(value):
        return np.asarray(checked_in_range(value, COUNT), dtype)
    expect_scalar(name, value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be a whole number of steps, got an array of dtype {value.dtype.name}, "
            "expected an integer dtype"
        )
    return saturating_cast(value, dtype)


def saturating_cast(x: chex.Array, dtype: Any) -> chex.Array:
    """Casts integers to another integer dtype; values outside it become its limits."""
    new, old = jnp.iinfo(dtype), jnp.iinfo(x.dtype)
    least, most = max(new.min, old.min), min(new.max, old.max)
    if (least, most) != (old.min, old.max):
        x = jnp.clip(x, np.asarray(least, old.dtype), np.asarray(most, old.dtype))
    return jnp.asarray(x, dtype)


def expect_scalar(name: str, value: Any) -> None:
    """Refuses a hyperparameter that is not a scalar, such as values for `vmap` used without it."""
    if np.ndim(value) != 0:
        raise ValueError(
            f"{name} is an array of shape {np.shape(value)}, expected a scalar; to use many values "
            "at once, map over the transform with jax.vmap"
        )


def step_number(count: chex.Array, real: Any) -> chex.Array:
    """The number of this step as a float, 1 for the first.

    If the count is negative, as only in a damaged state, it is NaN: with a negative count, bias
    corrections would change their sign, and steps would go uphill.

    Raises:
      TypeError: the count is no array of integers, or `real` is neither float32 nor float64.
    """
    _expect_count("step_number", count)
    _expect_compute_dtype("step_number", real)
    return jnp.where(count >= 0, count.astype(real) + 1, jnp.nan)


def next_count(count: chex.Array) -> chex.Array:
    """The count after this step; it stays at the largest integer and does not wrap.

    Raises:
      TypeError: the count is no array of integers.
    """
    _expect_count("next_count", count)
    return count + (count < jnp.iinfo(count.dtype).max).astype(count.dtype)


def _expect_count(owner: str, count: Any) -> None:
    """Refuses a count that is no array of integers."""
    dtype = getattr(count, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        kind = repr(count) if dtype is None else f"an array of {dtype}"
        raise TypeError(
            f"{owner}: the count is {kind}, expected an array of integers, as "
            "jnp.zeros((), jnp.int32)"
        )


class Average(NamedTuple):
    """An exponential average `b * old + (1 - b) * new`, prepared for one compute dtype.

    It is computed as `base + weight * (other - base)`, where `base` is the number that weighs more.
    So the average of equal numbers is that number, and the average of zeros is zero. With two
    rounded factors, 0.999 * old + 0.001 * new would be off by 1.3e-8 of `old` in each step in
    float32, always in the same direction. This adds up to 1.3e-5 after 1 / (1 - b) steps. If the
    rounding error of the weight matters, it is added as a second weight.
    """

    weight: Any
    # The rounding error of the weight; `None` if it is negligible.
    weight_error: Any
    # Whether `new` weighs more; `None` if it is known not to, which saves two selects.
    new_weighs_more: Any

    def __call__(self, old: chex.Array, new: chex.Array) -> chex.Array:
        base, other = old, new
        if self.new_weighs_more is not None:
            base, other = (
                jnp.where(self.new_weighs_more, new, old),
                jnp.where(self.new_weighs_more, old, new),
            )
        difference = other - base
        if self.weight_error is None:
            return base + self.weight * difference
        return base + (self.weight * difference + self.weight_error * difference)


def averaging(b: Number, real: Any, allowed: Range = BETA) -> Average:
    """A function `(old, new) -> b * old + (1 - b) * new`.

    Args:
      b: the decay. A Python number outside of `allowed` raises an error; an array outside of it
        makes averages NaN. For an array, `1 - b` is computed from `b` as rounded to its dtype.
      real: the compute dtype.
      allowed: the range of `b`.

    Raises:
      TypeError: `real` is neither float32 nor float64.
    """
    _expect_compute_dtype("averaging", real)
    if is_array(b):
        b = checked_in_range(b, allowed)
        return Average(jnp.where(b < 0.5, b, 1 - b).astype(real), None, b < 0.5)
    exact_weight = min(checked_in_range(b, allowed), 1 - b)
    weight = scalar(exact_weight, real)
    weight_error = scalar(exact_weight - float(weight), real)
    # The second weight costs two operations. It is left out if in a thousand steps it adds up to
    # less than one rounding.
    negligible = 1000 * abs(weight_error) < np.finfo(real).eps / 2
    return Average(weight, None if negligible else weight_error, True if b < 0.5 else None)


class WrongResultError(TypeError):
    """A rule on arrays returned something else than `lift` expects; `lift` names the leaf."""


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def checked_results(function: Any, results: Any, like: Sequence[Any], what: str) -> Sequence[Any]:
    """The results of a rule's function, if there is one array for each of `like`, of its shape.

    Args:
      like: for each result an array of its shape; `None` if it may have any shape.
      what: the results in words, for the error.
    """
    name = _name_of(function)
    if not isinstance(results, tuple | list):
        kind = "None" if results is None else f"a {type(results).__name__}"
        if is_array(results):
            kind = f"an array of shape {list(np.shape(results))}"
        raise WrongResultError(f"{name} returned {kind}, expected a tuple: {what}")
    if len(results) != len(like):
        raise WrongResultError(
            f"{name} returned {len(results)} results, expected {len(like)}: {what}"
        )
    for i, (x, other) in enumerate(zip(results, like, strict=True)):
        shape = None if x is None else tuple(np.shape(x))
        if other is not None and shape != tuple(other.shape):
            found = "None" if shape is None else f"the shape {list(shape)}"
            raise WrongResultError(
                f"result {i} of {name} is {found}, expected the shape {list(other.shape)}; "
                f"the results are {what}"
            )
    return results


@dataclass(frozen=True)
class Recurrence:
    """A rule on arrays, `(c, g, *slots) -> (u, *slots)`, whose update is computed from new slots.

    `c` is the step's scalars, as `lift`'s argument `scalars` returns them; `g` is the gradient, `u`
    the update. Its functions get arrays in the compute dtype.

    Attributes:
      moments: `(c, g, *slots) -> new_slots`. If `last` is given, `moments` neither takes nor
        returns the last slot: `last` computes it.
      direction: `(c, g, *new_slots) -> u`.
      last: `(c, last_slot, *new_slots) -> new_last_slot`, if the last slot is computed from the
        others as they are stored, as AMSGrad's v_max is.
    """

    moments: Callable[..., tuple[chex.Array, ...]]
    direction: Callable[..., chex.Array]
    last: Callable[..., chex.Array] | None = None

    def __call__(self, c: Any, g: chex.Array, *slots: chex.Array) -> tuple[chex.Array, ...]:
        return self.update_and_slots(c, g, slots)

    def update_and_slots(
        self, c: Any, g: chex.Array, slots: Sequence[chex.Array], key: Any = None, rows: Any = None
    ) -> tuple[chex.Array, ...]:
        """The update in the gradient's dtype, and the new slots in the dtypes of the old ones.

        Args:
          key, rows: as for `write_slot`; they determine how narrow slots are rounded.
        """
        wide, stored, seen = self.advanced(c, g, slots, key, rows)
        u = self.direction(c, wide, *seen)
        if isinstance(u, tuple | list):
            raise WrongResultError(
                f"{_name_of(self.direction)} returned a tuple, expected the update"
            )
        checked_results(self.direction, [u], [g], "the update")
        return u.astype(g.dtype), *stored

    def advanced(
        self, c: Any, g: chex.Array, slots: Sequence[Any], key: Any, rows: Any = None
    ) -> tuple[chex.Array, list[Any], list[chex.Array]]:
        """The widened gradient, the new slots as they are stored, and the ones for `direction`.

        `direction` gets narrow slots as they are stored. If it got unrounded slots, XLA would
        compute these again from the old slots, and copy the old slots before it overwrites them.
        """
        real = compute_dtype(g.dtype, *(x.dtype for x in slots))
        stored: list[Any] = []
        seen: list[chex.Array] = []

        def add_slots(function: Callable[..., Sequence[chex.Array]], *arrays: Any) -> None:
            """Adds the slots that a function of arrays returns to `stored` and `seen`."""
            new = function(*arrays)
            targets = slots[len(stored) : len(stored) + len(new)]
            exponents: Sequence[Any] = [None] * len(new)
            if any(isinstance(x, Scaled8) for x in targets):
                # The largest number of a block must be known before its elements are encoded. If
                # the numbers were computed once, XLA would keep all of them as floats until then.
                # So they are computed twice. The inputs of one computation are behind an
                # optimization barrier, so that XLA does not merge the two.
                hidden = jax.tree.map(lambda x: barrier(jax.lax.stop_gradient(x)), arrays)
                exponents = block_exponents(function(*hidden), targets)
            for x, slot, e in zip(new, targets, exponents, strict=True):
                written = write_slot(x, slot, key, len(stored), rows, e)
                if isinstance(slot, Scaled8):
                    written = map_stored(barrier, written)
                stored.append(written)
                seen.append(read_slot(written, x.dtype) if is_narrow(written) else x)

        def floats(x: Any) -> chex.Array:
            return read_slot(x, widened_dtype(x.dtype, real))

        def moments(g: chex.Array, *old: Any) -> Sequence[chex.Array]:
            new = self.moments(c, widen(g, real), *map(floats, old))
            return checked_results(self.moments, new, old, "the new slots")

        if self.last is None:
            add_slots(moments, g, *slots)
        else:
            last = self.last
            add_slots(moments, g, *slots[:-1])
            add_slots(lambda old, *others: [last(c, floats(old), *others)], slots[-1], *seen)
        wide = widen(g, real)
        return wide, stored, seen


def correction(b: Number, t: chex.Array) -> chex.Array:
    """The bias correction `1 - b**t`, computed by expm1: accurate from the first step on.

    Args:
      b: the decay. An array outside of [0, 1) makes the result NaN; a Python number raises an
        error.
      t: the number of the step, 1 for the first, in the compute dtype: `step_number(count, real)`.

    Raises:
      TypeError: `t` is no array of float32 or float64.
    """
    dtype = getattr(t, "dtype", None)
    if dtype is None or dtype not in _COMPUTE_DTYPES:
        kind = repr(t) if dtype is None else f"an array of {dtype}"
        raise TypeError(
            f"correction: t is {kind}, expected an array of float32 or float64: "
            "step_number(count, real) makes it from the count before the step"
        )
    if is_array(b):
        b = checked_in_range(b, BETA)
        b = b.astype(promoted_dtype(b.dtype, t.dtype))
        log_b = jnp.log(jnp.where(b == 0, 1, b))
        # At b = 0 the logarithm has no derivative; the power has one in the first step.
        at_0 = jnp.where(t == 1, 1 - b, 1)
        return jnp.where(b == 0, at_0, -jnp.expm1(t * log_b)).astype(t.dtype)
    if checked_in_range(b, BETA) == 0:
        return jnp.ones_like(t)
    return -jnp.expm1(t * scalar(math.log(b), t.dtype))


def complement(b: Number, real: Any) -> Any:
    """`1 - b` of a decay, computed in its own dtype and rounded once.

    An array `b` outside of [0, 1) makes the result NaN; a Python number raises an error.
    """
    return scalar(1 - checked_in_range(b, BETA), real)


@jax.custom_jvp
def root(x: chex.Array) -> chex.Array:
    """The square root with derivative 0 at 0, so that the derivative of root(g**2) is never NaN."""
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals: Any, tangents: Any) -> Any:
    y = root(primals[0])
    slope = jnp.where(y > 0, 0.5 / jnp.where(y > 0, y, 1), 0)
    return y, slope * tangents[0]


@jax.custom_jvp
def barrier(x: chex.Array) -> chex.Array:
    """`x` behind an optimization barrier: XLA does not know that the result equals `x`."""
    return jax.lax.optimization_barrier(x)


@barrier.defjvp
def _barrier_jvp(primals: Any, tangents: Any) -> Any:
    # The oldest supported JAX has no derivative of the barrier.
    return barrier(primals[0]), tangents[0]


def add_update(p: chex.Array, u: chex.Array, key: Any = None, rows: Any = None) -> chex.Array:
    """The sum of a parameter and its update, in float32 or wider, rounded once to `p.dtype`.

    Args:
      key, rows: as for `write_slot`. With a key, a bfloat16 parameter is rounded stochastically.
    """
    real = compute_dtype(p.dtype, u.dtype)
    return write_slot(widen(p, real) + widen(u, real), p.dtype, key, 0, rows)


def square(x: chex.Array) -> chex.Array:
    """`|x|**2`, real for complex `x`."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def magnitude(x: chex.Array) -> chex.Array:
    """`|x|`, with derivative 0 at 0 for complex `x` too."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return root(square(x))
    return jnp.abs(x)
