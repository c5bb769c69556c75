"""Row gradients: what a table's rows got, and a rule on arrays applied to them.

A model reads a few rows of a large table; the gradients of the others are zero. A `RowGradient`
holds the rows that were read, each once, and stands where the table's gradient would stand.
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
from adamjax.blocks import in_blocks, rows_of_each, together
from adamjax.data import Data, static
from adamjax.mesh import everywhere, put, taken
from adamjax.moments import accumulator, is_signed, saturated, stepped, widen, widened
from adamjax.rounding import is_narrow, write_slots
from adamjax.search import distinct

__all__ = [
    "Recurrence",
    "RowGradient",
    "RowMoves",
    "applied",
    "as_int32",
    "check_sound",
    "checked_ids",
    "each_array",
    "in_table",
    "integers",
    "parts",
    "row_gradient",
    "run_rule",
    "sealed",
    "summed",
    "summed_of_each",
    "unsealed",
    "whole",
]


# Arithmetic on the leaves of a row gradient would change its indices. It changes this as well:
# odd, so that no sum of n of it is it again, large and negative, so that no halved sum, absolute
# value, clipped or squared one is. A NumPy array, so that in the trace it was made in it is known,
# and costs nothing; its sums do not warn.
SEAL = np.array(-0x5EA1_0FD1, np.int32)
SEAL.setflags(write=False)


class RowGradient(Data):
    """Rows of a table and what is added to them; a pytree, made by `row_gradient`.

    As a gradient it says that all other rows have the gradient zero. Multiplied by a scalar,
    cast with `astype` and added to an array (`table + rows` is a scatter, so
    `optax.apply_updates` takes it) it behaves as the dense array of its `shape` would, but that the
    sum has the dtype of the array, which must be a float, and complex if the rows are. The sum of
    two is the gradient of both, lazy if both are. Arithmetic on its leaves is not
    (`jax.tree.map(jnp.add, a, b)`, `jax.lax.psum(rows, axis)`): it moves indices too. What comes of
    that is refused where it is used, or, if only the compiled step can tell, has NaN for its
    values. (Integer combinations whose weights add up to one, as `a - b + c`, and maxima and minima
    are not noticed.)

    Attributes:
      indices: int32[n], distinct, in no particular order; `num_rows` marks a place that holds
        no row.
      values: float[n, *trailing], zero where there is no row.
      rest: float[num_rows, *trailing], what all other rows get, zero at the rows that are here;
        `None` for zero. An optimizer with `rows="dense"` gives updates that have it.
      num_rows: the table's number of rows, static.
      lazy: whether the other rows stand still, momentum, decay and average included, static;
        set by an optimizer with `rows="lazy"`.
      seal: int32, a fixed number, by which arithmetic on the leaves is noticed; `None` in states.

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

    # NumPy must leave `array + rows` to us.
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
        """The same rows with a function that maps 0 to 0 applied to all values."""
        return self.replace(
            values=function(self.values),
            rest=None if self.rest is None else function(self.rest),
        )

    def astype(self, dtype: Any) -> "RowGradient":
        """The same rows with values of another dtype."""
        return self.map(lambda x: x.astype(dtype))

    def emptied(self) -> "RowGradient":
        """As large, and without any row: what moves nothing."""
        indices = jnp.full_like(self.indices, self.num_rows)
        return self.map(jnp.zeros_like).replace(indices=indices)

    def to_dense(self) -> chex.Array:
        """The dense array of `shape`."""
        rows = check_sound("RowGradient", self)
        others = jnp.zeros(rows.shape, rows.dtype) if rows.rest is None else rows.rest
        return others + rows.replace(rest=None)

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
        table = jnp.asarray(other)
        real = jnp.issubdtype(self.dtype, jnp.floating)
        if not jnp.issubdtype(table.dtype, jnp.inexact if real else jnp.complexfloating):
            raise TypeError(
                f"row gradients of {self.dtype.name} cannot be added to an array of "
                f"{table.dtype.name}, which would keep a part of them: cast the array"
            )
        return check_sound("RowGradient", self).added_to(table)

    __radd__ = __add__

    def added_to(self, table: chex.Array, key: Any = None) -> chex.Array:
        """The table moved by its rows, in its own dtype, rounded once.

        Args:
          key: where bfloat16 is to be rounded stochastically, of `rounding_keys`.
        """
        if self.rest is not None:
            table = stepped(table, self.rest, key)

        if table.dtype == accumulator(table.dtype, self.dtype) == self.dtype:
            return put(table, self.indices, self.values, add=True)

        def step(table: Any, indices: chex.Array, rows: Any, values: Any) -> Any:
            before = taken(table, indices, mode="fill", fill_value=0)
            return put(table, indices, stepped(before, values, key, indices)), rows

        return in_blocks(step, table, self.indices, self.num_rows, (), self.values)[0]


