"""A step of tables: rows are brought up to date, take their step, and are written back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from adamjax.blocks import in_blocks, is_one_block, rows_of_each
from adamjax.data import Tree
from adamjax.exact.bound import Bound
from adamjax.exact.catch_up import caught_up, put_rows, read_in_blocks, slot_keys
from adamjax.exact.route import with_stops
from adamjax.exact.state import Columns, ExactRowsState, TableState
from adamjax.exact.tables import Batch, Table, batches_of, due_rows, next_cursor
from adamjax.exact.ticket import Ticket
from adamjax.leaves import dtype_of
from adamjax.mesh import taken
from adamjax.paths import flatten
from adamjax.rows import RowGradient, RowMoves
from adamjax.search import distinct_of_each
from adamjax.structure import map_slots
from adamjax.transform import Step

__all__ = ["read_rows", "take_step"]


def take_step(
    bound: Bound, grads: list[Any], ticket: Ticket | None, extra_args: dict[str, Any]
) -> Step:
    """The updates and the next state.

    Args:
      grads: the gradient of each leaf, checked against the parameters.
      ticket: that of `read_rows` in the same step, if there is one.
    """
    state, params, tables = bound.state, bound.params, bound.tables
    assert state is not None
    treedef = flatten(params)[1]
    # The transforms in front of the rules, and all leaves that are no tables.
    updates, inner = with_stops(bound.tx, tuple(t.leaf for t in tables)).update(
        treedef.unflatten(grads), bound.inner, params, **extra_args
    )
    moved = flatten(updates)[0]
    at_rule: dict[int, Any] = {t.leaf: moved[t.leaf].gradient for t in tables}
    # A chain widens narrow gradients; updates are as wide as the gradient and the table.
    dtypes = {t.leaf: jnp.promote_types(dtype_of(grads[t.leaf]), t.dtype) for t in tables}
    for leaf, g in at_rule.items():
        if isinstance(g, RowGradient):
            # A ticket is recognised by the index array itself.
            at_rule[leaf] = g.replace(indices=grads[leaf].indices)

    sizes = {leaf: g.indices.size for leaf, g in at_rule.items() if isinstance(g, RowGradient)}
    batches = batches_of(bound.families, params, sizes)
    batches += [bound.alone(t) for t in tables if t.leaf not in sizes]
    has_nan = {family.name: jnp.array(False) for family in bound.families}
    new: dict[int, Columns] = {}
    for batch in batches:
        stepped = _batch_step(bound, batch, at_rule, ticket, extra_args)
        for t, columns in zip(batch.tables, stepped.columns, strict=True):
            new[t.leaf], moved[t.leaf] = columns, columns.weights.astype(dtypes[t.leaf])
        has_nan[batch.family.name] |= stepped.has_nan

    rings, states = dict(state.rings), {}
    for family in bound.families:
        rings[family.name] = bound.next_ring(family, has_nan[family.name])
        for t in family.tables:
            cursor = next_cursor(t, state.tables[t.path].cursor, family.history)
            states[t.path] = TableState(new[t.leaf].last, cursor)

    def put_back(name: str, tree: Tree) -> Tree:
        slots, treedef = flatten(tree)
        for leaf, columns in new.items():
            if slots[leaf] is not None:
                slots[leaf] = columns.slots[name]
        return treedef.unflatten(slots)

    inner = map_slots(put_back, inner)
    return treedef.unflatten(moved), ExactRowsState(inner, state.clock + 1, states, rings)


class _Stepped(NamedTuple):
    """Tables after a step, their updates in place of their weights."""

    columns: list[Columns]
    has_nan: chex.Array  # whether what was read of the ring has a NaN


def _batch_step(
    bound: Bound,
    batch: Batch,
    grads: dict[int, Any],
    ticket: Ticket | None,
    extra_args: dict[str, Any],
) -> _Stepped:
    first, tables = batch.tables[0], batch.tables
    columns = [bound.columns(t) for t in tables]
    past = bound.past(batch.family)
    tail = bound.tail(first, extra_args)
    clock = past.clock + 1

    def step(carry: Any, indices: list[Any], g: chex.Array, ready: Any = None) -> Any:
        """One step of some rows. The carry has each table's slots and `last`, and `has_nan`."""
        arrays, has_nan = carry
        now = [Columns(c.weights, *x) for c, x in zip(columns, arrays, strict=True)]
        if ready is None:
            ready = caught_up(batch, past, now, indices)
        u, slots = tail(g, ready.slots, ready.now)
        # The distance by which rows lag behind and the step are added to the table in one go, so
        # that it is rounded once.
        update = (ready.moved + u.astype(first.real)).astype(g.dtype)
        # `ready.last` is never later than the clock. The comparison makes the write of `last`
        # depend on its read, so that XLA need not copy it.
        last = jnp.where(clock - ready.last > 0, clock, ready.last)
        now = put_rows(now, indices, slots, last, slot_keys(batch, now, past.count))
        return ([(c.slots, c.last) for c in now], has_nan | ready.has_nan), update

    carry = [(c.slots, c.last) for c in columns], jnp.array(False)
    values = [grads[t.leaf] for t in tables]
    same = all(g.dtype == first.dtype for g in values)
    dtype = first.dtype if same else first.real
    if not isinstance(values[0], RowGradient):
        (arrays, has_nan), update = step(carry, [None], values[0].astype(dtype))
        updates: list[Any] = [update]
    else:
        read = [g.indices for g in values]
        ready = None if ticket is None else ticket.rows_of(batch.path, (past, columns, read))
        pieces: list[list[RowGradient]] = [[] for _ in tables]
        for number, indices in enumerate(_rows_to_step(bound, batch, read)):
            given = [g.values if number == 0 else g.values[:0] for g in values]
            sizes = [x.size for x in indices]
            g = _padded(given, sizes, dtype)
            if is_one_block(read[0].size):
                carry, update = step(carry, indices, g, ready)
            else:
                carry, update = in_blocks(
                    lambda carry, ids, g, _: step(carry, [ids], g),
                    carry,
                    indices[0],
                    first.num_rows,
                    g,
                )
            each = zip(tables, pieces, indices, rows_of_each(update, sizes), strict=True)
            for t, own, ids, piece in each:
                own.append(RowGradient(ids, piece, num_rows=t.num_rows))
        (arrays, has_nan), updates = carry, [RowMoves(tuple(own)) for own in pieces]
    after = [Columns(u, *x) for u, x in zip(updates, arrays, strict=True)]
    return _Stepped(after, has_nan)


