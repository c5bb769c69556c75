"""Arithmetic on one array: averages, bias correction, a root that can be differentiated at 0."""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import BETA, NON_NEGATIVE, Number, Range, is_array
from adamjax.rounding import write_slot

__all__ = [
    "Average",
    "accumulator",
    "as_count",
    "averaging",
    "barrier",
    "complement",
    "correction",
    "counted",
    "divisor",
    "expect_scalar",
    "is_signed",
    "magnitude",
    "next_count",
    "ranged",
    "root",
    "saturated",
    "scalar",
    "square",
    "stepped",
    "widen",
    "widened",
]


def accumulator(*dtypes: Any) -> Any:
    """The real dtype to compute in: float64 if one of the dtypes is that wide, else float32."""
    wide = any(jnp.finfo(d).dtype == np.float64 for d in dtypes)
    return np.dtype(np.float64 if wide else np.float32)


def widened(dtype: Any, real: Any) -> Any:
    """The dtype in which a value is held in the course of a computation in `real`."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.result_type(real, np.complex64)
    return real


def widen(x: chex.Array, real: Any) -> chex.Array:
    """`x` in the accumulator dtype `real`, or in the complex dtype made of two of them."""
    return x.astype(widened(x.dtype, real))


def is_signed(dtype: Any) -> bool:
    """Whether a dtype is a float in which zero and negative numbers are."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return False
    return np.dtype(dtype).itemsize > 1 or bool(float(jnp.finfo(dtype).min) < 0)


def scalar(value: Number, real: Any) -> Any:
    """A hyperparameter in the accumulator dtype; a Python float stays a compile-time constant."""
    if is_array(value):
        return jnp.asarray(value, real)
    return np.asarray(value, real)[()]


def ranged(value: Number, allowed: Range) -> Any:
    """A hyperparameter as it is, but NaN for an array whose value is outside its range.

    The value of an array may be traced, or have been set since the range was checked; the array
    becomes a float32 at least. A number that is put in the place of another, which `jax.tree.map`
    does, is refused.
    """
    if not is_array(value):
        if not allowed.holds(value):
            raise ValueError(f"a hyperparameter must be {allowed.text}, got {value!r}")
        return value
    x = jnp.asarray(value)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(allowed.holds(x), x, jnp.nan)


def divisor(value: Number, real: Any) -> Any:
    """An epsilon in the accumulator dtype, never 0: what has no gradient is divided by it.

    An array is not checked where it is traced or set: 0 does what every smaller epsilon does, and
    what is below, infinite or NaN makes NaN.
    """
    eps = scalar(ranged(value, NON_NEGATIVE), real)
    return jnp.maximum(eps, jnp.finfo(real).tiny) if is_array(value) else eps


def as_count(name: str, value: Number, dtype: Any) -> Any:
    """A hyperparameter that counts steps, in the dtype of the count it is compared with.

    Of an array that is traced or set, the value is not checked: what that dtype cannot hold
    becomes its limit.
    """
    if not is_array(value):
        return np.asarray(value, dtype)
    expect_scalar(name, value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be a whole number of steps, got an array of dtype {value.dtype.name}, "
            "expected one of an integer dtype"
        )
    return saturated(value, dtype)


def saturated(x: chex.Array, dtype: Any) -> chex.Array:
    """Integers in another integer dtype; its limit where that cannot hold them."""
    ours, its = jnp.iinfo(dtype), jnp.iinfo(x.dtype)
    least, most = max(ours.min, its.min), min(ours.max, its.max)
    if (least, most) != (its.min, its.max):
        x = jnp.clip(x, np.asarray(least, its.dtype), np.asarray(most, its.dtype))
    return jnp.asarray(x, dtype)


def expect_scalar(name: str, value: Any) -> None:
    """Refuses a hyperparameter that has a shape, as one mapped over has outside of the map."""
    if np.ndim(value) != 0:
        raise ValueError(
            f"{name} is an array of shape {np.shape(value)}, expected a scalar; to use many values "
            "at once, map over the transform with jax.vmap"
        )


def counted(count: chex.Array, real: Any) -> chex.Array:
    """The number of the step that is being taken, 1 for the first, as a float."""
    return count.astype(real) + 1


