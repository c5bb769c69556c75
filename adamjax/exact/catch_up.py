"""Brings rows of tables up to date, and writes them back."""

import functools
import operator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.blocks import per_row, rows_of_each, run_in_blocks
from adamjax.coasting import Ring, decayed
from adamjax.encoding import map_stored
from adamjax.exact.state import Past, Ready, TableArrays
from adamjax.exact.tables import Batch, Table
from adamjax.mesh import gather_entries, gather_rows, scatter_rows
from adamjax.moments import add_update, barrier, root
from adamjax.rounding import is_narrow, read_slot, rounding_keys, write_slots

__all__ = [
    "catch_up_rows",
    "flush_rows",
    "put_slots",
    "read_in_blocks",
    "slot_keys",
    "weights_of",
    "zeros_outside_table",
]

# How many rows are flushed at a time.
_FLUSHED_AT_ONCE = 8192


# Called outside of jit, this is one compiled program. Inside another jit, inline=True makes it part
# of that program.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def catch_up_rows(batch: Batch, past: Past, arrays: list[TableArrays], indices: list[Any]) -> Ready:
    """Rows of a batch's tables, up to date.

    Args:
      arrays: the arrays of each table.
      indices: for each table int32[n], where `num_rows` stands for no row; `None` for all rows.
    """
    first = batch.tables[0]
    if indices[0] is None:
        clamped, is_row = indices, None
    else:
        sizes = [x.size for x in indices]
        num_rows = per_row(np.array([t.num_rows for t in batch.tables], np.int32), sizes)
        all_indices = jnp.concatenate(indices)
        is_row = all_indices < num_rows
        clamped = rows_of_each(jnp.minimum(all_indices, num_rows - 1).astype(np.uint32), sizes)

    def gathered(arrays: Any) -> chex.Array:
        def gather(x: Any, i: Any) -> chex.Array:
            if i is not None:
                x = map_stored(lambda y: gather_rows(y, i, mode="promise_in_bounds"), x)
            # This decodes slots of 8 bits. Other arrays stay as they are.
            return read_slot(x, x.dtype)

        rows = [gather(x, i) for x, i in zip(arrays, clamped, strict=True)]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows)

    last = gathered(x.last for x in arrays)
    if is_row is not None:
        # An index that stands for no row counts as up to date.
        last = jnp.where(is_row, last, past.clock)
    stored = {name: gathered(x.slots[name] for x in arrays) for name in arrays[0].slots}
    slots = {name: x.astype(first.real_dtype) for name, x in stored.items()}
    # If XLA fused the gather into the arithmetic, it would not vectorise the arithmetic.
    before = barrier(gathered(x.weights for x in arrays)).astype(first.real_dtype)
    coast = first.coast
    momentum = slots[coast.momentum]
    if coast.size is None:
        size = jnp.zeros_like(momentum)
    else:
        size = root(slots[coast.size]) if coast.squared else slots[coast.size]
    # A rule's own slot may have this name too, so read it only if there is a `weight_ema`.
    average = slots["average"] if _has_average(first) else None
    moved, average = first.coasting.catch_up(*past, last, before, momentum, size, average)
    gap = past.clock - last
    for name, b in coast.decays:
        slots[name] = decayed(slots[name], b, gap, batch.family.history)
    if average is not None:
        slots["average"] = average
    return Ready(
        weights=(before + moved).astype(first.dtype),
        moved=moved,
        # Narrow slots stay wide until the step has been taken, so that they are rounded once.
        slots={
            name: x if is_narrow(arrays[0].slots[name]) else x.astype(stored[name].dtype)
            for name, x in slots.items()
        },
        last=last,
        has_nan=_has_nan(past.ring, last),
    )


def _has_average(table: Table) -> bool:
    """Whether a `weight_ema` comes after the table's rule."""
    # This is the momentum of the average, not of the rule.
    return table.coasting.momentum is not None


def _has_nan(ring: Ring, last: chex.Array) -> chex.Array:
    """Whether the entries of a ring for the steps `last` have a NaN."""
    # The length of a ring is a power of two, so this is `last % len(x)`.
    entries = [gather_entries(x, last & (len(x) - 1)) for x in ring if x is not None]
    nans = [jnp.any(jnp.isnan(x)) for x in entries]
    return functools.reduce(operator.or_, nans, jnp.array(False))


def weights_of(batch: Batch, ready: Ready, averaged: bool) -> chex.Array:
    """The weights of rows, or with `averaged` their averages, if there is a `weight_ema`."""
    first = batch.tables[0]
    if averaged and _has_average(first):
        return ready.slots["average"].astype(first.dtype)
    return ready.weights


