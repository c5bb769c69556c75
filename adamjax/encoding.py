"""Moments in 8 bits: `"scaled8"`, a small floating-point code with an exponent for each block.

An array becomes codes of one byte each, and one byte for each block: the exponent of the block's
largest number. A block is a row along the last axis; in a vector it is 1,024 elements. So no block
spans two rows of a table, and m and v together take `2 + 2 / columns` bytes a parameter.

=================  =====================  =========================
..                 signed (m)             unsigned (v, v_max, u)
=================  =====================  =========================
codes              int8                   uint8
bits               sign, 4 exp., 3 frac.  5 exponent, 3 fraction
neighbours apart   by 6% to 12.5%         by 6% to 12.5%
down to            2**-14 of the largest  2**-30 of the largest
below, steps of    2**-17 of it           2**-33 of it
=================  =====================  =========================

("The largest" is the largest power of two that is not above the block's largest number.) Adam takes
the root of v: there neighbours differ by 3% to 6%, down to 2**-15 of the largest. The microscaling
formats have the same block exponents and fractions of 3 bits (OCP Microscaling Formats
Specification 1.0, 2023, section 5). Scaling a block by a power of two adds no rounding error. So
when the largest number of a block grows, a stored number keeps its value, unless it is now below
2**-14 of the largest (unsigned: 2**-30).

Zero stays zero. An unsigned number that is not zero never becomes zero, so a quotient by its root
stays bounded. If a number is infinite or NaN, its whole block becomes NaN.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from adamjax.data import exportable
from adamjax.mesh import explicit_sharding, replicate, reshard

__all__ = [
    "SCALED8",
    "SLOT_DTYPE_FIELDS",
    "VECTOR_BLOCK",
    "Scaled8",
    "block_exponents",
    "decode",
    "encode",
    "expect_encoded",
    "expect_exponents_by_row",
    "exponents_spec",
    "map_stored",
    "references_for_slot",
    "zeros_scaled8",
]

# The fields of rules that choose the format of a slot, and the value that selects this format.
SLOT_DTYPE_FIELDS = ("m_dtype", "v_dtype", "u_dtype")
SCALED8 = "scaled8"
# The number of elements in a block of a vector.
VECTOR_BLOCK = 1024

_DROPPED_BITS = 20  # of the 23 bits of a float32's fraction
# A block with the exponent e stores its numbers divided by `2**(e + _OFFSET - 127)`. So at e = 0
# the smallest code, which stands for 1/8, is still a normal float32.
_OFFSET = 4
# To decode, numbers are multiplied by the power of two with the biased exponent `e + _OFFSET`; to
# encode, by its inverse, whose biased exponent is `_ENCODING_BIAS - e`. (The two add up to 254.)
_ENCODING_BIAS = 254 - _OFFSET
# The exponent of a block with a number that is infinite or NaN.
_NOT_FINITE = 255


@exportable
class Scaled8(NamedTuple):
    """An array of a state in 8 bits, in place of an array of floats.

    `adamjax.get_slot` returns the floats. See `adamjax.scale_by_adam` for what is lost.

    Attributes:
      codes: int8 for m, uint8 for v, v_max and u; of the parameter's shape.
      exponents: uint8, one for each block: of shape `[*shape[:-1], 1]`, or `[ceil(n / 1024)]` for
        a vector of n elements.

    >>> import adamjax, jax.numpy as jnp
    >>> state = adamjax.scale_by_adam(v_dtype="scaled8").init(jnp.zeros((3, 600)))
    >>> state.v.codes.shape, state.v.exponents.shape
    ((3, 600), (3, 1))
    """

    codes: Any
    exponents: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.codes)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def dtype(self) -> Any:
        """The dtype of the floats."""
        return np.dtype(np.float32)


def _first_of_blocks(p: Any) -> Any:
    """The first element of each block of `p`."""
    if np.ndim(p) == 0:
        return p
    return p[::VECTOR_BLOCK] if np.ndim(p) == 1 else p[..., :1]


def _exponents_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) < 2:
        return (-(-shape[0] // VECTOR_BLOCK),) if shape else ()
    return (*shape[:-1], min(shape[-1], 1))


def zeros_scaled8(p: Any, signed: bool) -> Scaled8:
    """Zeros of the shape of `p`, sharded like `p` unless that is a `ShapeDtypeStruct`."""
    codes = jnp.zeros_like(p, np.int8 if signed else np.uint8)
    if isinstance(p, jax.ShapeDtypeStruct):
        return Scaled8(codes, jnp.zeros(_exponents_shape(p.shape), np.uint8))
    sharding = explicit_sharding(p)
    if sharding is None:
        return Scaled8(codes, jnp.zeros_like(_first_of_blocks(p), np.uint8))
    spec = PartitionSpec(*exponents_spec(tuple(sharding.spec), p.ndim))
    exponents = jnp.zeros(_exponents_shape(p.shape), np.uint8)
    return Scaled8(codes, reshard(exponents, NamedSharding(sharding.mesh, spec), p))


def exponents_spec(spec: tuple[Any, ...], ndim: int) -> tuple[Any, ...]:
    """How exponents are split over a mesh: like the codes, but not along the last axis."""
    return (*spec, *[None] * (ndim - len(spec)))[: ndim - 1] if ndim else ()


def map_stored(function: Callable[..., Any], *slots: Any) -> Any:
    """Applies a function of arrays to slots; if they are encoded, to codes and to exponents."""
    if isinstance(slots[0], Scaled8):
        return Scaled8(*(function(*arrays) for arrays in zip(*slots, strict=True)))
    return function(*slots)


def references_for_slot(p: Any) -> Scaled8:
    """The references for `split_alike`, by which it splits a slot's codes and its exponents.

    Codes have the shape of `p`. Exponents have another shape, so their reference is a part of `p`.
    If `split_alike` would ignore it, because `p` is not traced or has an explicit sharding, `p`
    itself takes its place.
    """
    is_ignored = explicit_sharding(p) is not None or not isinstance(p, jax.core.Tracer)
    return Scaled8(p, p if is_ignored else _first_of_blocks(p))


def expect_encoded(what: str, slot: Scaled8) -> None:
    """Refuses codes and exponents with wrong dtypes, or with shapes that do not match."""
    codes, exponents = slot
    dtypes = tuple(getattr(x, "dtype", None) for x in slot)
    if dtypes[0] not in (np.int8, np.uint8) or dtypes[1] != np.uint8:
        raise ValueError(
            f"{what} has codes and exponents of the dtypes {[str(x) for x in dtypes]}, expected "
            f"int8 or uint8, and uint8: these are {SCALED8!r}, which must not be cast"
        )
    expected = _exponents_shape(np.shape(codes))
    if np.shape(exponents) != expected:
        raise ValueError(
            f"{what} has exponents of shape {list(np.shape(exponents))} with codes of shape "
            f"{list(np.shape(codes))}, expected {list(expected)}: restore both, or start from init"
        )


def expect_exponents_by_row(slot: Any, what: str = "a row gradient needs rows") -> None:
    """Refuses a slot whose rows cannot be written one by one, because they share exponents.

    Args:
      what: the first words of the error, up to "needs rows".
    """
    if isinstance(slot, Scaled8) and slot.ndim < 2:
        raise ValueError(
            f"{what} with exponents of their own, but a parameter of shape {list(slot.shape)} with "
            f"moments in {SCALED8!r} has an exponent for each {VECTOR_BLOCK} elements: give the "
            f"table the shape {[*slot.shape, 1]}, or keep its moments in bfloat16 (m_dtype, "
            "v_dtype)"
        )


def _exponent_range(code_dtype: Any) -> int:
    """The number of powers of two below a block's largest number with codes of full precision."""
    return 14 if code_dtype == np.int8 else 30


