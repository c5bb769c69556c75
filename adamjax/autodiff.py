"""Row gradients of models as they are: a loss is differentiated by the rows that it reads.

JAX differentiates `table[ids]` by an array of the table's size. Here the loss is traced once, the
reads of its tables are found (`reads`), and what is read at each place is differentiated by an
array of its own, as if that were added to the rows. So cotangents come row by row. A table that
is used in any other way is differentiated as JAX does it.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, overload

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import ClosedJaxpr, JaxprEqn, line
from adamjax.leaves import is_arraylike, is_left_alone
from adamjax.paths import checked_patterns, expect_paths, first_match, flatten, leaf_paths
from adamjax.reads import Planner, Slots, Source, View
from adamjax.rows import RowGradient, in_table, summed_of_each
from adamjax.search import distinct_of_each

__all__ = ["Call", "Reads", "grad", "value_and_grad"]

# The parameters of a loss, its other arguments, and what it returns.
P = TypeVar("P")
Args = ParamSpec("Args")
Value = TypeVar("Value")


# --- a call of a loss -----------------------------------------------------------------------------


def _numbers(owner: str, argnums: Any) -> tuple[list[int], bool]:
    """The numbers of arguments, and whether one was given rather than several."""
    single = not isinstance(argnums, Sequence | np.ndarray) or np.shape(argnums) == ()
    given = [argnums] if single else list(argnums)
    try:
        if any(isinstance(i, bool | np.bool_) for i in given):
            raise TypeError
        return [operator.index(i) for i in given], single
    except TypeError:
        raise TypeError(
            f"{owner}: argnums must be an int or a tuple of ints, got {argnums!r}"
        ) from None


class Call:
    """A loss with its arguments, as a function of the leaves that it may be differentiated by.

    Attributes:
      leaves, paths: of the arguments to differentiate by, joined; floats are `floats` of them.
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
        numbers, self.single = _numbers(owner, argnums)
        self.has_aux = has_aux
        if not all(-len(args) <= i < len(args) for i in numbers):
            raise ValueError(
                f"{owner}: argnums={argnums} needs more than the {len(args)} positional arguments "
                "that were given"
            )
        self.argnums = [i % len(args) for i in numbers]
        if len(set(self.argnums)) != len(numbers):
            raise ValueError(f"{owner}: argnums={argnums} has an argument twice, expected it once")
        self.trees = [flatten(args[i]) for i in self.argnums]
        self.leaves = [leaf for leaves, _ in self.trees for leaf in leaves]
        self.paths = [path for i in self.argnums for path in leaf_paths(args[i])]
        self.floats = [
            i
            for i, leaf in enumerate(self.leaves)
            if leaf is not None and is_arraylike(leaf) and not is_left_alone(leaf)
        ]

    def unflattened(self, leaves: Sequence[Any]) -> list[Any]:
        """Trees like the arguments to differentiate by."""
        rest = iter(leaves)
        return [treedef.unflatten(itertools.islice(rest, len(own))) for own, treedef in self.trees]

    def _loss(self, floats: Sequence[Any]) -> Any:
        """The loss as a function of the float leaves."""
        leaves, args = list(self.leaves), list(self.args)
        for i, x in zip(self.floats, floats, strict=True):
            leaves[i] = x
        for i, tree in zip(self.argnums, self.unflattened(leaves), strict=True):
            args[i] = tree
        return self.loss_fn(*args, **self.kwargs)

    def value_and_grad(self) -> Any:
        """As of `jax.value_and_grad`, but the gradient of a leaf that is no float is `None`."""

        floats = [self.leaves[i] for i in self.floats]
        value, found = jax.value_and_grad(self._loss, has_aux=self.has_aux)(floats)
        grads: list[Any] = [None] * len(self.leaves)
        for i, g in zip(self.floats, found, strict=True):
            grads[i] = g
        trees = self.unflattened(grads)
        return value, trees[0] if self.single else tuple(trees)

    def traced(self) -> tuple[ClosedJaxpr, Callable[[list[Any]], Any]]:
        """The jaxpr from float leaves to the loss and the arrays of aux, and aux from those."""
        aux: list[Any] = []

        def function(*floats: Any) -> list[Any]:
            value = self._loss(floats)
            if self.has_aux:
                if not isinstance(value, tuple | list) or len(value) != 2:
                    raise TypeError(
                        f"{self.owner}: with has_aux=True the loss function must return a pair "
                        f"(loss, aux), got {value!r}"
                    )
                value, given = value
                found, treedef = jax.tree.flatten(given)
                # What is no array of JAX's need not become one.
                aux[:] = treedef, [None if isinstance(x, jax.Array) else (x,) for x in found]
            if not is_arraylike(value):
                raise TypeError(f"{self.owner}: the loss must be one real float, got {value!r}")
            arrays = [x for x in found if isinstance(x, jax.Array)] if self.has_aux else []
            return [value, *arrays]

        closed = jax.make_jaxpr(function)(*(self.leaves[i] for i in self.floats))
        loss = closed.out_avals[0]
        if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise TypeError(
                f"{self.owner}: the loss must be one real float, got "
                f"{loss.dtype.name}{list(loss.shape)}; with aux beside it say has_aux=True"
            )

        def restored(arrays: list[Any]) -> Any:
            rest, (treedef, found) = iter(arrays), aux
            return treedef.unflatten([next(rest) if x is None else x[0] for x in found])

        return closed, restored