@functools.partial(jax.jit, static_argnums=(0, 4), inline=True)
def read_in_blocks(
    batch: Batch, past: Past, table_arrays: TableArrays, indices: chex.Array, averaged: bool = False
) -> chex.Array:
    """The up-to-date weights of some rows of a table, computed block by block."""
    table = batch.tables[0]

    def step(_: Any, indices: chex.Array, rows: Any, reads: Any) -> Any:
        return (), weights_of(
            batch, catch_up_rows(batch, past, [table_arrays], [indices]), averaged
        )

    empty = jnp.zeros((indices.size, *table.shape[1:]), table.dtype)
    return run_in_blocks(step, (), indices, table.num_rows, empty)[1]


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def flush_rows(
    batch: Batch, stochastic: bool, table_arrays: TableArrays, past: Past, first_row: chex.Array
) -> TableArrays:
    """Brings all rows of a table, or of a part of it, up to date.

    Args:
      stochastic: whether to round bfloat16 weights stochastically.
      first_row: if the arrays are a part of a table, the number of their first row.
    """
    weights_key = None
    if stochastic and is_narrow(table_arrays.weights):
        # This key differs from the key of the slots, and from the keys that `apply_updates` uses in
        # the steps before and after.
        leaf = batch.tables[0].leaf_index
        (weights_key,) = rounding_keys(~past.count ^ np.int32(0x2545F491), [leaf])
    num_rows = table_arrays.weights.shape[0]
    size = min(_FLUSHED_AT_ONCE, num_rows)

    def flush_some(i: chex.Array, table_arrays: TableArrays) -> TableArrays:
        ids = jnp.minimum(i * size + jnp.arange(size, dtype=jnp.int32), num_rows)
        ready = catch_up_rows(batch, past, [table_arrays], [ids])
        clock = jnp.broadcast_to(past.clock, ids.shape)
        # The next step has the same count and needs other random bits, so invert the count here.
        keys = slot_keys(batch, [table_arrays], ~past.count)
        (written,) = put_slots([table_arrays], [ids], ready.slots, clock, keys, first_row)
        weights = ready.weights
        if weights_key is not None:
            before = gather_rows(table_arrays.weights, ids, mode="fill", fill_value=0)
            weights = add_update(before, ready.moved, weights_key, ids + first_row)
        return written._replace(weights=scatter_rows(table_arrays.weights, ids, weights))

    return jax.lax.fori_loop(0, -(-num_rows // size), flush_some, table_arrays)


def zeros_outside_table(rows: chex.Array, indices: chex.Array, table: Table) -> chex.Array:
    """The rows, with zeros where an index is outside the table."""
    is_row = indices < table.num_rows
    return jnp.where(is_row.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)


def slot_keys(batch: Batch, arrays: list[TableArrays], count: chex.Array) -> Any:
    """For each table of a batch a key to round its narrow slots; `None` if no slot is narrow."""
    if any(map(is_narrow, arrays[0].slots.values())):
        return rounding_keys(count, [table.leaf_index for table in batch.tables])
    return None


def put_slots(
    arrays: list[TableArrays],
    indices: list[Any],
    slots: dict[str, Any],
    last: chex.Array,
    keys: Any = None,
    first_row: Any = 0,
) -> list[TableArrays]:
    """The arrays of each table, with new slots and a new `last` at some rows.

    Args:
      indices: the rows of each table; `None` for all rows.
      slots, last: their values at the rows of all tables, concatenated as in `Ready`.
      keys: the result of `slot_keys`.
      first_row: if the arrays are a part of a table, the number of their first row.
    """

    def rounded_slots(
        old: TableArrays, new: dict[str, chex.Array], position: int, rows: Any
    ) -> list[Any]:
        key = None if keys is None else keys[position]
        return write_slots([new[name] for name in old.slots], list(old.slots.values()), key, rows)

    if indices[0] is None:
        (old,) = arrays
        new = dict(zip(old.slots, rounded_slots(old, slots, 0, None), strict=True))
        return [old._replace(slots=new, last=last)]
    sizes = [ids.size for ids in indices]
    slots_of_each = {name: rows_of_each(x, sizes) for name, x in slots.items()}
    last_of_each = rows_of_each(last, sizes)

    def written(position: int) -> TableArrays:
        old, ids = arrays[position], indices[position]
        new_rows = {name: x[position] for name, x in slots_of_each.items()}
        rounded = rounded_slots(old, new_rows, position, ids + first_row)
        pairs = zip(old.slots.items(), rounded, strict=True)
        new = {
            name: map_stored(lambda array, values: scatter_rows(array, ids, values), x, rows)
            for (name, x), rows in pairs
        }
        return old._replace(slots=new, last=scatter_rows(old.last, ids, last_of_each[position]))

    return [written(position) for position in range(len(arrays))]
