"""A step of tables: brings rows up to date, takes their step, and writes them back."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from adamjax.blocks import joined_positions, needs_no_loop, rows_of_each, run_in_blocks
from adamjax.data import Tree
from adamjax.exact.bound import Bound
from adamjax.exact.catch_up import catch_up_rows, put_slots, read_in_blocks, slot_keys, weights_of
from adamjax.exact.route import capturing_at_rules
from adamjax.exact.state import ExactRowsState, TableArrays
from adamjax.exact.tables import Batch, Table, batches_of, due_rows, next_turn
from adamjax.exact.ticket import Ticket
from adamjax.leaves import dtype_of, joined_leaves
from adamjax.mesh import gather_rows
from adamjax.moments import promoted_dtype
from adamjax.paths import flatten
from adamjax.rows import RowGradient, RowMoves, indices_after
from adamjax.search import distinct_of_each
from adamjax.structure import map_slots
from adamjax.transform import Step

__all__ = ["read_rows", "take_step"]


def take_step(
    bound: Bound, grads: list[Any], ticket: Ticket | None, extra_args: dict[str, Any]
) -> Step:
    """Returns the updates and the next state.

    Args:
      grads: the gradient of each leaf, checked against the parameters.
      ticket: the ticket of `read_rows` in the same step, if there is one.
    """
    state, params, tables = bound.state, bound.params, bound.tables
    assert state is not None
    treedef = flatten(params)[1]
    # This takes the whole step of leaves that are not tables. A table's gradient goes only as far
    # as its rule.
    updates, inner = capturing_at_rules(bound.tx, tuple(t.leaf_index for t in tables)).update(
        treedef.unflatten(grads), bound.inner_state, params, **extra_args
    )
    leaf_updates = flatten(updates)[0]
    rule_grads: dict[int, Any] = {t.leaf_index: leaf_updates[t.leaf_index].gradient for t in tables}
    # An update has the promoted dtype of its gradient and its table. The chain may have widened
    # narrow gradients, so this looks at `grads`.
    dtypes = {t.leaf_index: promoted_dtype(dtype_of(grads[t.leaf_index]), t.dtype) for t in tables}
    for leaf, g in rule_grads.items():
        if isinstance(g, RowGradient):
            # The transforms may have copied the indices, and a ticket is valid only for the very
            # array that it was made from.
            rule_grads[leaf] = g.replace(indices=grads[leaf].indices)

    has_nan = {family.name: jnp.array(False) for family in bound.families}
    if bound.has_edited_numbers is not None:
        # The step computes with the numbers from before the edit. Only the compiled step can notice
        # the edit, and it cannot raise an error, so its results are NaN.
        for leaf, g in rule_grads.items():
            nan_if_edited = jnp.where(bound.has_edited_numbers, jnp.nan, 1)
            rule_grads[leaf] = g * nan_if_edited.astype(g.dtype)
        has_nan = dict.fromkeys(has_nan, bound.has_edited_numbers)

    sizes = {leaf: g.indices.size for leaf, g in rule_grads.items() if isinstance(g, RowGradient)}
    batches = batches_of(bound.families, params, sizes)
    batches += [bound.batch_of(t) for t in tables if t.leaf_index not in sizes]
    stepped_tables: dict[int, _SteppedTable] = {}
    for batch in batches:
        stepped_batch, batch_has_nan = _batch_step(bound, batch, rule_grads, ticket, extra_args)
        for t, stepped in zip(batch.tables, stepped_batch, strict=True):
            stepped_tables[t.leaf_index] = stepped
            leaf_updates[t.leaf_index] = stepped.update.astype(dtypes[t.leaf_index])
        has_nan[batch.family.name] |= batch_has_nan

    rings = {f.name: bound.next_ring(f, has_nan[f.name]) for f in bound.families}
    turns = {f.name: next_turn(state.turns[f.name], f.history) for f in bound.families}
    last = {t.path: stepped_tables[t.leaf_index].last for t in tables}

    def with_stepped_slots(name: str, tree: Tree) -> Tree:
        slots, treedef = flatten(tree)
        for leaf, stepped in stepped_tables.items():
            if slots[leaf] is not None:
                slots[leaf] = stepped.slots[name]
        return treedef.unflatten(slots)

    inner = map_slots(with_stepped_slots, inner)
    return treedef.unflatten(leaf_updates), ExactRowsState(
        inner, state.clock + 1, last, turns, rings
    )


class _SteppedTable(NamedTuple):
    """A table's update in a step, and its slots and `last` after the step."""

    update: Any
    slots: dict[str, Any]
    last: chex.Array