class Reads:
    """Where a loss reads rows of its tables.

    Attributes:
      dense: the tables, as numbers of leaves, that are used in another way as well.
    """

    def __init__(self, call: Call, tables: Sequence[int], exact: bool, strict: bool) -> None:
        self.call = call
        self.closed, self.aux = call.traced()
        # Of a table without rows there is nothing to be read.
        self.dense = [i for i in tables if np.shape(call.leaves[i])[0] == 0]
        while True:
            planner = Planner(exact)
            rows = [i for i in tables if i not in self.dense]
            views = [View(i, np.shape(call.leaves[i])) if i in rows else None for i in call.floats]
            outs = [True] + [False] * (len(self.closed.out_avals) - 1)
            self.plan = planner.plan(self.closed, views, [True] * len(views), outs)
            if exact:
                planner.refuse((x for x in self.plan.outs if isinstance(x, View)), None)
            if not planner.refused:
                break
            if strict:
                raise ValueError(self._refused(*next(iter(planner.refused.items()))))
            self.dense += planner.refused
        self.rows = rows
        self.others = [i for i in call.floats if i not in rows]

    def _refused(self, table: int, eqn: JaxprEqn | None) -> str:
        call = self.call
        if eqn is None:
            use = "returned by the loss function"
        else:
            use = f"used by {eqn.primitive.name} at {line(eqn)}"
        return (
            f"{call.owner}: the table {call.paths[table]!r} is {use}, which is not a read of whole "
            "rows, so its gradient is dense. Read it by table[ids] or jnp.take alone, or take it "
            "from the tables; strict=False takes its dense gradient"
        )

    def indices(self) -> dict[int, chex.Array]:
        """For each table whose rows can be told beforehand, all that are read, one-dimensional."""
        known: dict[int, list[Any]] = {i: [] for i in self.rows}
        for place, ids in zip(self.plan.places, self.plan.indices({})[1], strict=True):
            known[place.view.table].append(ids)
        return {
            i: jnp.concatenate([jnp.zeros(0, jnp.int32), *(x.reshape(-1) for x in ids)])
            for i, ids in known.items()
            if all(x is not None for x in ids)
        }

    def value_and_grad(
        self,
        held: Any,
        look: Callable[[Any, int, chex.Array], chex.Array],
        given: Mapping[int, chex.Array] | None = None,
        dense: Mapping[int, chex.Array] | None = None,
        known: Mapping[int, tuple[chex.Array, chex.Array]] | None = None,
    ) -> Any:
        """The loss, with aux if there is, and the gradients.

        Args:
          held: what `look` looks into.
          look: `(held, table, int32[...]) -> rows`, for rows that are not given.
          given: rows at the places that `indices` told.
          dense: what stands for some leaves.
          known: what `distinct` makes of what `indices` told.
        """
        call, given = self.call, dict(given or {})
        leaves: list[Any] = [
            jnp.asarray(x) if i in call.floats else x for i, x in enumerate(call.leaves)
        ]
        others = [(dense or {}).get(i, leaves[i]) for i in self.others]
        xs, done = [], dict.fromkeys(given, 0)
        for place in self.plan.places:
            table, size = place.view.table, math.prod(place.shape)
            shape = (*place.shape, *place.trailing)
            if table in given:
                rows = given[table][done[table] :][:size]
                done[table] += size
                xs.append(rows.reshape(shape))
            elif place.live:
                x = jnp.zeros(shape, leaves[table].dtype)
                xs.append(jax.lax.pcast(x, place.varying, to="varying") if place.varying else x)
            else:
                xs.append(None)
        source = Source(held, look, lambda _, i: leaves[i], frozenset(given))

        def loss(others: list[Any], xs: Slots) -> Any:
            found, ids = self.plan.run(source, others, xs)
            rest = iter(found)
            value, *arrays = (
                source.all(x) if isinstance(x, View) else next(rest) for x in self.plan.outs
            )
            return value, (arrays, ids)

        taken = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(others, xs)
        (value, (arrays, ids)), (of_others, of_places) = taken
        grads: list[Any] = [None] * len(leaves)
        for i, g in zip(self.others, of_others, strict=True):
            grads[i] = g
        for i, g in self._sums(leaves, ids, of_places, known or {}).items():
            grads[i] = g
        trees = call.unflattened(grads)
        value = (value, self.aux(arrays)) if call.has_aux else value
        return value, trees[0] if call.single else tuple(trees)

    def _sums(
        self,
        leaves: list[Any],
        ids: Slots,
        grads: Slots,
        known: Mapping[int, tuple[chex.Array, chex.Array]],
    ) -> dict[int, RowGradient]:
        """The gradients of the tables."""
        values, asked, distinct = {}, {}, dict(known)
        for i in self.rows:
            places = zip(self.plan.places, ids, grads, strict=True)
            mine = [x for x in places if x[0].view.table == i]
            # Within `shard_map` it is known of the rows of one device alone.
            if any(place.view.axes for place, _, _ in mine):
                distinct.pop(i, None)
            values[i], found = self._touched(leaves[i], mine, i in distinct)
            if i not in distinct:
                asked[i] = in_table(found, len(leaves[i]))
        rows = [len(leaves[i]) for i in asked]
        searched = distinct_of_each(list(asked.values()), rows)
        distinct |= dict(zip(asked, searched, strict=True))
        sums = summed_of_each(
            [distinct[i] for i in values], list(values.values()), [len(leaves[i]) for i in values]
        )
        return dict(zip(values, sums, strict=True))

    def _touched(
        self, leaf: chex.Array, mine: list[tuple[Any, Any, Any]], is_known: bool
    ) -> tuple[chex.Array, chex.Array]:
        """What each read of a table got, and its indices; of known ones not those."""
        trailing = leaf.shape[1:]
        indices = [jnp.zeros(0, jnp.int32)]
        values = [jnp.zeros((0, *trailing), leaf.dtype)]
        for place, i, g in mine:
            if g is None:
                if is_known:
                    values.append(jnp.zeros((math.prod(place.shape), *trailing), leaf.dtype))
                continue
            g = g.reshape(-1, *trailing) if 0 not in trailing else g.reshape(i.size, *trailing)
            if not is_known:
                i = i.reshape(-1)
                if place.view.axes:
                    gathered = functools.partial(
                        jax.lax.all_gather,
                        axis_name=place.view.axes,
                        tiled=True,
                        to="invarying",
                    )
                    i, g = gathered(i), gathered(g)
                indices.append(i)
            values.append(g)
        return jnp.concatenate(values), jnp.concatenate(indices)