# Of one in a state that was pickled before there were seals.
RowGradient.seal = None


class RowMoves(Data):
    """What `exact_rows` moves a table by: to be added to it as it is, by `apply_updates` or `+`.

    Scaled, clipped or averaged it would be wrong, as it has in it what the rows lag behind by.

    Attributes:
      parts: row gradients, no two of which have a row in common.

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
        """The same moves, if nothing has computed with their leaves."""
        return RowMoves(tuple(check_sound(owner, x) for x in self.parts))

    def emptied(self) -> "RowMoves":
        """As large, and without any row: what moves nothing."""
        return RowMoves(tuple(x.emptied() for x in self.parts))

    def __add__(self, table: Any) -> Any:
        if np.shape(table) != self.shape:
            return NotImplemented
        return functools.reduce(operator.add, self.parts, table)

    def added_to(self, table: chex.Array, key: Any) -> chex.Array:
        """The table moved by all parts, as by `RowGradient.added_to`."""
        return functools.reduce(lambda table, rows: rows.added_to(table, key), self.parts, table)

    __radd__ = __add__


def _written(statics: Any) -> bytes:
    return json.dumps(statics).encode()


def _read(written: bytes) -> tuple[Any, ...]:
    return tuple(json.loads(written))


# As an argument or a result of what `jax.export` writes.
for kind in (RowGradient, RowMoves):
    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"adamjax.{kind.__name__}",
        serialize_auxdata=_written,
        deserialize_auxdata=_read,
    )


def check_sound(owner: str, rows: RowGradient) -> RowGradient:
    """The row gradient, to be used; one whose indices something took for gradients is refused.

    Every use goes through this once. Where the seal is being traced, so that only the compiled step
    can tell whether it is intact, it makes NaN of the first rows of the table if it is not:
    wherever the indices were moved to, that is seen.
    """
    if rows.indices.dtype != np.int32:
        raise TypeError(
            f"{owner}: the indices of a row gradient are {rows.indices.dtype.name}, expected "
            "int32: a transform that does not know row gradients has changed them. Put adamjax's "
            "own in its place, or give it dense gradients (to_dense)"
        )
    if np.ndim(rows.indices) != 1 or np.shape(rows.values)[:1] != np.shape(rows.indices):
        raise ValueError(
            f"{owner}: a row gradient has indices of shape {np.shape(rows.indices)} and values of "
            f"shape {np.shape(rows.values)}, expected (n,) and (n, ...). Of several at once (of "
            "vmap, scan or a stack) make one: row_gradient(rows.indices, rows.values, num_rows)"
        )
    seal = rows.seal
    if seal is None or seal is SEAL:
        return rows
    if np.shape(seal) != () or getattr(seal, "dtype", None) != np.int32:
        raise _broken(owner)
    if _is_known(seal):
        if np.asarray(seal) != SEAL:
            raise _broken(owner)
        return rows.replace(seal=SEAL)
    intact = seal == SEAL
    first = jnp.minimum(jax.lax.iota(jnp.int32, len(rows.indices)), rows.num_rows)
    indices = jnp.where(intact, rows.indices, first)
    rows = rows.map(lambda x: jnp.where(intact, x, jnp.nan))
    return rows.replace(indices=indices, seal=SEAL)


def _broken(owner: str) -> ValueError:
    return ValueError(
        f"{owner}: something has computed with the leaves of a row gradient, which moved its "
        "indices as well (jax.tree.map of an arithmetic function does, as do jax.lax.psum and "
        "zeros_like). Add row gradients with a + b, scale them with 2 * a, sum them over devices "
        "with adamjax.sum_over, start a sum from row_gradient without indices; or take to_dense()"
    )


def _is_known(x: Any) -> bool:
    """Whether the value of a scalar can be read here and now."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def unsealed(x: Any) -> Any:
    """A leaf without a seal: one that is checked, and goes on to where a seal would be traced."""
    return _with_seal(x, None)