def _blocks(bits: chex.Array) -> chex.Array:
    """The elements of an array by block.

    A vector of several blocks gets the shape [blocks, 8, 128], which is how a TPU lays it out. Any
    other array gets the shape [*shape[:-1], 1, columns], a vector [1, elements], a scalar [1]: the
    last axis has the elements of a block.
    """
    if bits.ndim == 0:
        return bits[None]
    columns = bits.shape[-1]
    if bits.ndim > 1 or columns <= VECTOR_BLOCK:
        return bits[..., None, :] if columns else bits.reshape(*bits.shape[:-1], 0, 0)
    bits = replicate(bits) if explicit_sharding(bits) is not None else bits
    if columns % VECTOR_BLOCK:
        bits = jnp.pad(bits, (0, -columns % VECTOR_BLOCK))
    return bits.reshape(-1, 8, VECTOR_BLOCK // 8)


def block_exponents(arrays: Sequence[chex.Array], slots: Sequence[Any]) -> list[Any]:
    """For each encoded slot, the exponents to encode its new array with; `None` for other slots.

    With these exponents, the largest number of a block has a code even if it is rounded up.

    Args:
      arrays: the new array of each slot.
    """

    encoded_slots = [(i, slot) for i, slot in enumerate(slots) if isinstance(slot, Scaled8)]
    exponents: list[Any] = [None] * len(slots)
    if not encoded_slots:
        return exponents

    def bits_of(x: chex.Array, slot: Scaled8) -> chex.Array:
        """The bits of the absolute values, by block. As integers, they sort like the values."""
        absolute = jnp.abs(x).astype(jnp.float32)
        if slot.codes.dtype != np.int8:  # uint8 has no code for a negative number
            absolute = jnp.where(x < 0, jnp.nan, absolute)
        return _blocks(jax.lax.bitcast_convert_type(absolute, jnp.int32))

    bits = [bits_of(arrays[i], slot) for i, slot in encoded_slots]
    is_long_vector = encoded_slots[0][1].ndim == 1 and bits[0].ndim == 3
    largest = _largest(bits, (1, 2) if is_long_vector else (bits[0].ndim - 1,))

    def exponent(largest_bits: chex.Array, slot: Scaled8) -> chex.Array:
        # `biased` is the exponent of the largest number once its fraction is rounded up to the bits
        # that codes keep. That of infinity is 255, and a NaN counts as infinity.
        finite_or_infinity = jnp.minimum(largest_bits, np.int32(0x7F800000))
        biased = (finite_or_infinity + np.int32((1 << _DROPPED_BITS) - 1)) >> 23
        stored = jnp.maximum(biased - np.int32(_exponent_range(slot.codes.dtype) + _OFFSET), 0)
        return jnp.where(biased < 255, stored, _NOT_FINITE).astype(jnp.uint8)

    for (i, slot), x in zip(encoded_slots, largest, strict=True):
        exponents[i] = exponent(x, slot)
    return exponents


def _largest(arrays: list[chex.Array], axes: tuple[int, ...]) -> list[chex.Array]:
    """The maxima of integer arrays over axes.

    The arrays are computed from gradients. One reduction takes all arrays, so that XLA reads the
    gradients only once. On a CPU, XLA stores the operand of a reduction of one array, but not the
    operands of a reduction of several. So a single array gets a second operand, of smaller numbers.
    """
    operands = arrays if len(arrays) > 1 else [arrays[0], arrays[0] >> 1]
    maxima = jax.lax.reduce(
        operands,
        [np.int32(0)] * len(operands),
        lambda a, b: [jnp.maximum(x, y) for x, y in zip(a, b, strict=True)],
        axes,
    )
    return list(maxima) if len(arrays) > 1 else [jnp.maximum(*maxima)]


def _for_each_element(x: chex.Array, shape: tuple[int, ...]) -> chex.Array:
    """Repeats the number of each block for all elements of the block."""
    if len(shape) != 1 or shape[0] <= VECTOR_BLOCK:
        return jnp.broadcast_to(x, shape)
    return jnp.broadcast_to(x[:, None, None], (len(x), 8, VECTOR_BLOCK // 8)).reshape(-1)[
        : shape[0]
    ]


def _power(biased: chex.Array) -> chex.Array:
    """The float32 power of two with this biased exponent, 1 to 254."""
    return jax.lax.bitcast_convert_type(biased << 23, jnp.float32)


def encode(x: chex.Array, code_dtype: Any, exponents: chex.Array, random: chex.Array) -> Scaled8:
    """Encodes a float array in 8 bits. With random bits, the expected value of a number is exact.

    Args:
      x: real floats.
      code_dtype: int8, or uint8 for numbers that are not negative.
      exponents: the result of `block_exponents` for this slot.
      random: uint32 below 2**16, of the shape of x. A number lies at some fraction of the way from
        one code to the next. It is rounded up if `(random + 0.5) / 2**16` plus this fraction
        reaches 1. So 2**15 rounds to the nearest.
    """
    codes = _codes_without_derivative(np.dtype(code_dtype), x, exponents, random)
    return Scaled8(codes, exponents)


def _codes(code_dtype: Any, x: chex.Array, exponents: chex.Array, random: chex.Array) -> chex.Array:
    exponent_range, signed = _exponent_range(code_dtype), code_dtype == np.int8
    exponent, random = exponents.astype(jnp.int32), random.astype(jnp.int32)
    # Scale so that the smallest number with a full fraction becomes 1.
    factor = _power(_ENCODING_BIAS - jnp.minimum(exponent, _ENCODING_BIAS - exponent_range))
    scaled = jnp.abs(x).astype(jnp.float32) * _for_each_element(factor, x.shape)
    scaled_bits = jax.lax.bitcast_convert_type(scaled, jnp.int32)
    # From 1 on, a code is the bits of a float without the dropped fraction bits; the biased
    # exponent, 127 at 1, becomes 1. The random number is added to the top 16 of the 20 dropped
    # bits, and 8 is half of its unit. The sum carries into the code if the number is to be rounded
    # up.
    full = ((scaled_bits + (random << 4) + 8) >> _DROPPED_BITS) - np.int32(126 << 3)
    # Below 1, a code is the number of eighths.
    small = jnp.floor(8 * scaled + (random.astype(jnp.float32) + 0.5) * np.float32(2**-16))
    magnitude = jnp.where(scaled < 1, small.astype(jnp.int32), full)
    code = jnp.clip(magnitude, 0, 127 if signed else 255).astype(code_dtype)
    # The last operation must be a select of codes. After any other operation, XLA would compute the
    # codes twice, once for the state and once to decode them, and copy the old codes for that.
    return jnp.where(x < 0, -code, code) if signed else jnp.where((code == 0) & (x != 0), 1, code)


_codes_without_derivative = jax.custom_jvp(_codes, nondiff_argnums=(0,))


@_codes_without_derivative.defjvp
def _codes_jvp(code_dtype: Any, primals: Any, tangents: Any) -> Any:
    raise TypeError(
        f"a step with moments in {SCALED8!r} has no derivative, since it stores integers: to "
        "differentiate through steps, keep moments in float32 or bfloat16 (m_dtype, v_dtype)"
    )


def decode(slot: Scaled8) -> chex.Array:
    """The float32 array that is stored in 8 bits."""
    codes, exponents = slot.codes, slot.exponents.astype(jnp.int32)
    exponent_range = _exponent_range(codes.dtype)
    power = _power(jnp.minimum(exponents, _ENCODING_BIAS) + _OFFSET)
    scale = jnp.where(exponents <= _ENCODING_BIAS - exponent_range, power, jnp.nan)
    number = codes.astype(jnp.int32)
    magnitude = jnp.abs(number)
    full = jax.lax.bitcast_convert_type((magnitude << _DROPPED_BITS) + (126 << 23), jnp.float32)
    scaled = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * 0.125, full)
    absolute = scaled * _for_each_element(scale, codes.shape)
    return jnp.where(number < 0, -absolute, absolute) if codes.dtype == np.int8 else absolute
