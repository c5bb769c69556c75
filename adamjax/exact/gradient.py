"""Gradients of a loss that reads up-to-date rows of tables."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex

from adamjax.autodiff import Call, Reads
from adamjax.data import Tree
from adamjax.exact.bound import Bound
from adamjax.exact.catch_up import caught_up, or_zeros
from adamjax.exact.state import Columns, Past
from adamjax.exact.step import read_rows
from adamjax.exact.tables import Batch
from adamjax.exact.ticket import Ticket
from adamjax.leaves import dtype_of
from adamjax.paths import flatten

__all__ = ["gradient_of"]


def gradient_of(
    loss_fn: Callable[..., Any],
    bind: Callable[[], Sequence[Bound]],
    *,
    has_aux: bool = False,
    strict: bool = False,
) -> Callable[..., Any]:
    """`exact_rows.value_and_grad` of one or more `exact_rows`, each with tables of its own.

    Args:
      bind: returns each of them, bound to its state and the parameters that it sees.

    Returns:
      A function `(params, *args, **kwargs) -> ((value, grads), ticket)`, with one ticket for all.
    """

    @functools.wraps(loss_fn)
    def function(params: Tree, *args: Any, **kwargs: Any) -> Any:
        batches: dict[int, Batch] = {}
        state_of: dict[int, tuple[Columns, Past]] = {}
        # `master_weights` reads rows from float32 tables; the loss gets the parameters' dtype.
        dtypes = [None if p is None else dtype_of(p) for p in flatten(params)[0]]
        bounds = bind()
        for bound in bounds:
            for table in bound.tables:
                batches[table.leaf] = batch = bound.batch_of(table)
                state_of[table.leaf] = bound.columns(table), bound.past(batch.family)
        call = Call("exact_rows", loss_fn, (params, *args), kwargs, 0, has_aux)
        reads = Reads(call, sorted(batches), exact=True, strict=strict)
        rows: dict[int, Any] = {}
        searched: dict[int, Any] = {}
        ticket = Ticket({}, {})
        indices = reads.indices()
        for bound in bounds:
            tables = [t for t in bound.tables if t.leaf in indices]
            if tables:
                leaves = [t.leaf for t in tables]
                table_rows, distinct, table_ticket = read_rows(
                    bound, tables, [indices[i] for i in leaves]
                )
                table_rows = [x.astype(dtypes[i]) for i, x in zip(leaves, table_rows, strict=True)]
                rows |= dict(zip(leaves, table_rows, strict=True))
                searched |= dict(zip(leaves, distinct, strict=True))
                ticket = ticket.with_rows_of(table_ticket)

        def read(state_of: Any, leaf: int, ids: Any) -> chex.Array:
            batch, (columns, past) = batches[leaf], state_of[leaf]
            ids = None if ids is None else ids.reshape(-1)
            now = caught_up(batch, past, [columns], [ids]).now.astype(dtypes[leaf])
            return now if ids is None else or_zeros(now, ids, batch.tables[0])

        dense = {leaf: read(state_of, leaf, None) for leaf in reads.dense}
        return reads.value_and_grad(state_of, read, rows, dense, searched), ticket

    return function
