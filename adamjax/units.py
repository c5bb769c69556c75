"""Counts of steps in units of several steps: exact divisions, and accurate powers."""

import fractions
import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamjax.data import LAST_COUNT, Number, is_array
from adamjax.moments import promoted_dtype

__all__ = ["Units", "as_float", "in_units", "power_of"]


def as_float(x: Any) -> chex.Array:
    """A number as an array of JAX's default float dtype."""
    return jnp.asarray(x, dtype=float)


class Units(NamedTuple):
    """A count of steps, measured in units of several steps.

    Attributes:
      whole: the number of whole units that have passed, a float.
      fraction: the fraction of the next unit that has passed, in [0, 1), exactly 0 at a multiple.
      left: the fraction of the next unit that is left, in (0, 1].
    """

    whole: chex.Array
    fraction: chex.Array
    left: chex.Array

    @property
    def passed(self) -> chex.Array:
        return self.whole + self.fraction


def in_units(count: chex.Array, steps: Number) -> Units:
    """Measures a count in units of `steps`.

    A division of floats is not enough: compiled code multiplies by a rounded reciprocal, so the
    quotient may be just below a whole number although the count is a multiple. And a float cannot
    represent every integer. So integers are divided as integers. So are ratios of small integers,
    such as the Python number 1000/3, three times which is 1000. The quotient of other floats is
    corrected. An array of steps, which may be traced, is not checked: an integer 0 counts as 1, a
    float 0 as the smallest normal float, and a number below 0 makes the result NaN.
    """
    if not is_array(steps):
        if jnp.issubdtype(count.dtype, jnp.integer):
            if steps == math.floor(steps):
                return _of_integers(count, int(steps))
            ratio = _ratio(float(steps))
            if ratio is not None:
                return _of_ratio(count, *ratio)
        return _of_floats(as_float(count), as_float(steps))
    common = _common_integer(count.dtype, steps.dtype)
    if common is not None:
        units = _of_integers(count.astype(common), jnp.maximum(steps, 1).astype(common))
    else:
        units = _of_floats(as_float(count), as_float(steps))
    return Units(*(jnp.where(steps >= 0, x, jnp.nan) for x in units))


def _common_integer(count: Any, steps: Any) -> Any:
    """The integer dtype for counts and steps of these dtypes; `None` if no dtype holds all steps.

    It is `None` for uint32 steps without x64, for uint64 steps with x64, and for all floats.
    """
    if not all(jnp.issubdtype(x, jnp.integer) for x in (count, steps)):
        return None
    common = jax.dtypes.canonicalize_dtype(promoted_dtype(steps, count))
    if not jnp.issubdtype(common, jnp.integer):  # JAX promotes uint64 and int64 to a float
        return None
    return common if jnp.iinfo(common).max >= jnp.iinfo(steps).max else None


def _of_integers(count: chex.Array, steps: Any) -> Units:
    """`in_units` for an integer count and integer steps, by exact integer division."""
    if isinstance(steps, int) and steps > jnp.iinfo(count.dtype).max:
        # No count is that large.
        fraction = as_float(count) / float(steps)
        return Units(jnp.zeros_like(fraction), fraction, 1 - fraction)
    whole = count // steps
    return _with_remainder(as_float(whole), count - whole * steps, steps)


def _with_remainder(whole: chex.Array, remainder: chex.Array, steps: Any) -> Units:
    """So many whole units, and the integer `remainder` of the next one of `steps`."""
    left = jnp.where(remainder == 0, 1, as_float(steps - remainder) / as_float(steps))
    return Units(whole, as_float(remainder) / as_float(steps), left)


# The largest denominator and numerator of a length that is taken as a ratio.
_MOST_DENOMINATOR, _MOST_NUMERATOR = 10_000, 2**29


@functools.cache
def _ratio(steps: float) -> tuple[int, int] | None:
    """A length as a ratio of whole numbers, such as 1000 and 3; `None` if it is none."""
    ratio = fractions.Fraction(steps).limit_denominator(_MOST_DENOMINATOR)
    numerator, denominator = ratio.numerator, ratio.denominator
    # A length may be computed with a few rounding errors, as 2.4 * 1_281_167 / 4096.
    is_near = math.isclose(numerator / denominator, steps, rel_tol=1e-15)
    return (numerator, denominator) if is_near and 0 < numerator < _MOST_NUMERATOR else None


