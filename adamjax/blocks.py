"""A step on some rows of tables, in blocks: time follows the rows, memory the block.

A batch has room for as many rows as indices, and may have far fewer that are distinct. These stand
in front, so a loop whose count is known at run time works on them alone, in place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import type_of, varying_axes

__all__ = ["in_blocks", "is_one_block", "rows_of_each", "together"]

# Rows that a turn of the loop works on, and the most that are worked on without a loop.
_BLOCK = 2048
_AT_ONCE = 8192
# The elements of the rows of several tables that are worked on together.
_TOGETHER = 1 << 20


def is_one_block(n: int) -> bool:
    """Whether `in_blocks` works on so many rows without a loop, on every platform."""
    return n <= _AT_ONCE


def in_blocks(
    step: Callable[[Any, chex.Array, Any, Any], tuple[Any, Any]],
    tables: Any,
    indices: chex.Array,
    num_rows: int,
    rows: Any,
    reads: Any = (),
) -> tuple[Any, Any]:
    """A step on some rows of tables, in place, in as many blocks as hold a row.

    Args:
      step: `(tables, indices, rows, reads) -> (tables, rows)` for some of the indices, whose rows
        do not depend on any others.
      tables: a tree of arrays as long as a table, and of what else goes from block to block.
      indices: int32[n], distinct, `num_rows` where there is no row.
      rows: a tree of arrays [n, ...]; the step's results take the place of its input.
      reads: a tree of arrays [n, ...] that the step only reads.

    Returns:
      The tables and the rows after the step. In a block without any row the input stays.
    """
    n = indices.size
    if is_one_block(n):
        return step(tables, indices, rows, reads)
    size = -(-n // -(-n // _BLOCK))

    def at_once(tables: Any, indices: chex.Array, rows: Any, reads: Any) -> Any:
        return step(tables, indices, rows, reads)

    def looped(tables: Any, indices: chex.Array, rows: Any, reads: Any) -> Any:
        last = jnp.max(jnp.where(indices < num_rows, jax.lax.iota(jnp.int32, n), -1))

        def block(carry: Any) -> Any:
            i, tables, rows = carry
            # The last block may begin with rows of the one before it, which had their turn.
            start = jnp.minimum(i * size, n - size)
            place = start + jax.lax.iota(jnp.int32, size)
            is_new = place >= i * size

            def block_of(x: chex.Array) -> chex.Array:
                # XLA would fuse a slice into each of its uses, some of which come after the write,
                # and copy the whole array for them. A gather it computes once.
                return x.at[place].get(mode="promise_in_bounds", unique_indices=True)

            def written(x: chex.Array, old: chex.Array, new: chex.Array) -> chex.Array:
                if n % size:
                    new = jnp.where(is_new.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                return jax.lax.dynamic_update_slice_in_dim(x, new, start, 0)

            before, beside = (jax.tree.map(block_of, x) for x in (rows, reads))
            here = jnp.where(is_new, block_of(indices), num_rows)
            tables, after = step(tables, here, before, beside)
            return i + 1, tables, jax.tree.map(written, rows, before, after)

        first = _as_varying(block, (jnp.zeros((), jnp.int32), tables, rows), (indices, reads))
        return jax.lax.while_loop(lambda carry: carry[0] * size <= last, block, first)[1:]

    # A GPU would wait for its host at every turn.
    return jax.lax.platform_dependent(
        tables, indices, rows, reads, cuda=at_once, rocm=at_once, default=looped
    )


def _as_varying(block: Callable[[Any], Any], carry: Any, reads: Any) -> Any:
    """A carry that within `shard_map` differs over the axes over which it does after a block."""
    if not any(varying_axes(type_of(x)) for x in jax.tree.leaves((carry, reads))):
        return carry

    def cast(x: chex.Array, after: Any) -> chex.Array:
        more = set(varying_axes(after)) - set(varying_axes(type_of(x)))
        return jax.lax.pcast(x, tuple(more), to="varying") if more else x

    return jax.tree.map(cast, carry, jax.eval_shape(block, carry))


def together(tables: Sequence[int], rows: Sequence[Any]) -> list[list[int]]:
    """Tables, of each of which there are some rows, by what is best worked on in one go."""
    groups: list[list[int]] = []
    room = -1
    for i in tables:
        is_small = is_one_block(len(rows[i]))
        if rows[i].size > room or not is_small:
            groups.append([])
            room = _TOGETHER if is_small else -1
        groups[-1].append(i)
        room -= rows[i].size
    return groups


def rows_of_each(rows: chex.Array, sizes: Sequence[int]) -> list[chex.Array]:
    """The rows of each table, which lie one after another."""
    return [rows] if len(sizes) == 1 else jnp.split(rows, np.cumsum(sizes[:-1]))
