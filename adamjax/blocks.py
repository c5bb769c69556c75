"""Runs a step on some rows of tables block by block, with the temporaries of one block at a time.

A batch may have far fewer distinct indices than indices. The distinct ones come first in an array
as long as the batch; the rest of the array is padding, which stands for no row. A loop whose length
is set at run time processes only the distinct indices, in place.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import as_varying, jaxpr_as_fun, varying_axes

__all__ = [
    "group_tables",
    "joined_positions",
    "needs_no_loop",
    "per_row",
    "rows_of_each",
    "run_in_blocks",
]

# The most rows in a block of the loop.
_BLOCK_ROWS = 2048
# Up to this many rows are processed at once, without a loop.
_MAX_UNLOOPED_ROWS = 8192
# The most elements in the rows of several tables that one step processes together.
_GROUP_ELEMENTS = 1 << 20


def needs_no_loop(n: int) -> bool:
    """Whether `run_in_blocks` processes n rows at once. More rows need a loop, except on a GPU."""
    return n <= _MAX_UNLOOPED_ROWS


def run_in_blocks(
    step: Callable[[Any, chex.Array, Any, Any], tuple[Any, Any]],
    tables: Any,
    indices: chex.Array,
    num_rows: int,
    rows: Any,
    reads: Any = (),
) -> tuple[Any, Any]:
    """Runs a step on some rows of tables, in place. The loop ends after the last block with a row.

    Args:
      step: `(tables, indices, rows, reads) -> (tables, rows)`, called with some of the indices.
        Its result for a row must not depend on other rows.
      tables: a tree of arrays, such as arrays with an entry for each row of a table. The step of
        each block updates them and passes them to the next block.
      indices: int32[n], distinct rows; `num_rows` stands for no row.
      rows: a tree of arrays [n, ...], which the step's results replace.
      reads: a tree of arrays [n, ...] that the step only reads.

    Returns:
      The tables and the rows after the step. The rows of blocks that did not run stay as they were.
    """
    n = indices.size
    if needs_no_loop(n):
        return step(tables, indices, rows, reads)
    num_blocks = -(-n // _BLOCK_ROWS)
    length = -(-n // num_blocks)

    def looped(tables: Any, indices: chex.Array, rows: Any, reads: Any) -> Any:
        last_position = jnp.max(jnp.where(indices < num_rows, jax.lax.iota(jnp.int32, n), -1))

        def block(carry: Any) -> Any:
            i, tables, rows = carry
            # The last block may begin with rows of the block before it, which are already done.
            start = jnp.minimum(i * length, n - length)
            position = start + jax.lax.iota(jnp.int32, length)
            is_new = position >= i * length

            def block_of(x: chex.Array) -> chex.Array:
                # A gather, because XLA would fuse a slice into each of its uses. Some uses come
                # after the write, so XLA would copy the whole array. It computes a gather once.
                return x.at[position].get(mode="promise_in_bounds", unique_indices=True)

            def written(x: chex.Array, old: chex.Array, new: chex.Array) -> chex.Array:
                if n % length:  # the last block overlaps the one before, whose rows must stay
                    new = jnp.where(is_new.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                return jax.lax.dynamic_update_slice_in_dim(x, new, start, 0)

            block_rows, block_reads = (jax.tree.map(block_of, x) for x in (rows, reads))
            block_indices = jnp.where(is_new, block_of(indices), num_rows)
            tables, new_rows = step(tables, block_indices, block_rows, block_reads)
            return i + 1, tables, jax.tree.map(written, rows, block_rows, new_rows)

        first = _carry_as_varying(block, (jnp.zeros((), jnp.int32), tables, rows), (indices, reads))
        _, *after = jax.lax.while_loop(
            lambda carry: carry[0] * length <= last_position, block, first
        )
        return tuple(after)

    args = tables, indices, rows, reads
    # The jitted step is one equation, which JAX does not trace again at each use.
    unlooped, unlooped_consts = _closure_converted(jax.jit(step), *args)
    loop, loop_consts = _closure_converted(looped, *args)

    @jax.custom_jvp
    def run(unlooped_consts: Any, loop_consts: Any, args: Any) -> Any:
        # A GPU takes all rows at once: in a loop, each iteration would wait for the host.
        on_gpu = functools.partial(unlooped, unlooped_consts)
        return jax.lax.platform_dependent(
            *args, cuda=on_gpu, rocm=on_gpu, default=functools.partial(loop, loop_consts)
        )

    # JAX has no reverse-mode derivative of such a loop, so differentiate `unlooped` in its place.
    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(lambda consts, _, args: unlooped(consts, *args), primals, tangents)

    return run(unlooped_consts, loop_consts, args)


def _closure_converted(function: Callable[..., Any], *args: Any) -> tuple[Any, list[Any]]:
    """Returns `(consts, *args) -> function(*args)` without a closure, and the consts.

    (`jax.closure_convert` hoists only floats that are differentiated.)
    """
    closed, result_shapes = jax.make_jaxpr(function, return_shape=True)(*args)

    def converted(consts: list[Any], *args: Any) -> Any:
        out = jaxpr_as_fun(closed.replace(consts=consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(result_shapes), out)

    return converted, closed.consts


def _carry_as_varying(block: Callable[[Any], Any], carry: Any, reads: Any) -> Any:
    """In `shard_map`, marks a carry as varying over the mesh axes of the carry after a block."""
    if not any(varying_axes(jax.typeof(x)) for x in jax.tree.leaves((carry, reads))):
        return carry

    def cast(x: chex.Array, after: Any) -> chex.Array:
        missing = set(varying_axes(after)) - set(varying_axes(jax.typeof(x)))
        return as_varying(x, tuple(missing)) if missing else x

    return jax.tree.map(cast, carry, jax.eval_shape(block, carry))


def group_tables(positions: Sequence[int], rows: Sequence[Any]) -> list[list[int]]:
    """Groups tables whose rows one step can process together.

    Args:
      positions: the positions in `rows` of the tables to group.
      rows: for each table the array of its rows.

    Returns:
      Lists of positions. A table whose rows need a loop is alone in its list.
    """
    groups: list[list[int]] = []
    room = -1  # the elements for which the last group has room; negative if it takes no table
    for i in positions:
        is_small = needs_no_loop(len(rows[i]))
        if rows[i].size > room or not is_small:
            groups.append([])
            room = _GROUP_ELEMENTS if is_small else -1
        groups[-1].append(i)
        room -= rows[i].size
    return groups


def rows_of_each(rows: chex.Array, sizes: Sequence[int]) -> list[chex.Array]:
    """Splits rows of several tables, which are concatenated, by table."""
    return [rows] if len(sizes) == 1 else jnp.split(rows, np.cumsum(sizes[:-1]))


def per_row(values: Any, counts: Sequence[int]) -> Any:
    """Repeats the value of table i `counts[i]` times; for a single table, the value as it is."""
    if len(counts) == 1:
        return values[0]
    return values[np.repeat(np.arange(len(counts)), counts)]


def joined_positions(
    positions: Sequence[chex.Array], sizes: Sequence[int], starts: Any, outside: int
) -> chex.Array:
    """Turns positions among the rows of each table into positions in one array of all rows.

    Args:
      positions: for each table int32[n], positions among its rows; `sizes[i]` stands for no row.
      sizes: the number of rows of each table.
      starts: the position in that array of the first row of each table.
      outside: the position in the result that stands for no row.
    """
    joined, counts = jnp.concatenate(positions), [x.size for x in positions]
    is_row = joined < per_row(np.array(sizes, np.int32), counts)
    return jnp.where(is_row, joined + per_row(np.array(starts, np.int32), counts), outside)