def _batch_step(
    bound: Bound,
    batch: Batch,
    grads: dict[int, Any],
    ticket: Ticket | None,
    extra_args: dict[str, Any],
) -> tuple[list[_SteppedTable], chex.Array]:
    """Takes the step of a batch.

    Returns:
      The stepped tables, and whether the entries read from the ring have a NaN.
    """
    first, tables = batch.tables[0], batch.tables
    arrays = [bound.arrays(t) for t in tables]
    past = bound.past(batch.family)
    row_step = bound.row_step(first, extra_args)
    clock = past.clock + 1

    def step(carry: Any, indices: list[Any], g: chex.Array, ready: Any = None) -> Any:
        """A step of some rows. The carry has each table's slots and `last`, and `has_nan`."""
        slots_and_last, has_nan = carry
        current = [
            TableArrays(x.weights, *carried)
            for x, carried in zip(arrays, slots_and_last, strict=True)
        ]
        if ready is None:
            ready = catch_up_rows(batch, past, current, indices)
        with joined_leaves(len(tables) > 1):
            u, slots = row_step(g, ready.slots, ready.weights)
        # One addition to the table makes a row catch up and takes its step, so that the row is
        # rounded once.
        update = (ready.moved + u.astype(first.real_dtype)).astype(g.dtype)
        # `ready.last` is always before this clock. The comparison makes the write of `last` depend
        # on its read, so that XLA need not copy `last`.
        last = jnp.where(clock - ready.last > 0, clock, ready.last)
        keys = slot_keys(batch, current, past.count)
        after = put_slots(current, indices, slots, last, keys)
        return ([(x.slots, x.last) for x in after], has_nan | ready.has_nan), update

    carry = [(x.slots, x.last) for x in arrays], jnp.array(False)
    table_grads = [grads[t.leaf_index] for t in tables]
    is_same_dtype = all(g.dtype == first.dtype for g in table_grads)
    dtype = first.dtype if is_same_dtype else first.real_dtype
    if not isinstance(table_grads[0], RowGradient):
        # A dense gradient: the batch is one table, and None stands for all its rows.
        (slots_and_last, has_nan), update = step(carry, [None], table_grads[0].astype(dtype))
        updates: list[Any] = [update]
    else:
        read_indices = [g.indices for g in table_grads]
        ready = None if ticket is None else ticket.rows_of(batch.path, (past, arrays, read_indices))
        moves: list[list[RowGradient]] = [[] for _ in tables]
        for pass_number, indices in enumerate(_passes(bound, batch, read_indices)):
            # A second pass has the rows to refresh, which have no gradient.
            grad_rows = [g.values if pass_number == 0 else g.values[:0] for g in table_grads]
            sizes = [x.size for x in indices]
            padded = _padded(grad_rows, sizes, dtype)
            if needs_no_loop(read_indices[0].size):
                carry, update = step(carry, indices, padded, ready)
            else:
                carry, update = run_in_blocks(
                    lambda carry, ids, g, _: step(carry, [ids], g),
                    carry,
                    indices[0],
                    first.num_rows,
                    padded,
                )
            table_updates = rows_of_each(update, sizes)
            for t, ids, u, table_moves in zip(tables, indices, table_updates, moves, strict=True):
                table_moves.append(RowGradient(ids, u, num_rows=t.num_rows))
        for table_moves in moves:
            # This makes the indices of each part depend on the values of the next part. So XLA
            # writes no row of the table before it has read all of them.
            for i, later in enumerate(table_moves[1:]):
                ids = indices_after(later.values, table_moves[i].indices, later.num_rows)
                table_moves[i] = table_moves[i].replace(indices=ids)
        (slots_and_last, has_nan), updates = carry, [RowMoves(tuple(x)) for x in moves]
    stepped = [_SteppedTable(u, *x) for u, x in zip(updates, slots_and_last, strict=True)]
    return stepped, has_nan


