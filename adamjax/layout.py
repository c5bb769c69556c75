"""Row-major layouts of tables in memory, which let a TPU read and write single rows.

By default the TPU's compiler lays many tables out column by column, to avoid padding. Then it
copies the whole table before it gathers rows and after it scatters them. A layout belongs to an
array in memory. `jax.jit` uses the layout that an argument already has. A result gets the
layout of `out_shardings`, or else the default layout.

>>> import adamjax, jax.numpy as jnp
>>> params = {"table": adamjax.layout.row_major(jnp.zeros((1000, 64)))}
>>> params_formats, state_formats = adamjax.layout.formats(adamjax.adam(), params)
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import dimension_order, layout_format
from adamjax.data import Tree
from adamjax.encoding import Scaled8
from adamjax.paths import flatten
from adamjax.rows import as_int32, as_integers, as_size
from adamjax.structure import map_like_params

__all__ = ["Packing", "formats", "packing", "row_major"]

# A TPU pads the last dimension to a multiple of this.
_LANES = 128


def _has_layout(x: Any) -> bool:
    """Whether `x` is an array in memory, or a `jax.ShapeDtypeStruct` that describes one."""
    is_array = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    return is_array or isinstance(x, jax.ShapeDtypeStruct)


def _format(x: Any) -> Any:
    """The `Format` of an array: its layout and its sharding.

    If the layout is not known, the result is the sharding alone. The result is `None`, which leaves
    both to JAX, for a value that is not in memory, such as a tracer; for an array that is not
    committed to a device; and for a `ShapeDtypeStruct` without a sharding.
    """
    if not _has_layout(x):
        return None
    # JAX moves an uncommitted array to the device of a computation's other arrays.
    if isinstance(x, jax.Array) and not x.committed:
        return None
    order, sharding = _order(x), x.sharding
    if sharding is None or order is None:
        return sharding
    # Only the order is taken from the array's layout: its tiles depend on the dtype, and slots may
    # have another dtype.
    return layout_format(order, sharding)


def _order(x: Any) -> tuple[int, ...] | None:
    """The dimensions of an array in memory, from major to minor; `None` if not known."""
    return dimension_order(x) if _has_layout(x) else None


def _in_order(x: Any, order: tuple[int, ...]) -> Any:
    return x if _order(x) == order else jax.device_put(x, layout_format(order, x.sharding))


def _slot_format(slot: Any, p: Any, p_format: Any) -> Any:
    """The format of a slot: its parameter's if both have the same shape, else `None`."""
    if isinstance(slot, Scaled8):
        return Scaled8(_slot_format(slot.codes, p, p_format), None)
    has_shape_of_p = isinstance(slot, jax.ShapeDtypeStruct) and slot.shape == jnp.shape(p)
    return p_format if has_shape_of_p else None


def row_major(table: Any) -> Any:
    """A table in row-major layout, one row after another, so that a TPU can read single rows.

    On other devices all arrays are row-major, and the table is returned as it is. On a TPU the
    default depends on the shape, and steps copy a table that is not row-major. Rows are padded to a
    multiple of 128 elements there, so 16 columns take 8 times their bytes: see `packing`.

    `init` creates slots in the layout of the parameters. For jitted functions that return a table
    or a state, request the layout with `out_shardings`: see `formats`.

    Args:
      table: an array of any shape and dtype. Or a `jax.ShapeDtypeStruct`, to compile ahead of
        time: then the result is a `ShapeDtypeStruct` too, on the first device if `table` has no
        sharding. Inside `jit` an array is returned as it is, because `out_shardings` decides the
        layout of results.

    >>> import adamjax, jax.numpy as jnp
    >>> params = {"table": adamjax.layout.row_major(jnp.zeros((1000, 64)))}
    """
    order = tuple(range(jnp.ndim(table)))
    if isinstance(table, jax.core.Tracer):
        # With a layout constraint here, a result of `jit` could be an uncommitted array that is not
        # in the default layout. JAX 0.10 misreads such an array.
        return table
    if isinstance(table, jax.ShapeDtypeStruct):
        sharding = table.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        row_major_format = layout_format(order, sharding)
        return jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=row_major_format)
    return _in_order(jnp.asarray(table), order)


def laid_out_like(x: Any, like: Any) -> Any:
    """An array with the memory layout of another one of the same rank.

    If either is traced, the array is returned as it is.
    """
    order = _order(like)
    return x if order is None or _order(x) is None else _in_order(x, order)


def formats(tx: Any, params: Tree) -> tuple[Any, Any]:
    """The layouts of parameters and of an optimizer's state, for the `out_shardings` of `jax.jit`.

    Jitted functions return arrays in the default layout, unless `out_shardings` requests another.
    Without it, a step copies row-major tables, even donated ones. Arguments need no such option,
    because each array has its own layout. (If some parameters are committed to a device and others
    are not, the second step compiles again, because the first returns committed arrays;
    `jax.device_put(params, device)` beforehand avoids that.)

    Args:
      tx: an optimizer.
      params: the parameters; arrays, or `jax.ShapeDtypeStruct` with the layouts to compile for.

    Returns:
      Two trees, like `params` and like `tx.init(params)`, with a `jax.experimental.layout.Format`
      for each committed array, or its sharding if the layout is not known. A slot has the format of
      its parameter. All other leaves are `None`, which leaves the layout to JAX.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> tx = adamjax.adam(1e-3, rows="lazy")
    >>> params = {"table": adamjax.layout.row_major(jnp.zeros((1000, 64)))}
    >>> params_formats, state_formats = adamjax.layout.formats(tx, params)
    >>> def step(params, state, ids, values):
    ...     grads = {"table": adamjax.row_gradient(ids, values, 1000)}
    ...     updates, state = tx.update(grads, state, params)
    ...     return adamjax.apply_updates(params, updates), state
    >>> out_shardings = params_formats, state_formats
    >>> step = jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)
    >>> state = jax.jit(tx.init, out_shardings=state_formats)(params)  # or tx.init(params)
    >>> params, state = step(params, state, jnp.array([3]), jnp.ones((1, 64)))
    """
    leaves, treedef = flatten(params)
    leaf_formats = [_format(p) for p in leaves]

    def slot_formats(slots: Tree) -> Tree:
        triples = zip(flatten(slots)[0], leaves, leaf_formats, strict=True)
        return treedef.unflatten([_slot_format(x, p, f) for x, p, f in triples])

    state = jax.eval_shape(tx.init, params)
    state_formats = map_like_params(params, slot_formats, lambda _: None, state)
    return treedef.unflatten(leaf_formats), state_formats


