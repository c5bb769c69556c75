"""Rows of tables brought up to date, those of tables that go the same way together."""

import functools
import operator
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.blocks import in_blocks, rows_of_each, together
from adamjax.coasting import Coasting, decayed
from adamjax.data import Tree
from adamjax.exact.state import Columns, ExactRowsState, Past, Ready
from adamjax.mesh import at_each, explicit, put, taken
from adamjax.moments import accumulator, apart, root
from adamjax.paths import flatten

__all__ = [
    "Batch",
    "Family",
    "Table",
    "batches_of",
    "caught_up",
    "due_rows",
    "families_of",
    "flushed",
    "next_cursor",
    "or_zeros",
    "put_rows",
    "read_in_blocks",
]


class Table(NamedTuple):
    """A table: where it is, and what happens to its rows."""

    leaf: int
    path: str
    shape: tuple[int, ...]
    dtype: Any
    plan: Coasting
    decays: tuple[tuple[str, float], ...]  # of the rule's slots where there is no gradient
    kind: Any  # equal for tables that every step treats alike

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def real(self) -> Any:
        return accumulator(self.dtype)


class Family(NamedTuple):
    """Tables that go the same way, so that one ring says what becomes of their rows."""

    name: str
    history: int
    tables: tuple[Table, ...]


class Batch(NamedTuple):
    """Tables of a family whose rows are worked on together: of one width and dtype."""

    family: Family
    tables: tuple[Table, ...]

    @property
    def path(self) -> str:
        return self.tables[0].path


# Rows that are flushed at a time.
_BLOCK = 8192
# The part of a table that each step refreshes, and the longest history, where none is given.
_REFRESHED = 64
_LONGEST = 65536
# The history where rows are brought up to date step by step. Then a step costs about as many row
# steps as the table has rows, however long the history, and those of the rows that are read.
_REPLAYED = 64


def families_of(tables: Sequence[Table], given: int | None) -> list[Family]:
    """The tables by what becomes of their rows, each family with its history, if none is given."""
    found: dict[Any, list[Table]] = {}
    for table in tables:
        found.setdefault((table.kind, table.plan), []).append(table)
    families = []
    for alike in found.values():
        plan, history = alike[0].plan, given
        if history is None and plan.replays:
            history = _REPLAYED
        elif history is None:
            wanted = max(t.num_rows for t in alike) // _REFRESHED
            history = 1 << max(min(wanted, _LONGEST) - 1, 0).bit_length()
            history = max(history, plan.least_history)
        name = f"{_tables_as_text(alike)}: {plan.name},history={history}"
        families.append(Family(name, history, tuple(alike)))
    return families


def _tables_as_text(tables: Sequence[Table]) -> str:
    """Which tables these are, in a name that a file may have.

    Where tables are put together otherwise, as with other patterns of rates, a ring under the same
    name would be that of others.
    """
    first, *others = [table.path for table in tables]
    checksum = zlib.crc32("\n".join(others).encode())
    return f"{first} and {len(others)} more ({checksum:08x})" if others else first


def batches_of(families: Sequence[Family], params: Tree, sizes: Mapping[int, int]) -> list[Batch]:
    """Tables, of which so many rows are worked on, by what can be worked on together."""
    batches, leaves = [], flatten(params)[0]
    for family in families:
        alike: dict[Any, list[Table]] = {}
        for table in family.tables:
            if table.leaf in sizes:
                # Rows of tables that are split in different ways are of different types.
                split = explicit(leaves[table.leaf])
                spec = None if split is None else (split.mesh, split.spec[1:])
                alike.setdefault((table.dtype, table.shape[1:], spec), []).append(table)
        for same in alike.values():
            own = [jax.ShapeDtypeStruct((sizes[t.leaf], *t.shape[1:]), t.dtype) for t in same]
            groups = together(range(len(same)), own)
            batches += [Batch(family, tuple(same[i] for i in several)) for several in groups]
    return batches