def _of_ratio(count: chex.Array, numerator: int, denominator: int) -> Units:
    """`in_units` for an integer count and a ratio, by exact integer division."""
    if jnp.iinfo(count.dtype).max < LAST_COUNT:
        count = count.astype(jnp.int32)
    # In so many steps, a whole number of units passes: the denominator.
    many = count // numerator
    rest = count - many * numerator
    # The long division of `rest * denominator` by the numerator. Its digits have so few bits that
    # no number exceeds int32.
    bits = (LAST_COUNT // numerator).bit_length() - 2
    num_digits = -(-denominator.bit_length() // bits)
    whole, remainder = jnp.zeros_like(rest), jnp.zeros_like(rest)
    for i in reversed(range(num_digits)):
        digit = denominator >> (i * bits) & ((1 << bits) - 1)
        part = remainder * (1 << bits) + rest * digit
        whole = whole * (1 << bits) + part // numerator
        remainder = part % numerator
    passed = as_float(many) * denominator + as_float(whole)
    return _with_remainder(passed, remainder, numerator)


def _of_floats(count: chex.Array, steps: chex.Array) -> Units:
    """`in_units` in floats: exact if products of `steps` with whole numbers are exact.

    A count is a multiple if it is such a product after rounding.
    """
    steps = jnp.maximum(steps, jnp.finfo(steps.dtype).tiny)
    # The quotient may be off by one.
    quotient = jnp.floor(count / steps)
    quotient = jnp.where((quotient + 1) * steps <= count, quotient + 1, quotient)
    whole = jnp.where(quotient * steps > count, quotient - 1, quotient)
    # With infinitely many units, the remainder would be NaN. At a multiple, it would not be 0, and
    # even below 0, if compiled code subtracts a product that it has not rounded.
    remainder = (count - whole * steps) / steps
    fraction = jnp.where(whole * steps >= count, _zero_in_place_of(remainder), remainder)
    fraction = jnp.where(jnp.isinf(whole), 0, fraction)
    # Beyond 2**24 units, `whole` and its product are rounded. (A clip would halve the derivative
    # at a multiple.)
    fraction = jnp.where(fraction < 0, 0, jnp.where(fraction > 1, 1, fraction))
    return Units(whole, fraction, 1 - fraction)


@jax.custom_jvp
def _zero_in_place_of(x: chex.Array) -> chex.Array:
    """Zeros with the derivative of `x`, for numbers that would be 0 without rounding."""
    return jnp.zeros_like(x)


@_zero_in_place_of.defjvp
def _zero_in_place_of_jvp(primals: Any, tangents: Any) -> Any:
    return _zero_in_place_of(*primals), tangents[0]


# `power_of` splits the number of whole units into a multiple of `_SPLIT` and the rest, which have
# few bits each. It clips this number at `_MOST_WHOLE`, where the power of any base but 1 is already
# zero or infinite. It clips the exponent at `_MOST_EXPONENT`: in float32, 2**252 is infinite and
# 2**-252 is 0.
_SPLIT, _MOST_WHOLE, _MOST_EXPONENT = 4096.0, 2.0**100, 252


def power_of(base: float, units: Units) -> chex.Array:
    """`base ** units.passed` in float32, as accurate after millions of units as after one.

    Rounded to float32, 0.99999 is off by 1.4e-8, and its 200,000th power by 0.27%. So this computes
    the logarithm in float64, splits it into two numbers, and adds products that are exact.
    """
    logarithm = math.log2(base)
    mantissa, exponent = math.frexp(logarithm)
    # 12 bits of the logarithm times 12 bits of a number of units fit into float32.
    high = math.ldexp(round(mantissa * _SPLIT), exponent) / _SPLIT
    low = logarithm - high
    whole = jnp.minimum(units.whole, _MOST_WHOLE)
    many = jnp.floor(whole / _SPLIT) * _SPLIT
    first, second = many * high, (whole - many) * high
    rest = whole * low + units.fraction * logarithm
    # 2**integer is exact. What is left of the exponent is small, and its power is accurate.
    integer = jnp.clip(jnp.round(first + second + rest), -_MOST_EXPONENT, _MOST_EXPONENT)
    left = jnp.clip(((first - integer) + second) + rest, -1, 1)
    half = jnp.floor(integer / 2)  # 2**integer itself may be too small for a normal float32
    return jnp.exp2(left) * _power_of_two(half) * _power_of_two(integer - half)


def _power_of_two(exponent: chex.Array) -> chex.Array:
    """`2 ** exponent` in float32, exact for a whole exponent of -126 to 127."""
    bits = (exponent.astype(jnp.int32) + 127) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
