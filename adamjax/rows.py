"""Row gradients, and how rules are applied to them.

A model reads a few rows of a large table; the gradients of the others are zero. A `RowGradient`
has only the rows that were read, each of them once. It replaces the table's gradient.
"""

import dataclasses
import functools
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from adamjax._compat import experimental
from adamjax.blocks import group_tables, joined_positions, rows_of_each, run_in_blocks
from adamjax.data import Data, static
from adamjax.encoding import Scaled8, expect_exponents_by_row, map_stored
from adamjax.mesh import gather_rows, replicate, scatter_rows
from adamjax.moments import (
    Recurrence,
    add_update,
    checked_results,
    compute_dtype,
    is_signed,
    saturating_cast,
    widened_dtype,
)
from adamjax.numpy_arrays import native
from adamjax.rounding import is_narrow, read_slot, write_slots
from adamjax.search import distinct

__all__ = [
    "RowGradient",
    "RowMoves",
    "apply_rule_to_rows",
    "as_int32",
    "as_integers",
    "as_row_ids",
    "as_size",
    "check_sound",
    "checked_ids",
    "each_array",
    "expect_row_count",
    "indices_after",
    "is_known",
    "nonzero_arrays",
    "row_gradient",
    "run_rule",
    "sum_rows",
    "sum_rows_of_each",
    "with_seal",
    "without_seal",
]


# Arithmetic on the leaves of a row gradient changes its indices, but also this number, and so the
# arithmetic is detected. The number is odd, so that no sum of n copies equals it; it is large and
# negative, so that no halved sum, absolute value, clipped value or square equals it. It is a NumPy
# array: its value is known while tracing and costs nothing, and its sums overflow without the
# warning of NumPy scalars.
SEAL = np.array(-0x5EA1_0FD1, np.int32)
SEAL.setflags(write=False)