def sealed(x: Any) -> Any:
    """A leaf as it leaves a transform."""
    return _with_seal(x, SEAL)


def _with_seal(x: Any, seal: Any) -> Any:
    if isinstance(x, RowMoves):
        return RowMoves(tuple(_with_seal(part, seal) for part in x.parts))
    return x.replace(seal=seal) if isinstance(x, RowGradient) else x


def _sum(a: RowGradient, b: RowGradient) -> RowGradient:
    if a.shape != b.shape or a.rest is not None or b.rest is not None:
        raise ValueError(
            f"row gradients of {a.shape} and {b.shape} cannot be added: expected two of one shape, "
            "and no updates of rows='dense'; to_dense() makes arrays of them"
        )
    a, b = (check_sound("RowGradient", x) for x in (a, b))
    indices = jnp.concatenate([a.indices, b.indices])
    rows = row_gradient(indices, jnp.concatenate([a.values, b.values]), a.num_rows)
    return rows.replace(lazy=a.lazy and b.lazy)


# --- making one -----------------------------------------------------------------------------------


def row_gradient(
    indices: chex.Array,
    values: chex.Array,
    num_rows: int,
    *,
    check: bool = False,
) -> RowGradient:
    """The gradient of a table of which only some rows were read; equal indices are summed.

    Args:
      indices: integers of any dtype and shape, arrays, NumPy's, or Python's; one outside
        `[0, num_rows)` contributes nothing (-1 does not mean the last row). NumPy's and Python's
        may have any width. (As an argument of `jit`, a 64-bit array is cut to 32 bits by JAX,
        unless x64 is enabled, before anything here sees it.)
      values: floats of shape `indices.shape + trailing`: the gradient of each row that was read.
        Sums are taken in float32 at least.
      num_rows: rows of the table, a Python int of at least 1 and below 2**31 - 1.
      check: report an index outside the table through `jax.experimental.checkify`, which must
        then transform the calling function.

    Returns:
      A `RowGradient` with room for `indices.size` rows.

    Raises:
      TypeError, ValueError: dtypes or shapes do not fit.

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
    indices, values = integers("row_gradient", indices), jnp.asarray(values)
    if not is_signed(values.dtype):
        signed = " that can be zero and negative" * jnp.issubdtype(values.dtype, jnp.inexact)
        raise TypeError(f"row_gradient: values must be floats{signed}, got {values.dtype.name}")
    if values.shape[: indices.ndim] != indices.shape:
        raise ValueError(
            f"row_gradient: values must have the shape of indices and the row's behind it, "
            f"{indices.shape} + (...), got {values.shape}"
        )
    num_rows = whole("row_gradient: num_rows", num_rows, np.iinfo(np.int32).max - 1)
    trailing = values.shape[indices.ndim :]
    # Gathered here, the sums are those of one device; left to itself, a compiler that splits them
    # sends twice as much, or an array as long as the table.
    indices = everywhere(indices)
    ids = in_table(indices.reshape(-1), num_rows)
    if check:
        _report(indices, ids, num_rows)
    return summed(*distinct(ids, num_rows), values.reshape(ids.size, *trailing), num_rows)


def summed(
    found: chex.Array, position: chex.Array, values: chex.Array, num_rows: int
) -> RowGradient:
    """The row gradient of `values[n, *trailing]` at ids of which `distinct` is known."""
    return summed_of_each([(found, position)], [values], [num_rows])[0]


def summed_of_each(
    searched: Sequence[tuple[chex.Array, chex.Array]],
    values: Sequence[chex.Array],
    num_rows: Sequence[int],
) -> list[RowGradient]:
    """`summed` for several tables, those of one width and dtype in one sum."""
    sums: list[Any] = [None] * len(values)
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(values):
        alike.setdefault((x.shape[1:], x.dtype), []).append(i)
    for several in (own for same in alike.values() for own in together(same, values)):
        sizes = [len(searched[i][0]) for i in several]
        starts = np.cumsum([0, *sizes[:-1]])
        # An index outside has the position of no row.
        places = [
            jnp.where(searched[i][1] < size, searched[i][1] + start, sum(sizes))
            for i, size, start in zip(several, sizes, starts, strict=True)
        ]
        x = jnp.concatenate([everywhere(values[i]) for i in several])
        empty = jnp.zeros((sum(sizes), *x.shape[1:]), widened(x.dtype, accumulator(x.dtype)))
        place = jnp.concatenate(places).astype(np.uint32)
        total = empty.at[place].add(x.astype(empty.dtype), mode="drop").astype(x.dtype)
        for i, own in zip(several, rows_of_each(total, sizes), strict=True):
            sums[i] = RowGradient(searched[i][0], own, num_rows=num_rows[i])
    return sums


def whole(what: str, value: Any, most: int | None = None) -> int:
    """A size, a whole number of at least 1, as a Python int; NumPy's integers are taken too."""
    try:
        number = -1 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = -1
    if number < 1 or (most is not None and number > most):
        limit = "" if most is None else f" and at most {most}"
        raise ValueError(f"{what} must be a Python int of at least 1{limit}, got {value!r}")
    return number


