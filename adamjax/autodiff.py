"""Row gradients of unchanged models: differentiates a loss with respect to the rows that it reads.

For `table[ids]`, JAX makes a gradient of the table's size. Here the loss is traced once, and
`reads` finds the sites where it reads rows. In effect, an array of zeros is added to the rows at
each site, and the loss is differentiated with respect to this array. So cotangents come row by row.
A table that is used in any other way gets JAX's gradient.
"""

import functools
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, overload

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import ClosedJaxpr, JaxprEqn, as_varying, source_line
from adamjax.leaves import is_arraylike, is_left_alone
from adamjax.paths import checked_patterns, expect_paths, first_match, flatten, leaf_paths
from adamjax.plans import PerSite, Source, View
from adamjax.reads import Planner
from adamjax.rows import RowGradient, as_row_ids, expect_row_count, sum_rows_of_each
from adamjax.search import distinct_of_each

__all__ = ["Call", "Reads", "grad", "signature_with_state", "takes_state", "value_and_grad"]

# The parameters of a loss, its other arguments, and what it returns.
P = TypeVar("P")
Args = ParamSpec("Args")
Value = TypeVar("Value")


def signature_with_state(fn: Callable[..., Any]) -> inspect.Signature:
    """The signature of `(params, state, /, *args, **kwargs)`, which calls `fn` without the state.

    `jax.jit` uses it to find static arguments by name and by position.
    """
    leading = [
        # A keyword of fn may be called params or state, and jit does not accept a name twice.
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
        for name in ("_params", "_state")
    ]
    try:
        signature = inspect.signature(fn)
        first, *others = signature.parameters.values()
        if first.kind is first.VAR_POSITIONAL:
            others = [first, *others]
    except ValueError:  # fn has no signature, or takes no argument
        signature = inspect.signature(lambda *args, **kwargs: None)
        others = list(signature.parameters.values())
    return signature.replace(parameters=[*leading, *others])