class Packing(NamedTuple):
    """Puts several rows of a table side by side into one longer row, a line.

    TPUs pad each row of an array to a multiple of 128 elements. To an optimizer, a line is one row.
    Under `exact_rows`, and also with `rows="dense"`, the result is the same as without packing,
    because a row moves the same with a gradient of zero as with none. With `rows="lazy"` the rows
    of a line move together: if one has a gradient, its neighbours move on by their momentum. A step
    works on whole lines. At 16, 32 and 64 columns a line has 128 elements, as many as a single row
    after its padding. At 100 columns a line has 500, padded to 512.

    Attributes:
      width: the number of elements in a row.
      per_line: the number of rows in a line.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> p = adamjax.layout.packing(64)
    >>> params = {"table": p.pack(jnp.ones((1001, 64)))}
    >>> tx = adamjax.exact_rows(adamjax.adam(0.5), "table")
    >>> state, ids = tx.init(params), jnp.array([3, 2, 7])
    >>> lines, ticket = tx.prepare(params, state, {"table": p.line(ids)})
    >>> grads = jax.grad(lambda x: p.rows(x, ids).sum())(lines["table"])
    >>> grads = {"table": ticket.row_gradient("table", grads)}
    >>> updates, state = tx.update(grads, state, params, ticket=ticket)
    >>> p.unpack(adamjax.apply_updates(params, updates)["table"], 1001)[:4, 0].round(3)
    Array([1. , 1. , 0.5, 0.5], dtype=float32)
    """

    width: int
    per_line: int

    def pack(self, table: chex.Array) -> chex.Array:
        """A table [num_rows, width] as row-major lines; zeros fill up the last line."""
        if jnp.ndim(table) != 2 or jnp.shape(table)[1] != self.width:
            raise ValueError(
                f"packing: expected a table of shape [rows, {self.width}], got "
                f"{list(jnp.shape(table))}"
            )
        table = jnp.asarray(table)
        missing = -table.shape[0] % self.per_line
        padded = jnp.pad(table, ((0, missing), (0, 0)))
        return row_major(padded.reshape(-1, self.per_line * self.width))

    def unpack(self, lines: chex.Array, num_rows: int) -> chex.Array:
        """The table [num_rows, width] that was packed into these lines.

        Raises:
          ValueError: they are not the lines of a table of this size.
        """
        num_rows = as_size("packing: num_rows", num_rows)
        self._expect_lines(lines, (-(-num_rows // self.per_line),))
        return lines.reshape(-1, self.width)[:num_rows]

    def line(self, indices: chex.Array) -> chex.Array:
        """For each row, the number of its line.

        An index just past the end of the table may be on the last line, where it reads the zeros
        that fill up this line. Indices are integers of any dtype and width, as for `row_gradient`.
        """
        return self._split(indices)[0]

    def rows(self, lines: chex.Array, indices: chex.Array) -> chex.Array:
        """Rows [*indices.shape, width] from the lines that were read at `line(indices)`.

        Raises:
          ValueError: there is not one line for each index.
        """
        place = self._split(indices)[1][..., None]
        self._expect_lines(lines, place.shape[:-1])
        rows = lines[..., : self.width]
        for i in range(1, self.per_line):
            rows_at_i = lines[..., i * self.width : (i + 1) * self.width]
            rows = jnp.where(place == i, rows_at_i, rows)
        return rows

    def _expect_lines(self, lines: chex.Array, shape: tuple[int, ...]) -> None:
        expected = [*shape, self.per_line * self.width]
        if list(jnp.shape(lines)) != expected:
            raise ValueError(
                f"packing: expected lines of shape {expected}, got {list(jnp.shape(lines))}"
            )

    def _split(self, indices: chex.Array) -> tuple[chex.Array, chex.Array]:
        """The line of each row, and the row's place in it, from 0."""
        ids = as_integers("packing", indices)
        if ids.dtype.itemsize < 4:
            ids = ids.astype(np.int32)
        if isinstance(ids, jax.Array):
            return jnp.divmod(ids, jnp.asarray(self.per_line, ids.dtype))
        # NumPy indices may be too large for int32; their lines may fit.
        return as_int32(ids // self.per_line), as_int32(ids % self.per_line)


def packing(width: int) -> Packing:
    """The `Packing` with the fewest rows in a line for which padding adds at most a tenth.

    A line has 8 rows of 16 elements, 4 of 32, 2 of 64, 5 of 100, 1 of 128 or 256, 2 of 300.

    >>> import adamjax
    >>> adamjax.layout.packing(100)
    Packing(width=100, per_line=5)
    """
    width = as_size("packing: width", width)

    def padded(size: int) -> int:
        return -(-size // _LANES) * _LANES

    per_line = 1
    while 10 * padded(per_line * width) > 11 * per_line * width:
        per_line += 1
    return Packing(width, per_line)