def due_rows(batch: Batch, state: ExactRowsState, found: list[chex.Array]) -> list[chex.Array]:
    """The rows of each table whose turn it is to be refreshed, as far as they were not found.

    Computed for all tables of a batch in one go.
    """
    num_rows = [t.num_rows for t in batch.tables]
    sizes = [refreshed(t, batch.family.history) for t in batch.tables]
    if not sum(sizes):
        return [x[:0] for x in found]
    cursors = [state.tables[t.path].cursor for t in batch.tables]

    places, starts = [x.size for x in found], np.cumsum([0, *sizes[:-1]])
    rows = np.array(num_rows, np.int32)
    behind = jnp.concatenate(found) - beside(cursors, places)
    behind = jnp.where(behind < 0, behind + beside(rows, places), behind)
    is_due = (jnp.concatenate(found) < beside(rows, places)) & (
        behind < beside(np.array(sizes, np.int32), places)
    )
    place = jnp.where(is_due, behind + beside(starts.astype(np.int32), places), sum(sizes))
    there = jnp.zeros(sum(sizes), bool).at[place.astype(np.uint32)].set(True, mode="drop")
    due = beside(cursors, sizes) + np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
    due = due - jnp.where(due < beside(rows, sizes), 0, beside(rows, sizes))
    return rows_of_each(jnp.where(there, beside(rows, sizes), due), sizes)


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
    before = apart(gathered(c.weights for c in columns)).astype(first.real)
    measure = slots["u"] if "u" in slots else root(slots.get("v_max", slots.get("v")))
    moved, average = first.plan.catch_up(
        *past, last, before, slots["m"], measure, slots.get("average")
    )
    gap = past.clock - last
    for name, b in first.decays:
        slots[name] = decayed(slots[name], b, gap, batch.family.history)
    if average is not None:
        slots["average"] = average
    read = [at_each(x, last & (len(x) - 1)) for x in past.ring if x is not None]
    found = [jnp.any(jnp.isnan(x)) for x in read]
    return Ready(
        now=(before + moved).astype(first.dtype),
        moved=moved,
        slots={name: x.astype(here[name].dtype) for name, x in slots.items()},
        last=last,
        seen=functools.reduce(operator.or_, found, jnp.array(False)),
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
def flushed(batch: Batch, columns: Columns, past: Past) -> Columns:
    """A table, or a part of its rows, with all rows up to date."""
    num_rows = columns.weights.shape[0]
    size = min(_BLOCK, num_rows)

    def block(i: chex.Array, columns: Columns) -> Columns:
        ids = jnp.minimum(i * size + jnp.arange(size, dtype=jnp.int32), num_rows)
        rows = caught_up(batch, past, [columns], [ids])
        clock = jnp.broadcast_to(past.clock, ids.shape)
        (moved,) = put_rows([columns], [ids], rows.slots, clock)
        return moved._replace(weights=put(columns.weights, ids, rows.now))

    return jax.lax.fori_loop(0, -(-num_rows // size), block, columns)


def or_zeros(rows: chex.Array, indices: chex.Array, table: Table) -> chex.Array:
    """Rows, and zeros where there is none."""
    is_row = indices < table.num_rows
    return jnp.where(is_row.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)


def refreshed(table: Table, history: int) -> int:
    """How many rows each step refreshes, so that none is older than the ring."""
    return -(-table.num_rows // max(history - 2, 1))


def next_cursor(table: Table, cursor: chex.Array, history: int) -> chex.Array:
    after = cursor + refreshed(table, history)
    return jnp.where(after < table.num_rows, after, after - table.num_rows)


def beside(values: Any, counts: Sequence[int]) -> Any:
    """For each of several rows of each table what belongs to the table."""
    if len(counts) == 1:
        return values[0]
    values = values if isinstance(values, np.ndarray) else jnp.stack(values)
    return values[np.repeat(np.arange(len(counts)), counts)]


def put_rows(
    columns: list[Columns], indices: list[Any], slots: dict[str, chex.Array], last: chex.Array
) -> list[Columns]:
    """Tables with other slots and another `last` at some rows; `None` for all rows."""
    if indices[0] is None:
        (old,) = columns
        slots = {name: slots[name].astype(x.dtype) for name, x in old.slots.items()}
        return [old._replace(slots=slots, last=last)]
    sizes = [i.size for i in indices]
    pieces = {name: rows_of_each(x, sizes) for name, x in slots.items()}
    lasts = rows_of_each(last, sizes)

    def one(old: Columns, i: chex.Array, n: int) -> Columns:
        new = {name: put(x, i, pieces[name][n].astype(x.dtype)) for name, x in old.slots.items()}
        return old._replace(slots=new, last=put(old.last, i, lasts[n]))

    return [one(old, i, n) for n, (old, i) in enumerate(zip(columns, indices, strict=True))]
