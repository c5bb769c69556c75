"""How tables lie in memory: row-major ones, which TPUs read and write row by row.

Left to itself, the TPU's compiler lays many tables out column by column, so that nothing is
padded; then it copies the whole table before rows are gathered and after they are scattered.
A layout belongs to an array in memory: `jax.jit` takes that of an argument from the array, and
that of a result from `out_shardings`, else it goes back to the default.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import dimension_order, layout_format
from adamjax.data import Tree
from adamjax.paths import flatten
from adamjax.rows import as_int32, integers, whole
from adamjax.structure import map_like_params

__all__ = ["Packing", "formats", "packing", "row_major"]


def _format(x: Any) -> Any:
    """How and where an array lies, or is to lie: a `Format`; `None` where that is open."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return None
    # An array that is not bound to its devices goes wherever the others of a computation are.
    bound = isinstance(x, jax.ShapeDtypeStruct) or x.committed
    order, sharding = _order(x), x.sharding
    if not bound or sharding is None or order is None:
        return sharding if bound else None
    # Not the array's own layout, whose tiles depend on the dtype.
    return layout_format(order, sharding)


def _order(x: Any) -> tuple[int, ...] | None:
    """The dimensions of an array from the slowest to the fastest, where that is known."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return None
    return dimension_order(x)


def _in_order(x: Any, order: tuple[int, ...]) -> Any:
    return x if _order(x) == order else jax.device_put(x, layout_format(order, x.sharding))


def _is_like(slot: Any, p: Any) -> bool:
    return isinstance(slot, jax.ShapeDtypeStruct) and slot.shape == jnp.shape(p)


def row_major(table: Any) -> Any:
    """A table whose rows lie one after the other in memory, as a TPU has to read them.

    Anywhere but on a TPU arrays lie like that, and the table is returned as it is. On a TPU the
    default depends on the shape, and steps copy a table that is not row-major. Rows are padded to
    128 elements there, so 16 columns take 8 times their bytes: see `packing`.

    The state that `init` makes of arrays lies as they do. Jitted functions that return a table or
    a state must be told to keep them so: see `formats`.

    Args:
      table: an array of any shape and dtype. A `jax.ShapeDtypeStruct`, to compile for (the first
        device if it names none), stays one. Inside `jit` a value is returned as it is: how what
        `jit` returns lies, its `out_shardings` say.

    >>> import adamjax, jax.numpy as jnp
    >>> params = {"table": adamjax.layout.row_major(jnp.zeros((1000, 64)))}
    """
    order = tuple(range(jnp.ndim(table)))
    if isinstance(table, jax.core.Tracer):
        # A constraint on its layout must not reach a result: JAX 0.10 would read an array wrongly
        # that is not bound to devices and does not lie in the default layout.
        return table
    if isinstance(table, jax.ShapeDtypeStruct):
        sharding = table.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        lies = layout_format(order, sharding)
        return jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=lies)
    return _in_order(jnp.asarray(table), order)


def laid_out_like(x: Any, like: Any) -> Any:
    """An array with its dimensions in memory in the order of another one of its rank.

    As it is where either is traced.
    """
    order = _order(like)
    return x if order is None or _order(x) is None else _in_order(x, order)


def formats(tx: Any, params: Tree) -> tuple[Any, Any]:
    """What keeps parameters and an optimizer's state where and as they lie, for `jax.jit`.

    Jitted functions return arrays in the default layout, unless `out_shardings` says otherwise.
    A step that takes row-major tables and does not say so copies them, also where they are
    donated. Arguments need nothing: their layout is that of the arrays. (If some parameters are
    bound to a device and some are not, the second step compiles again, as the first binds all;
    `jax.device_put(params, device)` beforehand spares that.)

    Args:
      tx: an optimizer.
      params: the parameters; arrays, or `jax.ShapeDtypeStruct` that say how they are to lie.

    Returns:
      Two trees, like `params` and like `tx.init(params)`: a `jax.experimental.layout.Format` for
      each array that is bound to devices, that of its parameter for each slot; `None`, which
      leaves it open, for all else.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> tx = adamjax.adam(1e-3, rows="lazy")
    >>> params = {"table": adamjax.layout.row_major(jnp.zeros((1000, 64)))}
    >>> params_lie, state_lies = adamjax.layout.formats(tx, params)
    >>> def step(params, state, ids, values):
    ...     grads = {"table": adamjax.row_gradient(ids, values, 1000)}
    ...     updates, state = tx.update(grads, state, params)
    ...     return adamjax.apply_updates(params, updates), state
    >>> step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(params_lie, state_lies))
    >>> state = jax.jit(tx.init, out_shardings=state_lies)(params)  # or tx.init(params)
    >>> params, state = step(params, state, jnp.array([3]), jnp.ones((1, 64)))
    """
    leaves, treedef = flatten(params)
    found = [_format(p) for p in leaves]

    def lies(slots: Tree) -> Tree:
        beside = zip(flatten(slots)[0], leaves, found, strict=True)
        return treedef.unflatten([f if _is_like(x, p) else None for x, p, f in beside])

    state = jax.eval_shape(tx.init, params)
    return treedef.unflatten(found), map_like_params(params, lies, lambda _: None, state)


class Packing(NamedTuple):
    """Rows of a table side by side in lines, for TPUs, which pad a line to 128 elements.

    A table of lines is a table in its own right, and `exact_rows` and `rows="dense"` do the same
    to it as to the table of rows, since a row that is touched with a gradient of zero moves as it
    would have anyway. With `rows="lazy"` the rows of a line are touched together: the momentum of
    one goes on when its neighbour has a gradient. A step works on whole lines, of
    128 elements up to 64 columns, as it would on padded rows; of 512 at 100 columns.

    Attributes:
      width: elements of a row.
      per_line: rows of a line.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> p = adamjax.layout.packing(64)
    >>> params = {"table": p.pack(jnp.ones((1001, 64)))}
    >>> tx = adamjax.exact_rows(adamjax.adam(0.5), "table")
    >>> state, ids = tx.init(params), jnp.array([3, 2, 7])
    >>> lines, ticket = tx.prepare(params, state, {"table": p.line(ids)})
    >>> grads = jax.grad(lambda x: p.rows(x, ids).sum())(lines["table"])
    >>> grads = {"table": adamjax.row_gradient(p.line(ids), grads, 501)}
    >>> updates, state = tx.update(grads, state, params, ticket=ticket)
    >>> p.unpack(adamjax.apply_updates(params, updates)["table"], 1001)[:4, 0].round(3)
    Array([1. , 1. , 0.5, 0.5], dtype=float32)
    """

    width: int
    per_line: int

    def pack(self, table: chex.Array) -> chex.Array:
        """A table [num_rows, width] as row-major lines, the last filled up with zeros."""
        if jnp.ndim(table) != 2 or jnp.shape(table)[1] != self.width:
            raise ValueError(
                f"packing: expected a table of shape [rows, {self.width}], got "
                f"{list(jnp.shape(table))}"
            )
        table = jnp.asarray(table)
        missing = -table.shape[0] % self.per_line
        full = jnp.pad(table, ((0, missing), (0, 0)))
        return row_major(full.reshape(-1, self.per_line * self.width))

    def unpack(self, lines: chex.Array, num_rows: int) -> chex.Array:
        """The table [num_rows, width] of its lines.

        Raises:
          ValueError: they are not the lines of a table of this size.
        """
        num_rows = whole("packing: num_rows", num_rows)
        self._expect_lines(lines, (-(-num_rows // self.per_line),))
        return lines.reshape(-1, self.width)[:num_rows]

    def line(self, indices: chex.Array) -> chex.Array:
        """The lines of rows; a negative index, and one beyond them, is outside the lines as well.

        Indices are integers of any dtype and width, as for `row_gradient`.
        """
        return self._split(indices)[0]

    def rows(self, lines: chex.Array, indices: chex.Array) -> chex.Array:
        """Rows [*indices.shape, width] of the lines that were read at `line(indices)`.

        Raises:
          ValueError: there is not one line for each index.
        """
        place = self._split(indices)[1][..., None]
        self._expect_lines(lines, place.shape[:-1])
        parts = [lines[..., i * self.width : (i + 1) * self.width] for i in range(self.per_line)]
        found = parts[0]
        for i, part in enumerate(parts[1:], 1):
            found = jnp.where(place == i, part, found)
        return found

    def _expect_lines(self, lines: chex.Array, shape: tuple[int, ...]) -> None:
        wanted = [*shape, self.per_line * self.width]
        if list(jnp.shape(lines)) != wanted:
            raise ValueError(
                f"packing: expected lines of shape {wanted}, got {list(jnp.shape(lines))}"
            )

    def _split(self, indices: chex.Array) -> tuple[chex.Array, chex.Array]:
        ids = integers("packing", indices)
        if ids.dtype.itemsize < 4:
            ids = ids.astype(np.int32)
        if isinstance(ids, jax.Array):
            return jnp.divmod(ids, jnp.asarray(self.per_line, ids.dtype))
        return as_int32(ids // self.per_line), as_int32(ids % self.per_line)


def packing(width: int) -> Packing:
    """The least packing of rows that a TPU pads to at most 1.1 times their bytes.

    That is 8 rows of 16 elements a line, 4 of 32, 2 of 64, 5 of 100, 1 of 128 or 256, 2 of 300.

    >>> import adamjax
    >>> adamjax.layout.packing(100)
    Packing(width=100, per_line=5)
    """
    width = whole("packing: width", width)
    per_line = 1
    while 10 * (-(-per_line * width // _LANES) * _LANES) > 11 * per_line * width:
        per_line += 1
    return Packing(width, per_line)


# Elements to which a TPU pads the last dimension.
_LANES = 128