# --- what users call ------------------------------------------------------------------------------


def _tables(call: Call, patterns: Sequence[str]) -> list[int]:
    """The leaves that are tables."""
    expect_paths(
        call.owner, patterns, [call.paths[i] for i in call.floats], what="leaf of real floats"
    )
    found = [i for i in call.floats if first_match(patterns, call.paths[i]) is not None]
    for i in found:
        if np.ndim(call.leaves[i]) < 1:
            raise ValueError(
                f"{call.owner}: {call.paths[i]!r} is a scalar, expected a table with rows"
            )
    return found


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
    """`jax.value_and_grad` of a loss as it is, with a `RowGradient` for each table.

    A table is a leaf of which the loss reads whole rows: by `table[ids]`, `jnp.take`, Flax' and
    Equinox' embeddings, in any mode and shape, also after a cast or a reshape that keeps the
    rows, within `jit`, `vmap`, `remat`, `scan`, `map`, `cond` and `shard_map`. Its gradient holds
    the rows that were read, equal ones summed (in float32 at least), and no array of its size is
    made, nor a cast one. Where a loss uses it in another way as well (as output weights, in a
    norm, in a call with a derivative of its own), the gradient is JAX's, dense and exact.

    Else it is as JAX's, and composes with its transformations. It differs in this:

    - The loss is traced, once, so it cannot branch by values of what it is differentiated by.
      As a train step is, it should be under `jit`: outside, a loss runs operation by operation.
    - Leaves that are no floats (integers, keys, functions) get the gradient `None`, which
      transforms leave alone, in the place of an error.
    - Within `shard_map`, where JAX sums the gradient of what all devices share, their rows are
      gathered, by a collective of the rows' size.

    Args:
      loss_fn: returns one real float, or a pair of it and any tree with `has_aux`.
      tables: which leaves are tables: a pattern for `re.search` in the leaf's path within its
        argument, such as `"embedding"`, or a list of them, each of which must match one
        (`adamjax.optional(pattern)` need not).
      has_aux: as JAX's.
      argnums: as JAX's: which arguments to differentiate by.
      strict: raise where a table's gradient would be dense.

    Returns:
      A function like `loss_fn`: `(value, grads)`, where value is `(loss, aux)` with `has_aux`.
      Where no row is read that the loss is differentiated by, the row gradient is empty.

    Raises:
      ValueError, TypeError: by the call: no leaf is a table, the loss is not one real float; with
        `strict`, the message names the table, the operation and the line that uses it.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> def loss(params, ids, y):
    ...     return jnp.mean((params["embedding"][ids] @ params["out"] - y) ** 2)
    >>> params = {"embedding": jnp.ones((1000, 2)), "out": jnp.ones(2)}
    >>> value, grads = adamjax.value_and_grad(loss, "embedding")(params, jnp.array([7, 7]), 0.0)
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

        held = {i: jnp.asarray(call.leaves[i]) for i in reads.rows}
        return reads.value_and_grad(held, lambda held, i, ids: held[i].at[ids].get(mode="clip"))

    return function


def grad(
    loss_fn: Callable[..., Any],
    tables: str | Sequence[str],
    *,
    has_aux: bool = False,
    argnums: int | Sequence[int] = 0,
    strict: bool = False,
) -> Callable[..., Any]:
    """`jax.grad` with row gradients for tables: as `value_and_grad`, without the value.

    Returns:
      A function like `loss_fn`: gradients, or a pair of them and aux.

    >>> import adamjax, jax.numpy as jnp
    >>> table = jnp.ones((1000, 2))
    >>> adamjax.grad(lambda table, i: table[i].sum(), "")(table, jnp.array([5])).indices
    Array([5], dtype=int32)
    """
    both = value_and_grad(loss_fn, tables, has_aux=has_aux, argnums=argnums, strict=strict)

    @functools.wraps(loss_fn)
    def function(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return function