class RowGradient(Data):
    """The gradients, or the updates, of some rows of a table; a pytree, made by `row_gradient`.

    As a gradient it means that all other rows have the gradient zero. You can multiply it by a
    scalar, cast it with `astype` and add it to an array, like the dense array of its `shape`
    (`table + rows` is a scatter, so `optax.apply_updates` takes it). The sum has the dtype of the
    array. So the array must have a real or complex float dtype, and a complex one if the rows are
    complex. The sum of two row gradients is a row gradient, lazy if both are. Do not use arithmetic
    on its leaves (`jax.tree.map(jnp.add, a, b)`, `jax.lax.psum(rows, axis)`): it changes indices
    too. The result is refused where it is used. Where only the compiled step can notice the change,
    the result gets NaN values instead. (Integer combinations whose weights add up to one, such as
    `a - b + c`, maxima and minima, and functions that leave out scalars are not noticed.) Do not
    give a row gradient to a function that sums over leaves either: `optax.tree.norm` would count
    the indices, `adamjax.global_norm` does not.

    Attributes:
      indices: int32[n], distinct, in no particular order; `num_rows` marks an empty place.
      values: float[n, *trailing], zero in empty places.
      rest: float[num_rows, *trailing], the values of all other rows, zero at the rows in indices;
        `None` for zeros. Updates of an optimizer with `rows="dense"` have a rest.
      num_rows: the table's number of rows, static.
      lazy: static, whether the other rows are left alone, also by momentum, decay and averages; set
        by an optimizer with `rows="lazy"`.
      seal: int32, a fixed number: if it has changed, there was arithmetic on the leaves. `None` in
        states.

    >>> import adamjax, jax.numpy as jnp
    >>> rows = adamjax.row_gradient(jnp.array([2, 0]), jnp.array([[1.0], [5.0]]), 3)
    >>> jnp.ones((3, 1)) + 2 * rows
    Array([[11.],
           [ 1.],
           [ 3.]], dtype=float32)
    """

    indices: chex.Array
    values: chex.Array
    rest: Any = None
    num_rows: int = static(kw_only=True)
    lazy: bool = static(default=False, kw_only=True)
    seal: Any = dataclasses.field(default_factory=lambda: SEAL, kw_only=True, repr=False)

    # So that NumPy leaves `array + rows` to `__radd__`.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The table's shape."""
        return (self.num_rows, *self.values.shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def map(self, function: Callable[[chex.Array], chex.Array]) -> "RowGradient":
        """The same rows after a function is applied to all values; it must map 0 to 0."""
        return self.replace(
            values=function(self.values),
            rest=None if self.rest is None else function(self.rest),
        )

    def astype(self, dtype: Any) -> "RowGradient":
        """The same rows with values of another dtype."""
        return self.map(lambda x: x.astype(dtype))

    def emptied(self) -> "RowGradient":
        """A row gradient of the same shapes without any row: it moves nothing."""
        indices = jnp.full_like(self.indices, self.num_rows)
        return self.map(jnp.zeros_like).replace(indices=indices)

    def to_dense(self) -> chex.Array:
        """The dense array of `shape`."""
        rows = check_sound("RowGradient", self)
        rest = jnp.zeros(rows.shape, rows.dtype) if rows.rest is None else rows.rest
        return rest + rows.replace(rest=None)

    def __mul__(self, factor: Any) -> Any:
        if isinstance(factor, RowGradient) or np.ndim(factor) != 0:
            return NotImplemented
        return self.map(lambda x: x * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if isinstance(divisor, RowGradient) or np.ndim(divisor) != 0:
            return NotImplemented
        return self.map(lambda x: x / divisor)

    def __neg__(self) -> "RowGradient":
        return self.map(operator.neg)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, RowGradient):
            return _sum(self, other)
        if np.shape(other) != self.shape:
            return NotImplemented
        table = jnp.asarray(native("RowGradient: the other summand", other))
        real = jnp.issubdtype(self.dtype, jnp.floating)
        if not jnp.issubdtype(table.dtype, jnp.inexact if real else jnp.complexfloating):
            raise TypeError(
                f"row gradients of {self.dtype.name} cannot be added to an array of "
                f"{table.dtype.name}, which would lose a part of them: cast the array"
            )
        return check_sound("RowGradient", self).added_to(table)

    __radd__ = __add__

    def added_to(self, table: chex.Array, key: Any = None) -> chex.Array:
        """The table plus these rows, in its own dtype, rounded once.

        Args:
          key: from `rounding_keys`, if a bfloat16 table is to be rounded stochastically.
        """
        if self.rest is not None:
            table = add_update(table, self.rest, key)

        # If nothing must be widened for the sum, adding in place rounds once as well.
        if table.dtype == compute_dtype(table.dtype, self.dtype) == self.dtype:
            return scatter_rows(table, self.indices, self.values, add=True)

        return _add_to_rows(self.num_rows, table, self.indices, self.values, key)


# Jitted for callers outside of `jit`, where a loop would be compiled again at each call.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _add_to_rows(
    num_rows: int, table: chex.Array, indices: chex.Array, values: chex.Array, key: Any
) -> chex.Array:
    """A table after `add_update` of some of its rows."""

    def step(table: Any, indices: chex.Array, rows: Any, values: Any) -> Any:
        before = gather_rows(table, indices, mode="fill", fill_value=0)
        return scatter_rows(table, indices, add_update(before, values, key, indices)), rows

    return run_in_blocks(step, table, indices, num_rows, (), values)[0]


# For row gradients that were pickled before there were seals.
RowGradient.seal = None


class RowMoves(Data):
    """The update of a table by `exact_rows`. Add it unchanged, by `apply_updates` or `+`.

    It must not be scaled, clipped or averaged, because it also brings rows up to date.

    Attributes:
      parts: row gradients without common rows.

    >>> import adamjax, jax.numpy as jnp
    >>> params = {"table": jnp.ones((3, 1))}
    >>> tx = adamjax.exact_rows(adamjax.adam(0.5), "table")
    >>> grads = {"table": adamjax.row_gradient(jnp.array([2]), jnp.ones((1, 1)), 3)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> params["table"] + updates["table"]
    Array([[1. ],
           [1. ],
           [0.5]], dtype=float32)
    """

    parts: tuple[RowGradient, ...]

    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The table's shape."""
        return self.parts[0].shape

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    def astype(self, dtype: Any) -> "RowMoves":
        """The same moves in another dtype."""
        if dtype == self.dtype:
            return self
        return RowMoves(tuple(x.astype(dtype) for x in self.parts))

    def checked(self, owner: str) -> "RowMoves":
        """The same moves, or an error if something has computed with their leaves."""
        return RowMoves(tuple(check_sound(owner, x) for x in self.parts))

    def emptied(self) -> "RowMoves":
        """Moves of the same shapes without any row: they move nothing."""
        return RowMoves(tuple(x.emptied() for x in self.parts))

    def __add__(self, table: Any) -> Any:
        if np.shape(table) != self.shape:
            return NotImplemented
        return functools.reduce(operator.add, self.parts, table)

    __radd__ = __add__

    def added_to(self, table: chex.Array, key: Any) -> chex.Array:
        """The table moved by all parts, as by `RowGradient.added_to`."""
        return functools.reduce(lambda table, rows: rows.added_to(table, key), self.parts, table)