def checked_ids(owner: str, indices: Any, num_rows: int) -> chex.Array:
    """Indices as int32, `num_rows` for each that is outside `[0, num_rows)`, of whatever width.

    Args:
      owner: who asks, for the error.
      indices: integers: an array of JAX or NumPy of any dtype, an int, or lists of these.

    Raises:
      TypeError: they are floats, booleans or no numbers.
    """
    return in_table(integers(owner, indices), num_rows)


def integers(owner: str, indices: Any) -> Any:
    """Indices as an array: JAX' own as it is, else a NumPy array, which keeps wide values."""
    if hasattr(indices, "__jax_array__"):
        indices = jnp.asarray(indices)
    if isinstance(indices, list | tuple):
        return _of_list(owner, indices)
    if not isinstance(indices, jax.Array):
        # Integers beyond 64 bits are objects.
        indices = np.asarray(indices)
    if indices.dtype == object:
        wrong = [type(x).__name__ for x in indices.reshape(-1) if not _is_int(x)]
    else:
        is_integer = jnp.issubdtype(indices.dtype, jnp.integer)
        wrong = [] if is_integer else [indices.dtype.name]
    if wrong:
        raise TypeError(
            f"{owner}: indices must be integers, got {wrong[0]}: cast them, if they are whole "
            "numbers (ids.astype(int)), or take the places of a mask (jnp.nonzero)"
        )
    return indices


def _of_list(owner: str, indices: Any) -> Any:
    """Of lists, in which NumPy would make floats of a wide and a negative integer."""
    if any(isinstance(x, jax.Array) for x in jax.tree.leaves(indices)):
        return jnp.stack([as_int32(integers(owner, x)) for x in indices])
    return integers(owner, np.array(indices, object))


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def as_int32(indices: Any) -> chex.Array:
    """Integers as an array of JAX; those beyond int32 become its limits, outside any table."""
    if isinstance(indices, jax.Array):
        return saturated(indices, np.int32)
    limits = np.iinfo(np.int32)
    below, above = (np.asarray(x, bool) for x in (indices < limits.min, indices > limits.max))
    ids = np.where(below | above, 0, indices).astype(np.int32)
    return jnp.asarray(np.where(below, limits.min, np.where(above, limits.max, ids)))