def _rows_to_step(bound: Bound, batch: Batch, read: list[chex.Array]) -> list[list[chex.Array]]:
    """The rows of each table of a batch that a step works on: those read, and those to refresh.

    Both in one list; in two where there are so many that they are worked on in blocks, so that
    the gradients need not be copied to make room.
    """
    assert bound.state is not None
    due = due_rows(batch, bound.state, read)
    if is_one_block(read[0].size):
        return [[jnp.concatenate(both) for both in zip(read, due, strict=True)]]
    return [read, due]


def _padded(values: Sequence[chex.Array], sizes: Sequence[int], dtype: Any) -> chex.Array:
    """The rows of several tables, each filled up with zeros to a number of rows."""
    pieces = []
    for x, size in zip(values, sizes, strict=True):
        pieces.append(x.astype(dtype))
        if size > len(x):
            pieces.append(jnp.zeros((size - len(x), *x.shape[1:]), dtype))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def read_rows(
    bound: Bound, tables: list[Table], ids: list[chex.Array]
) -> tuple[list[chex.Array], list[tuple[chex.Array, chex.Array]], Ticket]:
    """Reads rows of tables, up to date.

    Returns:
      The rows of each table; the distinct indices of each and the position of each index among
      them; and a ticket for the step.
    """
    searched = distinct_of_each([x.reshape(-1) for x in ids], [t.num_rows for t in tables])
    positions = {t.leaf: i for i, t in enumerate(tables)}
    sizes = {t.leaf: rows.size for t, (rows, _) in zip(tables, searched, strict=True)}
    read: list[Any] = [None] * len(tables)
    ready_rows: dict[str, Any] = {}
    origins: dict[str, Any] = {}
    for batch in batches_of(bound.families, bound.params, sizes):
        own = [positions[t.leaf] for t in batch.tables]
        rows = [searched[i][0] for i in own]
        columns = [bound.columns(t) for t in batch.tables]
        past = bound.past(batch.family)
        indices = _rows_to_step(bound, batch, rows)[0]
        if is_one_block(rows[0].size):
            ready = caught_up(batch, past, columns, indices)
            now, ready_rows[batch.path] = ready.now, ready
            origins[batch.path] = past, columns, rows
        else:
            now = read_in_blocks(batch, past, columns[0], indices[0])
        starts = np.cumsum([0, *(x.size for x in indices[:-1])])
        # An index outside the table has the position of no row.
        position = jnp.concatenate(
            [
                jnp.where(searched[i][1] < x.size, searched[i][1] + start, len(now))
                for i, x, start in zip(own, rows, starts, strict=True)
            ]
        )
        now = taken(now, position, mode="fill", fill_value=0)
        for i, x in zip(own, rows_of_each(now, [x.size for x in rows]), strict=True):
            read[i] = x.reshape(*ids[i].shape, *x.shape[1:])
    by_path = {t.path: pair for t, pair in zip(tables, searched, strict=True)}
    shapes = {t.path: (t.num_rows, x.shape) for t, x in zip(tables, ids, strict=True)}
    ticket = Ticket(ready_rows, by_path, tuple(shapes.items()))
    return read, searched, ticket.made_of(origins)
