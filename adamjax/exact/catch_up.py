"""Rows of tables brought up to date, and written back."""

import functools
import operator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.blocks import in_blocks, rows_of_each
from adamjax.coasting import decayed
from adamjax.exact.state import Columns, Past, Ready
from adamjax.exact.tables import Batch, Table, beside
from adamjax.mesh import at_each, put, taken
from adamjax.moments import barrier, root
from adamjax.rounding import is_narrow, rounding_keys, write_slots

__all__ = ["caught_up", "flushed", "or_zeros", "put_rows", "read_in_blocks", "slot_keys"]

# Rows that are flushed at a time.
_BLOCK = 8192


# Jitted for those who call outside of jit; inline, it leaves no trace.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def caught_up(batch: Batch, past: Past, columns: list[Columns], indices: list[Any]) -> Ready:
    """Rows up to date.

    Args:
      columns: of each table.
      indices: of each table, int32[n], with `num_rows` where there is none; `None` for all.
    """
    first = batch.tables[0]
    safe, is_row = indices, None
    if indices[0] is not None:
        sizes = [x.size for x in indices]
        num_rows = beside(np.array([t.num_rows for t in batch.tables], np.int32), sizes)
        everyone = jnp.concatenate(indices)
        is_row = everyone < num_rows
        safe = rows_of_each(jnp.minimum(everyone, num_rows - 1).astype(np.uint32), sizes)

    def gathered(arrays: Any) -> chex.Array:
        pairs = zip(arrays, safe, strict=True)
        rows = [x if i is None else taken(x, i, mode="promise_in_bounds") for x, i in pairs]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows)

    last = gathered(c.last for c in columns)
    last = last if is_row is None else jnp.where(is_row, last, past.clock)
    here = {name: gathered(c.slots[name] for c in columns) for name in columns[0].slots}
    slots = {name: x.astype(first.real) for name, x in here.items()}
    # A gather that is fused into the arithmetic keeps it from being vectorised.
    before = barrier(gathered(c.weights for c in columns)).astype(first.real)
    coast = first.coast
    size = root(slots[coast.size]) if coast.squared else slots[coast.size]
    momentum, average = slots[coast.momentum], slots.get("average")
    moved, average = first.plan.catch_up(*past, last, before, momentum, size, average)
    gap = past.clock - last
    for name, b in coast.decays:
        slots[name] = decayed(slots[name], b, gap, batch.family.history)
    if average is not None:
        slots["average"] = average
    read = [at_each(x, last & (len(x) - 1)) for x in past.ring if x is not None]
    nans = [jnp.any(jnp.isnan(x)) for x in read]
    return Ready(
        now=(before + moved).astype(first.dtype),
        moved=moved,
        # Narrow slots stay wide until the step has been taken, so that they are rounded once.
        slots={
            name: x if is_narrow(here[name].dtype) else x.astype(here[name].dtype)
            for name, x in slots.items()
        },
        last=last,
        has_nan=functools.reduce(operator.or_, nans, jnp.array(False)),
    )


@functools.partial(jax.jit, static_argnums=0, inline=True)
def read_in_blocks(batch: Batch, past: Past, columns: Columns, indices: chex.Array) -> chex.Array:
    """The weights of a table's rows, up to date, block by block."""
    table = batch.tables[0]

    def step(_: Any, indices: chex.Array, rows: Any, reads: Any) -> Any:
        return (), caught_up(batch, past, [columns], [indices]).now

    empty = jnp.zeros((indices.size, *table.shape[1:]), table.dtype)
    return in_blocks(step, (), indices, table.num_rows, empty)[1]


@functools.partial(jax.jit, static_argnums=0, inline=True)
def flushed(batch: Batch, columns: Columns, past: Past, first: chex.Array) -> Columns:
    """A table, or a part of its rows from row `first` on, with all rows up to date."""
    num_rows = columns.weights.shape[0]
    size = min(_BLOCK, num_rows)

    def block(i: chex.Array, columns: Columns) -> Columns:
        ids = jnp.minimum(i * size + jnp.arange(size, dtype=jnp.int32), num_rows)
        rows = caught_up(batch, past, [columns], [ids])
        clock = jnp.broadcast_to(past.clock, ids.shape)
        # The next step has the same count, and needs other random bits.
        keys = slot_keys(batch, [columns], ~past.count)
        (moved,) = put_rows([columns], [ids], rows.slots, clock, keys, first)
        return moved._replace(weights=put(columns.weights, ids, rows.now))

    return jax.lax.fori_loop(0, -(-num_rows // size), block, columns)


def or_zeros(rows: chex.Array, indices: chex.Array, table: Table) -> chex.Array:
    """Rows, and zeros where there is none."""
    is_row = indices < table.num_rows
    return jnp.where(is_row.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)


def slot_keys(batch: Batch, columns: list[Columns], count: chex.Array) -> Any:
    """For each table of a batch the key by which its narrow slots are rounded, if there are any."""
    if any(is_narrow(slot.dtype) for slot in columns[0].slots.values()):
        return rounding_keys(count, [table.leaf for table in batch.tables])
    return None


def put_rows(
    columns: list[Columns],
    indices: list[Any],
    slots: dict[str, chex.Array],
    last: chex.Array,
    keys: Any = None,
    first: Any = 0,
) -> list[Columns]:
    """Tables with other slots and another `last` at some rows.

    Args:
      indices: the rows of each table; `None` for all rows.
      keys: of `slot_keys`.
      first: the position of the first row in the whole table, where these are a part of it.
    """

    def written(old: Columns, new: dict[str, chex.Array], n: int, rows: Any) -> list[chex.Array]:
        key = None if keys is None else keys[n]
        return write_slots([new[name] for name in old.slots], list(old.slots.values()), key, rows)

    if indices[0] is None:
        (old,) = columns
        new = dict(zip(old.slots, written(old, slots, 0, None), strict=True))
        return [old._replace(slots=new, last=last)]
    sizes = [i.size for i in indices]
    pieces = {name: rows_of_each(x, sizes) for name, x in slots.items()}
    lasts = rows_of_each(last, sizes)

    def one(old: Columns, i: chex.Array, n: int) -> Columns:
        own = written(old, {name: x[n] for name, x in pieces.items()}, n, i + first)
        pairs = zip(old.slots.items(), own, strict=True)
        new = {name: put(x, i, rows) for (name, x), rows in pairs}
        return old._replace(slots=new, last=put(old.last, i, lasts[n]))

    return [one(old, i, n) for n, (old, i) in enumerate(zip(columns, indices, strict=True))]