def takes_state(fn: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function `(params, state, ...)` that calls `fn(params, ...)`.

    It does what `functools.wraps` does, but the signature includes the state.
    """

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapped: Any = functools.wraps(fn)(function)
        del wrapped.__wrapped__
        wrapped.__signature__ = signature_with_state(fn)
        return function

    return decorated


# --- a call of a loss -----------------------------------------------------------------------------


def _argument_numbers(owner: str, argnums: Any) -> tuple[list[int], bool]:
    """The positions of the arguments, and whether `argnums` is a single int."""
    single = not isinstance(argnums, Sequence | np.ndarray) or np.shape(argnums) == ()
    numbers = [argnums] if single else list(argnums)
    try:
        if any(isinstance(i, bool | np.bool_) for i in numbers):
            raise TypeError
        return [operator.index(i) for i in numbers], single
    except TypeError:
        raise TypeError(
            f"{owner}: argnums must be an int or a tuple of ints, got {argnums!r}"
        ) from None


class Call:
    """A loss and its arguments, as a function of the float leaves of the differentiated arguments.

    Attributes:
      leaves, paths: the leaves of all differentiated arguments in one list, and their paths.
      floats: the positions of the leaves that are floats.
    """

    def __init__(
        self,
        owner: str,
        loss_fn: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
    ) -> None:
        self.owner, self.loss_fn, self.args, self.kwargs = owner, loss_fn, args, kwargs
        numbers, self.single = _argument_numbers(owner, argnums)
        self.has_aux = has_aux
        if not all(-len(args) <= i < len(args) for i in numbers):
            raise ValueError(
                f"{owner}: argnums={argnums} needs more than the {len(args)} positional arguments "
                "that were given"
            )
        self.argnums = [i % len(args) for i in numbers]
        if len(set(self.argnums)) != len(numbers):
            raise ValueError(f"{owner}: argnums={argnums} names an argument twice")
        self.trees = [flatten(args[i]) for i in self.argnums]
        self.leaves = [leaf for leaves, _ in self.trees for leaf in leaves]
        self.paths = [path for i in self.argnums for path in leaf_paths(args[i])]
        self.floats = [
            i
            for i, leaf in enumerate(self.leaves)
            if leaf is not None and is_arraylike(leaf) and not is_left_alone(leaf)
        ]

    def unflattened(self, leaves: Sequence[Any]) -> list[Any]:
        """Trees like the differentiated arguments, with these leaves."""
        rest = iter(leaves)
        return [treedef.unflatten(itertools.islice(rest, len(x))) for x, treedef in self.trees]

    def _loss(self, floats: Sequence[Any]) -> Any:
        """The loss as a function of the float leaves."""
        leaves, args = list(self.leaves), list(self.args)
        for i, x in zip(self.floats, floats, strict=True):
            leaves[i] = x
        for i, tree in zip(self.argnums, self.unflattened(leaves), strict=True):
            args[i] = tree
        return self.loss_fn(*args, **self.kwargs)

    def _split_aux(self, value: Any) -> tuple[Any, Any]:
        """Splits the loss function's result into loss and aux; aux is `None` without has_aux."""
        if not self.has_aux:
            return value, None
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise TypeError(
                f"{self.owner}: with has_aux=True the loss function must return a pair "
                f"(loss, aux), got {value!r}"
            )
        loss, aux = value
        return loss, aux

    def _expect_loss(self, loss: Any) -> None:
        """Refuses a loss that is not one real float."""
        message = f"{self.owner}: the loss must be one real float, got"
        advice = "" if self.has_aux else "; if it returns aux too, pass has_aux=True"
        if not is_arraylike(loss):
            raise TypeError(f"{message} {loss!r}{advice}")
        dtype = jnp.result_type(loss)
        if np.shape(loss) != () or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{message} {dtype.name}{list(np.shape(loss))}{advice}")

    def value_and_grad(self) -> Any:
        """Like `jax.value_and_grad`; the gradient of a leaf that is not a float is `None`."""
        floats = [self.leaves[i] for i in self.floats]

        def loss(floats: Sequence[Any]) -> Any:
            value = self._loss(floats)
            self._expect_loss(self._split_aux(value)[0])
            return value

        value, float_grads = jax.value_and_grad(loss, has_aux=self.has_aux)(floats)
        grads: list[Any] = [None] * len(self.leaves)
        for i, g in zip(self.floats, float_grads, strict=True):
            grads[i] = g
        trees = self.unflattened(grads)
        return value, trees[0] if self.single else tuple(trees)

    def traced(self) -> tuple[ClosedJaxpr, Callable[[list[Any]], Any]]:
        """The loss as a jaxpr, and a function that restores aux.

        The jaxpr takes the float leaves, and returns the loss and then the JAX arrays of aux. The
        function makes aux from these arrays.
        """
        restorers: list[Callable[[list[Any]], Any]] = []

        def function(*floats: Any) -> list[Any]:
            value, aux = self._split_aux(self._loss(floats))
            self._expect_loss(value)
            arrays: list[Any] = []
            if self.has_aux:
                arrays, restorers[:] = _split_arrays(aux)
            return [value, *arrays]

        closed = jax.make_jaxpr(function)(*(self.leaves[i] for i in self.floats))
        return closed, restorers[0] if restorers else lambda arrays: None

    def traced_results(self) -> tuple[ClosedJaxpr, Callable[[list[Any]], Any]]:
        """The jaxpr of a function that is not a loss, and a function that restores its results.

        The results may be any tree. The jaxpr takes the float leaves, and returns the JAX arrays
        among the results. The function makes the results from these arrays.
        """
        restorers: list[Callable[[list[Any]], Any]] = []

        def function(*floats: Any) -> list[Any]:
            arrays, restorers[:] = _split_arrays(self._loss(floats))
            return arrays

        closed = jax.make_jaxpr(function)(*(self.leaves[i] for i in self.floats))
        return closed, restorers[0]


def _split_arrays(tree: Any) -> tuple[list[Any], list[Callable[[list[Any]], Any]]]:
    """The JAX arrays in a tree, and a list with one function, which makes the tree from them."""
    leaves, structure = jax.tree.flatten(tree)
    treedef: Any = structure
    others = [None if isinstance(x, jax.Array) else (x,) for x in leaves]

    def restore(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        return treedef.unflatten([next(rest) if x is None else x[0] for x in others])

    return [x for x in leaves if isinstance(x, jax.Array)], [restore]


class Reads:
    """The reads of tables in a loss, and the loss' gradient with respect to the rows.

    With `is_loss=False`, the function may return any tree, and has no gradient.

    Attributes:
      row_tables: the tables of which the loss only reads rows, as positions of leaves.
      dense_tables: the tables that the loss also uses in another way, or that have no rows.
      other_floats: all float leaves except `row_tables`.
    """

    def __init__(
        self, call: Call, tables: Sequence[int], exact: bool, strict: bool, is_loss: bool = True
    ) -> None:
        self.call, self.is_loss, self.exact = call, is_loss, exact
        self.closed, self.restore = call.traced() if is_loss else call.traced_results()
        # A table without rows has no rows to read.
        self.dense_tables = [i for i in tables if np.shape(call.leaves[i])[0] == 0]
        while True:
            planner = Planner(exact)
            row_tables = [i for i in tables if i not in self.dense_tables]
            views = [
                View(i, np.shape(call.leaves[i])) if i in row_tables else None for i in call.floats
            ]
            live_outs = [is_loss and i == 0 for i in range(len(self.closed.out_avals))]
            self.plan = planner.plan(self.closed, views, [True] * len(views), live_outs)
            if exact:
                planner.refuse((x for x in self.plan.outs if isinstance(x, View)), None)
            if not planner.refused:
                break
            if strict:
                raise ValueError(self._refusal(*next(iter(planner.refused.items()))))
            self.dense_tables += planner.refused
        self.row_tables = row_tables
        self.other_floats = [i for i in call.floats if i not in row_tables]

    def _refusal(self, table: int, eqn: JaxprEqn | None) -> str:
        call = self.call
        if eqn is None:
            use = f"returned by the {'loss ' if self.is_loss else ''}function"
        else:
            use = f"used by {eqn.primitive.name} at {source_line(eqn)}"
        if self.is_loss:
            effect, allowed = "its gradient is dense", "its dense gradient"
        else:
            effect, allowed = "all of its rows have to be brought up to date", "that"
        return (
            f"{call.owner}: the table {call.paths[table]!r} is {use}, which is not a read of whole "
            f"rows, so {effect}. Read it only by table[ids] or jnp.take, or remove it from the "
            f"tables; strict=False allows {allowed}"
        )

    def indices(self) -> dict[int, chex.Array]:
        """By table, the flat indices of its reads, if they can be computed before the loss runs."""
        by_table: dict[int, list[Any]] = {i: [] for i in self.row_tables}
        for site, ids in zip(self.plan.sites, self.plan.indices({}), strict=True):
            by_table[site.view.table].append(ids)
        return {
            i: jnp.concatenate([jnp.zeros(0, jnp.int32), *(x.reshape(-1) for x in ids)])
            for i, ids in by_table.items()
            if all(x is not None for x in ids)
        }

    def value_and_grad(
        self,
        data: Any,
        read_rows: Callable[[Any, int, chex.Array], chex.Array],
        rows: Mapping[int, chex.Array] | None = None,
        dense: Mapping[int, chex.Array] | None = None,
        searched: Mapping[int, tuple[chex.Array, chex.Array]] | None = None,
    ) -> Any:
        """Returns the loss, or `(loss, aux)`, and the gradients.

        Args:
          data: the first argument of `read_rows`.
          read_rows: `(data, table, int32[...]) -> rows`, for tables that are not in `rows`.
          rows: by table, the rows at the indices that `indices` returned.
          dense: arrays that replace some leaves, by the leaves' positions.
          searched: by table, `search.distinct` of the indices that `indices` returned.
        """
        call = self.call
        leaves, others, row_inputs, source = self._inputs(data, read_rows, rows, dense)

        def loss(others: list[Any], row_inputs: PerSite) -> Any:
            (value, *arrays), ids = self._run(source, others, row_inputs)
            return value, (arrays, ids)

        function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, (arrays, ids)), (other_grads, site_grads) = function(others, row_inputs)
        grads: list[Any] = [None] * len(leaves)
        for i, g in zip(self.other_floats, other_grads, strict=True):
            grads[i] = g
        for i, g in self._row_gradients(leaves, ids, site_grads, searched or {}).items():
            grads[i] = g
        trees = call.unflattened(grads)
        value = (value, self.restore(arrays)) if call.has_aux else value
        return value, trees[0] if call.single else tuple(trees)

    def results(
        self,
        data: Any,
        read_rows: Callable[[Any, int, chex.Array], chex.Array],
        rows: Mapping[int, chex.Array] | None = None,
        dense: Mapping[int, chex.Array] | None = None,
    ) -> Any:
        """Returns what the function returns; takes the same arguments as `value_and_grad`."""
        _, others, row_inputs, source = self._inputs(data, read_rows, rows, dense)
        return self.restore(self._run(source, others, row_inputs)[0])

    def _run(
        self, source: Source, others: list[Any], row_inputs: PerSite
    ) -> tuple[list[Any], PerSite]:
        """The arrays that the traced function returns, and the indices at each site."""
        outs, ids = self.plan.run(source, others, row_inputs)
        rest = iter(outs)
        outs = [source.whole(x) if isinstance(x, View) else next(rest) for x in self.plan.outs]
        return outs, ids

    def _inputs(
        self,
        data: Any,
        read_rows: Callable[[Any, int, chex.Array], chex.Array],
        rows: Mapping[int, chex.Array] | None,
        dense: Mapping[int, chex.Array] | None,
    ) -> tuple[list[Any], list[Any], PerSite, Source]:
        """The leaves as arrays, `other_floats`, the `row_inputs` of `Plan.run`, and its source."""
        call, rows = self.call, dict(rows or {})
        leaves: list[Any] = [
            jnp.asarray(x) if i in call.floats else x for i, x in enumerate(call.leaves)
        ]
        others = [(dense or {}).get(i, leaves[i]) for i in self.other_floats]
        row_inputs: PerSite = []
        starts = dict.fromkeys(rows, 0)
        for site in self.plan.sites:
            table, size = site.view.table, math.prod(site.shape)
            shape = (*site.shape, *site.trailing)
            if table in rows:
                site_rows = rows[table][starts[table] :][:size]
                starts[table] += size
                row_inputs.append(site_rows.reshape(shape))
            elif site.live:
                x = jnp.zeros(shape, leaves[table].dtype)
                x = as_varying(x, site.varying) if site.varying else x
                row_inputs.append(x)
            else:
                row_inputs.append(None)
        return (
            leaves,
            others,
            row_inputs,
            Source(
                data, read_rows, lambda _, i: leaves[i], frozenset(rows), promised=not self.exact
            ),
        )

    def _row_gradients(
        self,
        leaves: list[Any],
        ids: PerSite,
        grads: PerSite,
        searched: Mapping[int, tuple[chex.Array, chex.Array]],
    ) -> dict[int, RowGradient]:
        """The gradients of `row_tables`."""
        values, unsearched, distinct = {}, {}, dict(searched)
        for i in self.row_tables:
            reads = zip(self.plan.sites, ids, grads, strict=True)
            table_reads = [read for read in reads if read[0].view.table == i]
            # Within `shard_map`, only the indices of one device were searched.
            if any(site.view.axes for site, _, _ in table_reads):
                distinct.pop(i, None)
            values[i], indices = self._joined_reads(leaves[i], table_reads, i in distinct)
            if i not in distinct:
                unsearched[i] = as_row_ids(indices, len(leaves[i]))
        num_rows = [len(leaves[i]) for i in unsearched]
        pairs = distinct_of_each(list(unsearched.values()), num_rows)
        distinct |= dict(zip(unsearched, pairs, strict=True))
        sums = sum_rows_of_each(
            [distinct[i] for i in values], list(values.values()), [len(leaves[i]) for i in values]
        )
        return dict(zip(values, sums, strict=True))

    def _joined_reads(
        self, leaf: chex.Array, table_reads: list[tuple[Any, Any, Any]], is_searched: bool
    ) -> tuple[chex.Array, chex.Array]:
        """The gradients of the rows that a table's reads return, and the indices of these rows.

        With `is_searched` it returns no indices. The gradients then match the searched indices: a
        read through which the loss is not differentiated has gradients of zero.
        """
        trailing = leaf.shape[1:]
        indices = [jnp.zeros(0, jnp.int32)]
        values = [jnp.zeros((0, *trailing), leaf.dtype)]
        for site, ids, g in table_reads:
            if g is None:
                if is_searched:
                    values.append(jnp.zeros((math.prod(site.shape), *trailing), leaf.dtype))
                continue
            g = g.reshape(-1, *trailing) if 0 not in trailing else g.reshape(ids.size, *trailing)
            if not is_searched:
                ids = ids.reshape(-1)
                if site.view.axes:
                    gather = functools.partial(
                        jax.lax.all_gather,
                        axis_name=site.view.axes,
                        tiled=True,
                        to="invarying",
                    )
                    ids, g = gather(ids), gather(g)
                indices.append(ids)
            values.append(g)
        return jnp.concatenate(values), jnp.concatenate(indices)


# --- the public functions -------------------------------------------------------------------------


def _tables(call: Call, patterns: Sequence[str]) -> list[int]:
    """The positions of the leaves that are tables."""
    expect_paths(
        call.owner, patterns, [call.paths[i] for i in call.floats], what="leaf of real floats"
    )
    tables = [i for i in call.floats if first_match(patterns, call.paths[i]) is not None]
    for i in tables:
        if np.ndim(call.leaves[i]) < 1:
            raise ValueError(
                f"{call.owner}: {call.paths[i]!r} is a scalar, expected a table with rows"
            )
        expect_row_count(f"{call.owner}: {call.paths[i]!r}", np.shape(call.leaves[i])[0])
    return tables


@overload
def value_and_grad(
    loss_fn: Callable[Concatenate[P, Args], Value],
    tables: str | Sequence[str],
    *,
    has_aux: bool = False,
    argnums: Literal[0] = 0,
    strict: bool = False,
) -> Callable[Concatenate[P, Args], tuple[Value, P]]: ...


@overload
def value_and_grad(
    loss_fn: Callable[..., Any],
    tables: str | Sequence[str],
    *,
    has_aux: bool = False,
    argnums: int | Sequence[int],
    strict: bool = False,
) -> Callable[..., Any]: ...


def value_and_grad(
    loss_fn: Callable[..., Any],
    tables: str | Sequence[str],
    *,
    has_aux: bool = False,
    argnums: int | Sequence[int] = 0,
    strict: bool = False,
) -> Callable[..., Any]:
    """`jax.value_and_grad` of an unchanged loss, with a `RowGradient` for each table.

    A table is a leaf from which the loss reads whole rows: by `table[ids]`, by `jnp.take`, or by
    Flax' and Equinox' embeddings, with indices of any shape and in any mode. The loss may cast the
    table first, or reshape it so that rows stay whole, and read it within `jit`, `vmap`, `remat`,
    `scan`, `map`, `cond` and `shard_map`. The gradient has each row that was read, once: if a row
    is read several times, its gradients are summed, in float32 or wider. No array of the table's
    size is made, not even a cast of it. If the loss also uses the table in another way (as output
    weights, in a norm, in a `custom_jvp` or `custom_vjp`), the table's gradient is the dense one of
    `jax.grad`.

    In all other respects it works like JAX's function, and composes with JAX's transformations. The
    differences:

    - The loss is traced once, so it cannot branch on values of the differentiated arguments. Call
      it under `jit`, as in a train step: outside, it runs operation by operation.
    - Leaves that are not floats (integers, keys, functions) get the gradient `None`, which
      transforms leave alone. JAX raises an error.
    - Within `shard_map`, JAX sums the gradient of a value that all devices share. For a table, this
      function gathers the rows of all devices instead. The cost of this collective grows with these
      rows, not with the table.

    Args:
      loss_fn: returns one real float, or with `has_aux` a pair of it and any tree.
      tables: which leaves are tables: a pattern for `re.search` in the leaf's path, such as
        `"embedding"`, or a list of patterns. The path does not contain the name of the argument.
        Each pattern must match a leaf, unless it is `adamjax.optional(pattern)`.
      has_aux: as in JAX.
      argnums: as in JAX, the positions of the differentiated arguments.
      strict: whether to raise if a table's gradient would be dense.

    Returns:
      A function with the arguments of `loss_fn`. It returns `(value, grads)`; with `has_aux`,
      value is `(loss, aux)`. If the derivative reaches no row of a table, the table's row gradient
      is empty.

    Raises:
      ValueError, TypeError: when called: a pattern matches no leaf of floats, or the loss is not
        one real float. With `strict`: the gradient of a table would be dense; the message names the
        table, the operation and the line that uses it.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> def loss(params, ids, y):
    ...     return jnp.mean((params["embedding"][ids] @ params["out"] - y) ** 2)
    >>> params = {"embedding": jnp.ones((1000, 2)), "out": jnp.ones(2)}
    >>> value, grads = adamjax.value_and_grad(loss, "embedding")(params, jnp.array([7, 7]), 0.0)
    >>> # An index of 1000, the number of rows, marks an unused place.
    >>> grads["embedding"].indices, grads["embedding"].values
    (Array([   7, 1000], dtype=int32), Array([[4., 4.],
           [0., 0.]], dtype=float32))
    """
    owner = "value_and_grad"
    patterns = checked_patterns(owner, tables)

    @functools.wraps(loss_fn)
    def function(*args: Any, **kwargs: Any) -> Any:
        call = Call(owner, loss_fn, args, kwargs, argnums, has_aux)
        reads = Reads(call, _tables(call, patterns), False, strict)

        tables_by_leaf = {i: jnp.asarray(call.leaves[i]) for i in reads.row_tables}

        def read_rows(tables: Any, table: int, ids: chex.Array) -> chex.Array:
            rows = tables[table].at[ids]
            return rows.get(mode="promise_in_bounds", wrap_negative_indices=False)

        return reads.value_and_grad(tables_by_leaf, read_rows)

    return function


def grad(
    loss_fn: Callable[..., Any],
    tables: str | Sequence[str],
    *,
    has_aux: bool = False,
    argnums: int | Sequence[int] = 0,
    strict: bool = False,
) -> Callable[..., Any]:
    """`jax.grad` with row gradients for tables: `value_and_grad` without the value.

    Returns:
      A function with the arguments of `loss_fn`. It returns the gradients, or with `has_aux`
      `(grads, aux)`.

    >>> import adamjax, jax.numpy as jnp
    >>> table = jnp.ones((1000, 2))  # a bare array has an empty path, which the pattern "" matches
    >>> adamjax.grad(lambda table, i: table[i].sum(), "")(table, jnp.array([5])).indices
    Array([5], dtype=int32)
    """
    gradient = value_and_grad(loss_fn, tables, has_aux=has_aux, argnums=argnums, strict=strict)

    @functools.wraps(loss_fn)
    def function(*args: Any, **kwargs: Any) -> Any:
        value, grads = gradient(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return function