def _passes(bound: Bound, batch: Batch, read_indices: list[chex.Array]) -> list[list[chex.Array]]:
    """The passes of a step: for each pass, the indices of every table.

    Usually there is one pass: the rows that were read, then the rows to refresh. If a step reads so
    many rows that they are processed in blocks, the rows to refresh have a second pass. So the
    gradients need not be copied into a longer array.
    """
    assert bound.state is not None
    due = due_rows(batch, bound.state.turns[batch.family.name], read_indices)
    if not needs_no_loop(read_indices[0].size):
        return [read_indices, due]
    num_read, num_due = [x.size for x in read_indices], [x.size for x in due]
    both = jnp.concatenate([*read_indices, *due])
    if len(due) > 1:
        # If the arrays were concatenated table by table, each would be a separate operand with a
        # separate kernel.
        both = gather_rows(both, _interleaved(num_read, num_due), mode="promise_in_bounds")
    return [rows_of_each(both, list(map(operator.add, num_read, num_due)))]


def _interleaved(first: Sequence[int], second: Sequence[int]) -> np.ndarray:
    """The order in which to gather rows of two concatenated arrays to sort them by table.

    Each of the arrays is sorted by table. Rows of the first array come first within their table.

    Args:
      first, second: the number of rows of each table in the two arrays.
    """
    table_of_row = [np.repeat(np.arange(len(counts)), counts) for counts in (first, second)]
    return np.argsort(np.concatenate(table_of_row), kind="stable").astype(np.int32)


def _padded(values: Sequence[chex.Array], sizes: Sequence[int], dtype: Any) -> chex.Array:
    """Concatenates the rows of tables, each padded with zeros to its number of rows in `sizes`."""
    lengths = [len(x) for x in values]
    padding = list(map(operator.sub, sizes, lengths))
    rows = jnp.concatenate([x.astype(dtype) for x in values])
    if not any(padding):
        return rows
    rows = jnp.concatenate([rows, jnp.zeros((sum(padding), *rows.shape[1:]), dtype)])
    if len(values) == 1:
        return rows
    return gather_rows(rows, _interleaved(lengths, padding), mode="promise_in_bounds")


def read_rows(
    bound: Bound,
    tables: list[Table],
    ids: list[chex.Array],
    *,
    for_step: bool = True,
    averaged: bool = False,
) -> tuple[list[chex.Array], list[tuple[chex.Array, chex.Array]], Ticket]:
    """Reads up-to-date rows of tables.

    Args:
      for_step: whether a step follows, which also needs the rows that it refreshes.
      averaged: whether to return the rows of `weight_ema`'s average, where there is one.

    Returns:
      The rows of each table; for each table its distinct indices, and the position of each index
      among these; and a ticket for the step.
    """
    searched = distinct_of_each([x.reshape(-1) for x in ids], [t.num_rows for t in tables])
    position_of = {t.leaf_index: i for i, t in enumerate(tables)}
    sizes = {t.leaf_index: distinct.size for t, (distinct, _) in zip(tables, searched, strict=True)}
    read: list[Any] = [None] * len(tables)
    ready_rows: dict[str, Any] = {}
    origins: dict[str, Any] = {}
    for batch in batches_of(bound.families, bound.params, sizes):
        positions = [position_of[t.leaf_index] for t in batch.tables]
        read_indices = [searched[i][0] for i in positions]
        arrays = [bound.arrays(t) for t in batch.tables]
        past = bound.past(batch.family)
        indices = _passes(bound, batch, read_indices)[0] if for_step else read_indices
        if needs_no_loop(read_indices[0].size):
            ready = catch_up_rows(batch, past, arrays, indices)
            weights, ready_rows[batch.path] = weights_of(batch, ready, averaged), ready
            origins[batch.path] = past, arrays, read_indices
        else:
            weights = read_in_blocks(batch, past, arrays[0], indices[0], averaged)
        num_read = [x.size for x in read_indices]
        starts = np.cumsum([0, *(x.size for x in indices[:-1])])
        joined = joined_positions(
            [searched[i][1] for i in positions], num_read, starts, outside=len(weights)
        )
        weights = gather_rows(weights, joined, mode="fill", fill_value=0)
        table_rows = rows_of_each(weights, num_read)
        for i, x in zip(positions, table_rows, strict=True):
            read[i] = x.reshape(*ids[i].shape, *x.shape[1:])
    searched_of = {t.path: pair for t, pair in zip(tables, searched, strict=True)}
    num_rows_and_shape = {t.path: (t.num_rows, x.shape) for t, x in zip(tables, ids, strict=True)}
    ticket = Ticket(ready_rows, searched_of, tuple(num_rows_and_shape.items()))
    return read, searched, ticket.with_origins(origins)