def _report(indices: Any, ids: chex.Array, num_rows: int) -> None:
    """Reports the first index outside the table, if there is one, through checkify."""
    bad, checkify = ids == num_rows, experimental("row_gradient: check=True", "checkify")
    text, limits = "row_gradient: index {index} is outside ", f"[0, {num_rows})"
    if isinstance(indices, jax.Array):
        flat = indices.reshape(-1)
        index = flat[jnp.argmax(bad)] if ids.size else jnp.array(0)
        checkify.check(~jnp.any(bad), text + limits, index=index)
    else:
        first = next((i for i in indices.reshape(-1) if not 0 <= i < num_rows), 0)
        checkify.check(~jnp.any(bad), text.format(index=first) + limits)


def in_table(indices: Any, num_rows: int) -> chex.Array:
    """Integers as int32, `num_rows` for those outside the table."""
    if indices.dtype.itemsize < 4:
        indices = indices.astype(np.int32)
    if not isinstance(indices, jax.Array):
        # Before JAX would cut what is wider than 32 bits.
        outside = np.asarray((indices < 0) | (indices >= num_rows), bool)
        return jnp.asarray(np.where(outside, num_rows, np.where(outside, 0, indices)), jnp.int32)
    inside = (indices >= 0) & (indices < np.asarray(num_rows, indices.dtype))
    return jnp.where(inside, indices, np.asarray(num_rows, indices.dtype)).astype(jnp.int32)


# --- a rule on arrays, on rows --------------------------------------------------------------------


def parts(x: Any) -> list[chex.Array]:
    """The arrays whose elements are the elements of a leaf that are not zero for sure."""
    if not isinstance(x, RowGradient):
        return [x]
    return [x.values] if x.rest is None else [x.values, x.rest]


def each_array(function: Callable[[chex.Array], chex.Array], x: Any) -> Any:
    """A function that maps 0 to 0, applied to all elements of a leaf."""
    return x.map(function) if isinstance(x, RowGradient) else function(x)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """A rule `(c, g, *slots) -> (u, *slots)` whose update comes from what its slots become.

    Attributes:
      moments: `(c, g, *slots) -> slots`.
      direction: `(c, g, *new_slots) -> u`. Both see arrays of the accumulator dtype.
    """

    moments: Callable[..., tuple[chex.Array, ...]]
    direction: Callable[..., chex.Array]

    def __call__(self, c: Any, g: chex.Array, *slots: chex.Array) -> tuple[chex.Array, ...]:
        return self.stored(c, g, slots)

    def stored(
        self,
        c: Any,
        g: chex.Array,
        slots: Sequence[chex.Array],
        key: Any = None,
        rows: Any = None,
    ) -> tuple[chex.Array, ...]:
        """The update, and the new slots in the dtypes of the old ones.

        Args:
          key, rows: how narrow slots are rounded, as for `write_slot`.
        """
        wide, new = self.moved(c, g, *slots)
        stored = write_slots(new, slots, key, rows)
        # The update comes from narrow slots as they are stored. From unrounded ones, XLA would
        # compute it anew from the old slots, and copy these before it overwrites them.
        seen = [
            x.astype(n.dtype) if is_narrow(x.dtype) else n for x, n in zip(stored, new, strict=True)
        ]
        return self.direction(c, wide, *seen).astype(g.dtype), *stored

    def moved(self, c: Any, g: chex.Array, *slots: chex.Array) -> tuple[chex.Array, Any]:
        """The gradient and the new slots, not rounded yet."""
        real = accumulator(g.dtype, slots[-1].dtype)
        wide = widen(g, real)
        return wide, self.moments(c, wide, *(widen(s, real) for s in slots))