def _serialize(statics: Any) -> bytes:
    return json.dumps(statics).encode()


def _deserialize(data: bytes) -> tuple[Any, ...]:
    return tuple(json.loads(data))


# With this, `jax.export` can serialize functions that take or return row gradients.
for cls in (RowGradient, RowMoves):
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"adamjax.{cls.__name__}",
        serialize_auxdata=_serialize,
        deserialize_auxdata=_deserialize,
    )


class SpoiltRows(TypeError, ValueError):
    """Something has computed with the leaves of a row gradient as if it were an array."""


def check_sound(owner: str, rows: RowGradient) -> RowGradient:
    """The row gradient, or an error if something has computed with its indices.

    Every use calls this once. If the seal is traced, only the compiled step can compare it. Then a
    broken seal writes NaN to the first rows of the table, so that the error shows even if all
    indices are now outside the table.
    """
    if rows.indices.dtype != np.int32:
        raise SpoiltRows(
            f"{owner}: the indices of a row gradient are {rows.indices.dtype.name}, expected "
            "int32: a transform that does not know row gradients has changed them. Use adamjax's "
            "own instead, or give it dense gradients (to_dense)"
        )
    if np.ndim(rows.indices) != 1 or np.shape(rows.values)[:1] != np.shape(rows.indices):
        raise SpoiltRows(
            f"{owner}: a row gradient has indices of shape {np.shape(rows.indices)} and values of "
            f"shape {np.shape(rows.values)}, expected (n,) and (n, ...). If these are several "
            "(from vmap, scan or a stack), make one: row_gradient(rows.indices, rows.values, "
            "num_rows)"
        )
    seal = rows.seal
    if seal is None or seal is SEAL:
        return rows
    if np.shape(seal) != () or getattr(seal, "dtype", None) != np.int32:
        raise _broken_seal(owner)
    if is_known(seal):
        if np.asarray(seal) != SEAL:
            raise _broken_seal(owner)
        return rows.replace(seal=SEAL)
    intact = seal == SEAL
    first = jnp.minimum(jax.lax.iota(jnp.int32, len(rows.indices)), rows.num_rows)
    indices = jnp.where(intact, rows.indices, first)
    rows = rows.map(lambda x: jnp.where(intact, x, jnp.nan))
    return rows.replace(indices=indices, seal=SEAL)


def _broken_seal(owner: str) -> SpoiltRows:
    return SpoiltRows(
        f"{owner}: something has computed with the leaves of a row gradient, which changed its "
        "indices too (as jax.tree.map of an arithmetic function, jax.lax.psum and zeros_like do). "
        "Add row gradients with a + b, scale them with 2 * a, sum them over devices "
        "with adamjax.sum_over, start a sum from row_gradient without indices; or take to_dense()"
    )