def next_count(count: chex.Array) -> chex.Array:
    """The count after this step; it stays at the largest integer rather than wrap."""
    return count + (count < jnp.iinfo(count.dtype).max).astype(count.dtype)


class Average(NamedTuple):
    """An exponential average `b * old + (1 - b) * new`, prepared for one accumulator dtype.

    Written as a step from the end that weighs more towards the other, it keeps what is equal
    equal and zero zero. The weight of the step is held in two parts, as a float and what that
    rounded off: in float32, 0.999 * old + 0.001 * new with each factor rounded is off by 1.3e-8
    of old a step, always in the same direction, and by 1.3e-5 after 1 / (1 - b) steps.
    """

    weight: Any
    rest: Any
    # None where the old end weighs more, which is the rule: so it costs nothing to say.
    from_new: Any

    def __call__(self, old: chex.Array, new: chex.Array) -> chex.Array:
        base, other = old, new
        if self.from_new is not None:
            base, other = jnp.where(self.from_new, new, old), jnp.where(self.from_new, old, new)
        step = other - base
        if self.rest is None:
            return base + self.weight * step
        return base + (self.weight * step + self.rest * step)


def averaging(b: Number, real: Any, allowed: Range = BETA) -> Average:
    """The average with decay `b`; an array `b` is taken to be exact in its dtype.

    Of an array that is outside the range that is allowed, averages are NaN.
    """
    if is_array(b):
        b = ranged(b, allowed)
        return Average(jnp.where(b < 0.5, b, 1 - b).astype(real), None, b < 0.5)
    exact = min(ranged(b, allowed), 1 - b)
    weight = scalar(exact, real)
    rest = scalar(exact - float(weight), real)
    # Not worth its two operations where a thousand steps of it do not make up one rounding.
    negligible = 1000 * abs(rest) < np.finfo(real).eps / 2
    return Average(weight, None if negligible else rest, True if b < 0.5 else None)


def correction(b: Number, t: chex.Array) -> chex.Array:
    """The bias correction `1 - b**t`, through expm1: exact to rounding from the first step on.

    An array `b` is taken to be exact in its dtype; outside of [0, 1) it makes NaN.
    """
    if is_array(b):
        b = ranged(b, BETA)
        log_b = jnp.log(jnp.where(b == 0, 1, b))
        # The logarithm has no slope at 0, where the power has one in the first step.
        at_0 = jnp.where(t == 1, 1 - b, 1)
        return jnp.where(b == 0, at_0, -jnp.expm1(t * log_b)).astype(t.dtype)
    if ranged(b, BETA) == 0:
        return jnp.ones_like(t)
    return -jnp.expm1(t * scalar(math.log(b), t.dtype))


def complement(b: Number, real: Any) -> Any:
    """`1 - b` of a decay, taken in its own dtype and rounded once; NaN outside of [0, 1)."""
    return scalar(1 - ranged(b, BETA), real)


@jax.custom_jvp
def root(x: chex.Array) -> chex.Array:
    """The square root, with derivative 0 at 0: there the derivative of root(g**2) is 0/0."""
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals: Any, tangents: Any) -> Any:
    y = root(primals[0])
    slope = jnp.where(y > 0, 0.5 / jnp.where(y > 0, y, 1), 0)
    return y, slope * tangents[0]


@jax.custom_jvp
def barrier(x: chex.Array) -> chex.Array:
    """`x`, of which XLA does not see that it is the same."""
    return jax.lax.optimization_barrier(x)


@barrier.defjvp
def _barrier_jvp(primals: Any, tangents: Any) -> Any:
    # The barrier's own rule came to JAX later than the oldest version that is supported.
    return barrier(primals[0]), tangents[0]


def stepped(p: chex.Array, u: chex.Array, key: Any = None, rows: Any = None) -> chex.Array:
    """The parameter after its update: added in float32 at least, rounded once to its own dtype.

    Args:
      key, rows: where a bfloat16 is to be rounded stochastically, as for `write_slot`.
    """
    real = accumulator(p.dtype, u.dtype)
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
