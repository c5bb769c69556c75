"""Stochastic rounding of narrow moments, which follow the float32 recurrence on average.

A bfloat16 has 8 bits of precision, so neighbours are 0.4% to 0.8% apart. If an average is rounded
to the nearest and changes by less than half of that in a step, it stands still: with b2 = 0.999, v
freezes. Stochastic rounding goes to the neighbour above or below, with a probability that makes the
expected value exact, so the average moves on (Croci et al., Stochastic rounding: implementation,
error analysis and applications, 2022, section 1: equation 1.1). Moments in 8 bits (`encoding.py`)
are rounded with the same random bits.

The random bits are a hash of the step, the leaf, the slot and the element's position in the leaf.
So no random key is passed, no state is added, and the result does not depend on how arrays are
split over devices or how many rows are computed at a time.
"""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.encoding import Scaled8, block_exponents, decode, encode

__all__ = ["is_narrow", "read_slot", "rounding_keys", "write_slot", "write_slots"]


def is_narrow(slot: Any) -> bool:
    """Whether a slot, given as an array of a state or as its dtype, is rounded stochastically."""
    return isinstance(slot, Scaled8) or np.dtype(getattr(slot, "dtype", slot)) == jnp.bfloat16


def read_slot(slot: Any, dtype: Any) -> chex.Array:
    """The values of a slot, in this dtype."""
    return (decode(slot) if isinstance(slot, Scaled8) else slot).astype(dtype)


def _mix(x: chex.Array) -> chex.Array:
    """A hash of each uint32; every bit of it depends on every input bit (C. Wellons' lowbias32)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def rounding_keys(count: chex.Array, positions: Sequence[int]) -> chex.Array:
    """A uint32 key for each leaf in this step.

    Args:
      count: int32 scalar, the number of steps taken before.
      positions: the positions of the leaves in the tree.
    """
    leaf_numbers = np.asarray(positions, np.uint32) * np.uint32(0x9E3779B9)
    return _mix(_mix(jnp.asarray(count).astype(jnp.uint32)) + leaf_numbers)


def _positions(shape: tuple[int, ...], rows: chex.Array | None) -> chex.Array:
    """The position of each element in its leaf, as uint32.

    Args:
      shape: the shape of the elements.
      rows: the indices of the rows, if the elements are some rows of a table; `None` for a whole
        leaf.
    """
    position = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        if axis == 0 and rows is not None:
            along = rows.astype(jnp.uint32).reshape(-1, *[1] * (len(shape) - 1))
        else:
            along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        position += along * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return position


@jax.custom_jvp
def _round(x: chex.Array, random: chex.Array) -> chex.Array:
    """Rounds a float32 to one of its two bfloat16 neighbours; `random` is below 2**16."""
    # bfloat16 drops the lower 16 bits. Adding 16 random bits to them carries into the upper 16 bits
    # with the right probability. This also holds for negative numbers, because a float is stored as
    # its sign and its magnitude.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + random) & np.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(bits, jnp.float32), x)


@_round.defjvp
def _round_jvp(primals: Any, tangents: Any) -> Any:
    # This is the derivative of the expected value. A cast has the same derivative.
    return _round(*primals), tangents[0]


def write_slot(
    x: chex.Array, like: Any, key: Any, slot_number: int, rows: Any = None, exponents: Any = None
) -> Any:
    """A slot's new values in the format that the state stores.

    Args:
      x: the values, in the compute dtype.
      like: the slot in the state, or its dtype.
      key: the key of `rounding_keys` for this step and leaf; `None` rounds to the nearest.
      slot_number: which slot of the leaf this is. Slots of one leaf use different random bits.
      rows: int32[n], the indices of the rows, if the values are some rows of a table; `None` for a
        whole leaf.
      exponents: for an encoded slot its `block_exponents`, if they have been computed.
    """
    dtype = getattr(like, "dtype", like)
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"a rule gave complex values to a slot that is {np.dtype(dtype).name} in the state: "
            "make the slot complex where the parameter is, or take abs or |x|**2"
        )
    if isinstance(like, Scaled8):
        if exponents is None:
            (exponents,) = block_exponents([x], [like])
        if key is None:
            # With 2**15 as the random number, `encode` rounds to the nearest.
            random = jnp.full(x.shape, 1 << 15, jnp.uint32)
        else:
            random = _random_bits(x, key, slot_number, rows)
        return encode(x, like.codes.dtype, exponents, random)
    # A cast rounds to the nearest, if it rounds at all. `_round` takes no complex values.
    if key is None or not is_narrow(dtype) or x.dtype == dtype or jnp.iscomplexobj(x):
        return x.astype(dtype)
    return _round(x.astype(jnp.float32), _random_bits(x, key, slot_number, rows)).astype(dtype)


def _random_bits(
    x: chex.Array, key: chex.Array, slot_number: int, rows: chex.Array | None
) -> chex.Array:
    """A random uint32 below 2**16 for each element; see `write_slot`."""
    # Two slots share a hash of 32 bits: each takes 16 of them.
    key = key + np.uint32(slot_number // 2 * 0x85EBCA6B % 2**32)
    random = _mix(_positions(x.shape, rows) ^ key) >> np.uint32(16 * (slot_number % 2))
    return random & np.uint32(0xFFFF)


def write_slots(
    new: Sequence[chex.Array], slots: Sequence[Any], key: Any, rows: Any = None
) -> list[Any]:
    """The new values of all slots of a leaf, in the formats of the slots; see `write_slot`."""
    numbered = enumerate(zip(new, slots, strict=True))
    return [write_slot(x, slot, key, number, rows) for number, (x, slot) in numbered]