def is_known(x: Any) -> bool:
    """Whether the value of a scalar can be read while tracing."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def without_seal(x: Any) -> Any:
    """A checked leaf without its seal, for functions in which the seal would be traced."""
    return _set_seal(x, None)


def with_seal(x: Any) -> Any:
    """A leaf with its seal, in the form that transforms return."""
    return _set_seal(x, SEAL)


def _set_seal(x: Any, seal: Any) -> Any:
    if isinstance(x, RowMoves):
        return RowMoves(tuple(_set_seal(part, seal) for part in x.parts))
    return x.replace(seal=seal) if isinstance(x, RowGradient) else x


def _sum(a: RowGradient, b: RowGradient) -> RowGradient:
    if a.shape != b.shape or a.rest is not None or b.rest is not None:
        raise ValueError(
            f"row gradients of {a.shape} and {b.shape} cannot be added: expected two of one shape, "
            "and no updates of rows='dense'; convert them with to_dense()"
        )
    a, b = (check_sound("RowGradient", x) for x in (a, b))
    indices = jnp.concatenate([a.indices, b.indices])
    rows = row_gradient(indices, jnp.concatenate([a.values, b.values]), a.num_rows)
    return rows.replace(lazy=a.lazy and b.lazy)


# --- making row gradients -------------------------------------------------------------------------


def row_gradient(
    indices: chex.Array,
    values: chex.Array,
    num_rows: int,
    *,
    check: bool = False,
) -> RowGradient:
    """The gradient of a table of which only some rows were read; equal indices are summed.

    Args:
      indices: integers of any dtype and shape, of JAX, NumPy or Python. Indices outside
        `[0, num_rows)` are ignored (-1 does not mean the last row). NumPy's and Python's may have
        any width. (JAX cuts a 64-bit array that is an argument of `jit` to 32 bits before this
        function sees it, unless x64 is enabled.)
      values: floats of shape `indices.shape + trailing`: the gradient of each row that was read.
        They are summed in float32 or wider.
      num_rows: the number of rows of the table, a Python int of at least 0 and below 2**31 - 1.
      check: whether to report an index outside the table through `jax.experimental.checkify`,
        which must then transform the calling function.

    Returns:
      A `RowGradient` with `indices.size` places.

    Raises:
      TypeError, ValueError: dtypes or shapes do not fit, or an array of NumPy has a mask.

    >>> import adamjax, jax.numpy as jnp
    >>> rows = adamjax.row_gradient(jnp.array([2, 0, 2]), jnp.array([[1.0], [5.0], [3.0]]), 4)
    >>> rows.to_dense()
    Array([[5.],
           [0.],
           [4.],
           [0.]], dtype=float32)
    """
    if values is None:
        raise TypeError("row_gradient: values must be floats, got None")
    indices = as_integers("row_gradient", indices)
    values = jnp.asarray(native("row_gradient: the array of values", values))
    if not is_signed(values.dtype):
        expected = "floats"
        if jnp.issubdtype(values.dtype, jnp.inexact):
            # Such as float8_e8m0fnu, which has neither a sign nor a zero.
            expected = "floats that can be zero and negative"
        raise TypeError(f"row_gradient: values must be {expected}, got {values.dtype.name}")
    if values.shape[: indices.ndim] != indices.shape:
        raise ValueError(
            f"row_gradient: values must have the shape of indices, then that of a row, "
            f"{indices.shape} + (...), got {values.shape}"
        )
    num_rows = as_size("row_gradient: num_rows", num_rows, _MOST_ROWS, least=0)
    trailing = values.shape[indices.ndim :]
    # Every device gets all indices, so that the compiler does not split the sums over devices. For
    # split sums, devices would exchange twice as much, or an array as long as the table.
    indices = replicate(indices)
    ids = as_row_ids(indices.reshape(-1), num_rows)
    if check:
        _report_outside(indices, ids, num_rows)
    return sum_rows(*distinct(ids, num_rows), values.reshape(ids.size, *trailing), num_rows)


def sum_rows(
    distinct_ids: chex.Array, position: chex.Array, values: chex.Array, num_rows: int
) -> RowGradient:
    """The row gradient of `values[n, *trailing]`, given the results of `distinct` for its ids."""
    return sum_rows_of_each([(distinct_ids, position)], [values], [num_rows])[0]


def sum_rows_of_each(
    ids_and_positions: Sequence[tuple[chex.Array, chex.Array]],
    values: Sequence[chex.Array],
    num_rows: Sequence[int],
) -> list[RowGradient]:
    """`sum_rows` for several tables; tables of one width and dtype are summed at once."""
    row_gradients: list[Any] = [None] * len(values)
    tables_alike: dict[Any, list[int]] = {}
    for i, x in enumerate(values):
        tables_alike.setdefault((x.shape[1:], x.dtype), []).append(i)
    batches = [batch for tables in tables_alike.values() for batch in group_tables(tables, values)]
    for batch in batches:
        ids, positions = zip(*(ids_and_positions[i] for i in batch), strict=True)
        sizes = list(map(len, ids))
        starts = np.cumsum([0, *sizes[:-1]])
        # An index outside the table has the position `size`. In the joined rows that would be the
        # first position of the next table.
        targets = joined_positions(positions, sizes, starts, outside=sum(sizes))
        x = jnp.concatenate([replicate(values[i]) for i in batch])
        empty = jnp.zeros(
            (sum(sizes), *x.shape[1:]), widened_dtype(x.dtype, compute_dtype(x.dtype))
        )
        total = (
            empty.at[targets.astype(np.uint32)]
            .add(x.astype(empty.dtype), mode="drop")
            .astype(x.dtype)
        )
        for i, own_ids, sums in zip(batch, ids, rows_of_each(total, sizes), strict=True):
            row_gradients[i] = RowGradient(own_ids, sums, num_rows=num_rows[i])
    return row_gradients


# --- indices and numbers of rows ------------------------------------------------------------------

# Rows are numbered by int32, and the number after the last row stands for no row.
_MOST_ROWS = np.iinfo(np.int32).max - 1


def expect_row_count(what: str, num_rows: int) -> None:
    """Raises an error for a table with more rows than int32 can number."""
    if num_rows > _MOST_ROWS:
        raise ValueError(
            f"{what} has {num_rows} rows, expected at most {_MOST_ROWS}, because rows are numbered "
            "by int32: split the table into several"
        )


def as_size(what: str, value: Any, most: int | None = None, least: int = 1) -> int:
    """A whole number of at least `least`, of Python or NumPy, as a Python int."""
    try:
        number = -1 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = -1
    if number < least or (most is not None and number > most):
        limit = "" if most is None else f" and at most {most}"
        raise ValueError(f"{what} must be a Python int of at least {least}{limit}, got {value!r}")
    return number


def checked_ids(owner: str, indices: Any, num_rows: int) -> chex.Array:
    """Indices of any width as int32, with `num_rows` for those outside `[0, num_rows)`.

    Args:
      owner: the caller's name, for errors.
      indices: integers: an array of JAX or NumPy of any dtype, an int, or lists of these.

    Raises:
      TypeError: they are floats, booleans or no numbers.
    """
    return as_row_ids(as_integers(owner, indices), num_rows)


def as_integers(owner: str, indices: Any) -> Any:
    """Indices as an array: a JAX array as it is, all else as a NumPy array of any width."""
    indices = native(f"{owner}: the array of indices", indices)
    if hasattr(indices, "__jax_array__"):
        indices = jnp.asarray(indices)
    if isinstance(indices, list | tuple):
        return _integers_of_list(owner, indices)
    if not isinstance(indices, jax.Array):
        # NumPy makes integers beyond 64 bits objects.
        indices = np.asarray(indices)
    if indices.dtype == object:
        wrong_types = [type(x).__name__ for x in indices.reshape(-1) if not _is_int(x)]
    else:
        # NumPy counts timedelta64 as an integer dtype.
        is_integer = jnp.issubdtype(indices.dtype, jnp.integer) and indices.dtype.kind != "m"
        wrong_types = [] if is_integer else [indices.dtype.name]
    if wrong_types:
        raise TypeError(
            f"{owner}: indices must be integers, got {wrong_types[0]}: cast them, if they are "
            "whole numbers (ids.astype(int)), or use the indices of a mask (jnp.nonzero)"
        )
    return indices


def _integers_of_list(owner: str, indices: Any) -> Any:
    """`as_integers` of a list.

    The list becomes an array of objects, because NumPy would turn it into floats if one integer is
    negative and another one is beyond int64.
    """
    if any(isinstance(x, jax.Array) for x in jax.tree.leaves(indices)):
        return jnp.stack([as_int32(as_integers(owner, x)) for x in indices])
    return as_integers(owner, np.array(indices, object))


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool | np.timedelta64)


def as_row_ids(indices: Any, num_rows: int) -> chex.Array:
    """Integers as int32, `num_rows` for those outside the table."""
    if indices.dtype.itemsize < 4:
        indices = indices.astype(np.int32)
    if not isinstance(indices, jax.Array):
        # By NumPy, because JAX would cut wide integers to 32 bits.
        outside = (indices < 0) | (indices >= num_rows)
        return jnp.asarray(np.where(outside, num_rows, indices), jnp.int32)
    inside = (indices >= 0) & (indices < np.asarray(num_rows, indices.dtype))
    return jnp.where(inside, indices, np.asarray(num_rows, indices.dtype)).astype(jnp.int32)


def as_int32(indices: Any) -> chex.Array:
    """Integers as a JAX array; those beyond int32 become its limits, which are in no table."""
    if isinstance(indices, jax.Array):
        return saturating_cast(indices, np.int32)
    limits = np.iinfo(np.int32)
    below, above = indices < limits.min, indices > limits.max
    ids = np.where(below | above, 0, indices).astype(np.int32)
    return jnp.asarray(np.where(below, limits.min, np.where(above, limits.max, ids)))


def _report_outside(indices: Any, ids: chex.Array, num_rows: int) -> None:
    """Reports the first index outside the table, if any, through checkify."""
    checkify = experimental("row_gradient: check=True", "checkify")
    is_outside = jnp.any(ids == num_rows)
    text, limits = "row_gradient: index {index} is outside ", f"[0, {num_rows})"
    if isinstance(indices, jax.Array):
        flat = indices.reshape(-1)
        index = flat[jnp.argmax(ids == num_rows)] if ids.size else jnp.array(0)
        checkify.check(~is_outside, text + limits, index=index)
    else:
        first = next((i for i in indices.reshape(-1) if not 0 <= i < num_rows), 0)
        checkify.check(~is_outside, text.format(index=first) + limits)


# --- rules applied to rows ------------------------------------------------------------------------


def nonzero_arrays(x: Any) -> list[chex.Array]:
    """The arrays of a leaf that together have all its elements that may be nonzero."""
    if not isinstance(x, RowGradient):
        return [x]
    return [x.values] if x.rest is None else [x.values, x.rest]


def each_array(function: Callable[[chex.Array], chex.Array], x: Any) -> Any:
    """A function that maps 0 to 0, applied to all elements of a leaf."""
    return x.map(function) if isinstance(x, RowGradient) else function(x)


def run_rule(
    rule: Callable[..., Any],
    c: Any,
    g: chex.Array,
    slots: Sequence[chex.Array],
    reads: Sequence[chex.Array] = (),
    key: Any = None,
    rows: Any = None,
) -> tuple[chex.Array, ...]:
    """Applies a rule to an array: returns the update, and the new slots as they are stored.

    Args:
      rule: an elementwise rule `(c, g, *slots, *reads) -> (u, *slots)`.
      c: the rule's scalars in this step.
      reads: arrays that the rule reads and does not change, such as the weights.
      key: a key of `rounding_keys`, for narrow slots.
      rows: the indices of the array's rows in their table; `None` if the array is a whole leaf.
    """
    if isinstance(rule, Recurrence):
        return rule.update_and_slots(c, g, slots, key, rows)
    results = rule(c, g, *_floats(slots), *reads)
    u, *new = checked_results(rule, results, [g, *slots], "the update and the new slots")
    return u, *write_slots(new, slots, key, rows)


def _floats(slots: Sequence[Any]) -> list[chex.Array]:
    """Slots as inputs of a rule: encoded slots as float32 arrays."""
    return [read_slot(x, x.dtype) if isinstance(x, Scaled8) else x for x in slots]


def apply_rule_to_rows(
    rule: Callable[..., Any],
    c: Any,
    lazy: bool,
    g: RowGradient,
    slots: Sequence[chex.Array],
    reads: Sequence[chex.Array],
    key: Any = None,
) -> tuple[Any, ...]:
    """Applies an elementwise rule `(c, g, *slots, *reads) -> (u, *slots)` to rows of a table.

    This gathers the rows of the slots, applies the rule, and scatters the results. Unless `lazy`,
    the rule is then applied to all other rows, whose gradient is the rest or zero.

    Args:
      key: a key of `rounding_keys`, for narrow slots.
    """
    if not slots and not reads:
        return (g.map(lambda x: checked_results(rule, rule(c, x), [x], "the update")[0]),)
    if lazy and g.rest is not None:
        # With a rest, every row has a gradient, so none is left alone.
        return run_rule(rule, c, g.to_dense(), slots, reads, key)

    for slot in slots:
        expect_exponents_by_row(slot)

    def step(slots: Any, indices: chex.Array, values: Any, _: Any) -> Any:
        def gather(x: chex.Array) -> chex.Array:
            return gather_rows(x, indices, mode="fill", fill_value=0)

        def scatter(x: chex.Array, rows: chex.Array) -> chex.Array:
            return scatter_rows(x, indices, rows)

        slot_rows = [map_stored(gather, x) for x in slots]
        read_rows = [map_stored(gather, x) for x in reads]
        u, *new_rows = run_rule(rule, c, values, slot_rows, read_rows, key, indices)
        return [map_stored(scatter, x, rows) for x, rows in zip(slots, new_rows, strict=True)], u

    new_slots, u = run_in_blocks(step, list(slots), g.indices, g.num_rows, g.values)
    updates = g.replace(values=u)
    if lazy or g.lazy:
        return updates.replace(lazy=True), *new_slots
    if reads:
        # The rows of `reads` must be read before the other rows are written in place.
        g = g.replace(indices=indices_after(u, g.indices, g.num_rows))
    rest, *new_slots = _apply_rule_to_others(rule, c, g, new_slots, reads, key)
    return updates.replace(rest=rest), *new_slots


def indices_after(first: chex.Array, indices: chex.Array, num_rows: int) -> chex.Array:
    """The same indices, but to XLA they depend on `first`.

    So a write at these indices comes after the reads that `first` needs, and XLA need not copy the
    table.
    """
    # Either bound is at least `num_rows`, which no index exceeds, so the minimum changes nothing.
    bound = jnp.where(jnp.any(jnp.isnan(first)), num_rows, np.iinfo(np.int32).max)
    return jnp.minimum(indices, bound)


def _apply_rule_to_others(
    rule: Callable[..., Any],
    c: Any,
    g: RowGradient,
    slots: Sequence[chex.Array],
    reads: Sequence[chex.Array],
    key: Any,
) -> tuple[chex.Array, ...]:
    """Applies a rule to the rows that are not in a row gradient.

    Returns:
      The updates of these rows, zero elsewhere, and then the slots of all rows.
    """
    is_listed = jnp.zeros(g.num_rows, bool).at[g.indices].set(True, mode="drop")
    is_listed = is_listed.reshape(-1, *[1] * (g.ndim - 1))
    rest = jnp.zeros(g.shape, g.dtype) if g.rest is None else g.rest

    def only_others(new_slots: Sequence[Any]) -> list[Any]:
        """The new slots, but with the old values in the rows of the gradient."""

        def select(old: chex.Array, new: chex.Array) -> chex.Array:
            return jnp.where(is_listed, old, new)

        return [map_stored(select, old, new) for old, new in zip(slots, new_slots, strict=True)]

    if isinstance(rule, Recurrence):
        wide, stored, computed = rule.advanced(c, rest, slots, key)
        new = only_others(stored)
        # The direction reads `new`, the slots that the step returns. If it read `computed` instead,
        # XLA would compute that from the old slots, and copy every slot before it overwrites it (4
        # times the time). Only a slot of another dtype than the rule's is read from `computed`,
        # unless it is narrow.
        read = [
            read_slot(x, y.dtype) if x.dtype == y.dtype or is_narrow(x) else y
            for x, y in zip(new, computed, strict=True)
        ]
        u = rule.direction(c, wide, *read).astype(g.dtype)
    else:
        results = rule(c, rest, *_floats(slots), *reads)
        u, *new = checked_results(rule, results, [rest, *slots], "the update and the new slots")
        new = only_others(write_slots(new, slots, key))
    # A rule may return `g.rest` itself, which is already zero at these rows.
    if u is not g.rest:
        u = jnp.where(is_listed, jnp.zeros((), u.dtype), u)
    return u, *new