def run_rule(
    rule: Callable[..., Any],
    c: Any,
    g: chex.Array,
    slots: Sequence[chex.Array],
    reads: Sequence[chex.Array] = (),
    key: Any = None,
    rows: Any = None,
) -> tuple[chex.Array, ...]:
    """The update of an array by a rule, and its slots in the dtypes in which they are stored."""
    if isinstance(rule, Recurrence):
        return rule.stored(c, g, slots, key, rows)
    u, *new = rule(c, g, *slots, *reads)
    return u, *write_slots(new, slots, key, rows)


def applied(
    rule: Callable[..., Any],
    c: Any,
    lazy: bool,
    g: RowGradient,
    slots: Sequence[chex.Array],
    reads: Sequence[chex.Array],
    key: Any = None,
) -> tuple[Any, ...]:
    """An elementwise rule `(c, g, *slots, *reads) -> (u, *slots)` on the rows of a table.

    To the rows by a gather, the rule, a scatter. Lazily, that is all. Else all other rows are
    then taken on as well, with what they get, which is mostly zero and never an array.

    Args:
      key: for narrow slots, of `rounding_keys`.
    """
    if not slots and not reads:
        return (g.map(lambda x: rule(c, x)[0]),)
    if lazy and g.rest is not None:
        return run_rule(rule, c, g.to_dense(), slots, reads, key)

    def step(tables: Any, indices: chex.Array, values: Any, _: Any) -> Any:
        here, seen = (
            [taken(x, indices, mode="fill", fill_value=0) for x in arrays]
            for arrays in (tables, reads)
        )
        u, *new = run_rule(rule, c, values, here, seen, key, indices)
        return [put(x, indices, n) for x, n in zip(tables, new, strict=True)], u

    tables, u = in_blocks(step, list(slots), g.indices, g.num_rows, g.values)
    moved = g.replace(values=u)
    if lazy or g.lazy:
        return moved.replace(lazy=True), *tables
    if reads:
        g = g.replace(indices=_after(u, g.indices, g.num_rows))
    rest, *tables = _others(rule, c, g, tables, reads, key)
    return moved.replace(rest=rest), *tables


def _after(first: chex.Array, indices: chex.Array, num_rows: int) -> chex.Array:
    """The indices, which XLA cannot know before it has computed `first`.

    What is written at them is then written after the rows that `first` came from were read. XLA
    would not know which of the two comes first, and copy the table.
    """
    none_is_larger = jnp.where(jnp.any(jnp.isnan(first)), num_rows, np.iinfo(np.int32).max)
    return jnp.minimum(indices, none_is_larger)


def _others(
    rule: Callable[..., Any],
    c: Any,
    g: RowGradient,
    slots: Sequence[chex.Array],
    reads: Sequence[chex.Array],
    key: Any,
) -> tuple[chex.Array, ...]:
    """A rule on the rows that a row gradient does not hold: the others' updates, all slots."""
    here = jnp.zeros(g.num_rows, bool).at[g.indices].set(True, mode="drop")
    here = here.reshape(-1, *[1] * (g.ndim - 1))
    others = jnp.zeros(g.shape, g.dtype) if g.rest is None else g.rest

    def kept(new: Any) -> list[chex.Array]:
        pairs = zip(slots, write_slots(new, slots, key), strict=True)
        return [jnp.where(here, s, x) for s, x in pairs]

    if isinstance(rule, Recurrence):
        wide, new = rule.moved(c, others, *slots)
        held = kept(new)
        if all(x.dtype == n.dtype or is_narrow(x.dtype) for x, n in zip(held, new, strict=True)):
            # From what is kept, not from what it was before: else XLA, which does not know in
            # which order the two are wanted, would copy every slot (4 times the time).
            new = [x.astype(n.dtype) for x, n in zip(held, new, strict=True)]
        u = rule.direction(c, wide, *new).astype(g.dtype)
    else:
        u, *new = rule(c, others, *slots, *reads)
        held = kept(new)
    if u is not g.rest:
        u = jnp.where(here, jnp.zeros((), u.dtype), u)
    return u, *held
