"""Calls and gradients of functions that read up-to-date rows of tables."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex

from adamjax.autodiff import Call, Reads
from adamjax.data import Tree
from adamjax.exact.bound import Bound
from adamjax.exact.catch_up import catch_up_rows, weights_of, zeros_outside_table
from adamjax.exact.state import Past, TableArrays
from adamjax.exact.step import read_rows
from adamjax.exact.tables import Batch
from adamjax.exact.ticket import Ticket
from adamjax.leaves import dtype_of

__all__ = ["gradient_of", "results_of"]


class _Inputs(NamedTuple):
    """The arguments that `Reads.value_and_grad` and `Reads.results` have in common."""

    data: Any
    read_rows: Callable[[Any, int, Any], chex.Array]
    rows: dict[int, chex.Array]
    dense: dict[int, chex.Array]


def _prepare_reads(
    call: Call, bounds: Sequence[Bound], *, strict: bool, is_loss: bool, averaged: bool = False
) -> tuple[Reads, _Inputs, dict[int, Any], Ticket]:
    """Finds the reads of a function, and brings their rows up to date before it is called.

    Args:
      is_loss: whether the function is a loss, whose gradient a step then uses.
      averaged: whether to read the average of `weight_ema` in place of the weights, for tables that
        have one.

    Returns:
      The reads; the arguments for their calls; by table, the result of `search.distinct` for its
      indices; and a ticket for the step.
    """
    batches: dict[int, Batch] = {}
    state_of: dict[int, tuple[TableArrays, Past]] = {}
    # With `master_weights`, rows come from float32 tables. The function gets the parameters' dtype.
    dtypes = [None if p is None else dtype_of(p) for p in call.leaves]
    for bound in bounds:
        for table in bound.tables:
            batches[table.leaf_index] = batch = bound.batch_of(table)
            state_of[table.leaf_index] = bound.arrays(table), bound.past(batch.family)
    reads = Reads(call, sorted(batches), exact=True, strict=strict, is_loss=is_loss)
    rows: dict[int, Any] = {}
    searched: dict[int, Any] = {}
    ticket = Ticket({}, {})
    indices = reads.indices()
    for bound in bounds:
        tables = [t for t in bound.tables if t.leaf_index in indices]
        if tables:
            leaves = [t.leaf_index for t in tables]
            ids = [indices[i] for i in leaves]
            bound_rows, distinct, bound_ticket = read_rows(
                bound, tables, ids, for_step=is_loss, averaged=averaged
            )
            bound_rows = [x.astype(dtypes[i]) for i, x in zip(leaves, bound_rows, strict=True)]
            rows |= dict(zip(leaves, bound_rows, strict=True))
            searched |= dict(zip(leaves, distinct, strict=True))
            ticket = ticket.with_rows_of(bound_ticket)

    def read_in_call(data: Any, leaf: int, ids: Any) -> chex.Array:
        """The `read_rows` of `Reads`, with `state_of` as its data. Without ids, all rows."""
        batch, (table_arrays, past) = batches[leaf], data[leaf]
        ids = None if ids is None else ids.reshape(-1)
        ready = catch_up_rows(batch, past, [table_arrays], [ids])
        weights = weights_of(batch, ready, averaged).astype(dtypes[leaf])
        return weights if ids is None else zeros_outside_table(weights, ids, batch.tables[0])

    dense = {leaf: read_in_call(state_of, leaf, None) for leaf in reads.dense_tables}
    return reads, _Inputs(state_of, read_in_call, rows, dense), searched, ticket


def gradient_of(
    loss_fn: Callable[..., Any],
    bind: Callable[[], Sequence[Bound]],
    *,
    has_aux: bool = False,
    strict: bool = False,
) -> Callable[..., Any]:
    """`exact_rows.value_and_grad` of one or more `exact_rows`, each with tables of its own.

    Args:
      bind: a function that returns each `exact_rows`, bound to its state and the parameters that
        it sees.

    Returns:
      A function `(params, /, *args, **kwargs) -> ((value, grads), ticket)`, one ticket for all.
    """

    @functools.wraps(loss_fn)
    def function(params: Tree, /, *args: Any, **kwargs: Any) -> Any:
        bounds = bind()
        call = Call("exact_rows", loss_fn, (params, *args), kwargs, 0, has_aux)
        reads, inputs, searched, ticket = _prepare_reads(call, bounds, strict=strict, is_loss=True)
        return reads.value_and_grad(*inputs, searched), ticket

    return function


def results_of(
    owner: str,
    fn: Callable[..., Any],
    bounds: Sequence[Bound],
    *,
    strict: bool = False,
    averaged: bool = False,
) -> Callable[..., Any]:
    """`fn`, but with up-to-date rows where it reads tables of `exact_rows`.

    Args:
      bounds: each `exact_rows`, bound to its state and the parameters that it sees.
      averaged: whether to read the average of `weight_ema` in place of the weights, for tables that
        have one.

    Returns:
      A function with the arguments and results of `fn`.
    """

    @functools.wraps(fn)
    def function(params: Tree, /, *args: Any, **kwargs: Any) -> Any:
        call = Call(owner, fn, (params, *args), kwargs)
        reads, inputs, _, _ = _prepare_reads(
            call, bounds, strict=strict, is_loss=False, averaged=averaged
        )
        return reads.results(*inputs)

    return function
