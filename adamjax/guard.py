"""Transforms that take a step only sometimes: every few calls, or if all gradients are finite."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.average import weight_ema
from adamjax.data import COUNT, Number, Tree, is_array, static, transform_state
from adamjax.leaves import (
    expect_wide,
    is_left_alone,
    lift,
    new_slots,
    no_scalars,
    reduce_leaves,
    zero_update,
)
from adamjax.mesh import explicit_sharding, replicate, scatter_rows, split_like_rows
from adamjax.moments import as_count, compute_dtype, next_count, widened_dtype
from adamjax.paths import (
    checked_rules,
    expect_matches,
    expect_present,
    first_match,
    flatten,
    is_leaf,
    leaf_paths,
)
from adamjax.replicas import sum_over
from adamjax.rows import RowGradient, as_size, nonzero_arrays, with_seal, without_seal
from adamjax.structure import find, walk
from adamjax.transform import Rule, Step, Transform, as_transform, expect_state

__all__ = [
    "AccumulateGradientsState",
    "SkipNotFiniteState",
    "accumulate_gradients",
    "skip_not_finite",
]


def _step_if(
    due: chex.Array, step: Callable[[Tree], Step], grads: Tree, state: Any, wide: bool
) -> Step:
    """`step(grads)` if `due`, else zero updates and the same state.

    The step gets `None` in place of a float0 gradient, because a branch of a `cond` cannot return
    float0.

    Args:
      wide: whether updates may be wider than gradients; else they get the gradients' dtypes.
    """
    leaves, treedef = flatten(grads)
    is_active = [g is not None and getattr(g, "dtype", None) != jax.dtypes.float0 for g in leaves]

    def as_active(g: Any) -> Any:
        return g if isinstance(g, RowGradient) else jnp.asarray(g)

    active = treedef.unflatten(
        [as_active(g) if ok else None for g, ok in zip(leaves, is_active, strict=True)]
    )

    def take_step() -> Step:
        updates, new_state = step(active)

        def result(g: Any, u: Any) -> Any:
            # Leave the seal out: the `cond` would return it as a traced array, and each later step
            # would have to compare this with the right number.
            return without_seal(u if wide else u.astype(g.dtype))

        return _map_leaves(result, active, updates), new_state

    def skip_step() -> Step:
        # An update may have more arrays than its gradient: all rows of a table may move.
        return _map_leaves(_zero_updates, jax.eval_shape(take_step)[0]), state

    if isinstance(due, jax.core.Tracer):
        updates, state = jax.lax.cond(due, take_step, skip_step)
    else:  # `cond` would compile both functions again in each call.
        updates, state = take_step() if due else skip_step()
    triples = zip(leaves, flatten(updates)[0], is_active, strict=True)
    return treedef.unflatten([with_seal(u) if ok else g for g, u, ok in triples]), state


def _map_leaves(function: Callable[..., Any], *trees: Tree) -> Any:
    """A function mapped over the leaves of trees; `None` stays."""

    def mapped(*leaves: Any) -> Any:
        return None if leaves[0] is None else function(*leaves)

    return jax.tree.map(mapped, *trees, is_leaf=is_leaf)


def _zero_updates(shape: Any) -> Any:
    def zeros(x: Any) -> chex.Array:
        # On a mesh with explicit axes, both branches must split their results alike.
        return jnp.zeros(x.shape, x.dtype, device=explicit_sharding(x))

    return zero_update(jax.tree.map(zeros, shape))


@transform_state()
class AccumulateGradientsState(NamedTuple):
    """State of `accumulate_gradients`.

    Attributes:
      micro_count: int32, the number of micro-batches since the last step.
      total: tree like the parameters, the sum of their gradients, in float32 or wider. For a table
        with `max_rows` it is a row gradient. (If this has a place for every row, place i belongs to
        row i.)
      inner: the state of the inner transform.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.accumulate_gradients(adamjax.scale(-1.0), steps=2)
    >>> tx.update(jnp.array(3.0), tx.init(jnp.array(0.0)))[1].total
    Array(3., dtype=float32)
    """

    micro_count: chex.Array
    total: Tree
    inner: Any


def _add(c: None, g: Any, total: Any) -> tuple[Any, Any]:
    """A rule on arrays, for `lift`: adds the gradient to the total. Its update is not used."""
    if not isinstance(total, RowGradient):
        return g, total + g.astype(total.dtype)
    if _has_all_rows(total):
        if isinstance(g, RowGradient) and g.rest is None:
            ids = scatter_rows(total.indices, g.indices, g.indices)
        else:
            # Place i has the index i, or a larger number if it is empty. A minimum keeps the
            # indices split over devices.
            ids = jnp.minimum(total.indices, jnp.arange(total.num_rows, dtype=jnp.int32))
        return g, total.replace(indices=ids, values=total.values + g.astype(total.dtype))
    if not isinstance(g, RowGradient):
        raise ValueError(
            f"accumulate_gradients: max_rows makes room for row gradients of this table of shape "
            f"{total.shape}, but got a dense one; leave the table out of max_rows"
        )
    max_rows, new_total = total.indices.size, total + g.astype(total.dtype)
    overflows = jnp.any(new_total.indices[max_rows:] < new_total.num_rows)
    # NaN, because dropping the rows that do not fit would be silently wrong.
    values = jnp.where(overflows, jnp.nan, new_total.values[:max_rows])
    return g, new_total.replace(indices=new_total.indices[:max_rows], values=values)


def _has_all_rows(total: RowGradient) -> bool:
    """Whether a total has a place for every row: place i has row i, or is empty.

    Dense gradients can be added to such a total too. Then its values are the dense sum.
    """
    return len(total.indices) == total.num_rows


def _mean(g: Any, total: Any, calls: chex.Array) -> Any:
    """The mean of the gradients of some calls, in the form of the last call's gradient `g`."""
    if isinstance(total, RowGradient):
        if not isinstance(g, RowGradient):
            total = total.values
        else:
            total = total.replace(lazy=g.lazy)
            if _has_all_rows(total):
                # If a table is split over devices, so is its total. But a row gradient must be
                # replicated.
                arrays = replicate(total.indices), replicate(total.values)
                total = total.replace(indices=arrays[0], values=arrays[1])
    return with_seal(total / calls)


def _checked_max_rows(max_rows: Any) -> int | tuple[tuple[str, int], ...]:
    """`max_rows` as one number, or as a tuple of pairs (pattern, number)."""
    error = ValueError(
        f"accumulate_gradients: max_rows must be a whole number of at least 1, or pairs (pattern, "
        f"number) or a dictionary of them; got {max_rows!r}"
    )
    rules: Any = None
    if isinstance(max_rows, list | tuple | Mapping):
        rules = checked_rules("accumulate_gradients: max_rows", max_rows)
        if not rules:
            raise error
    # The errors of `as_size` do not mention pairs.
    try:
        if rules is None:
            return as_size("", max_rows)
        return tuple((pattern, as_size("", rows)) for pattern, rows in rules)
    except ValueError:
        raise error from None


class accumulate_gradients(Transform):
    """Takes a step of `tx` every `steps` calls, with the mean of the gradients of these calls.

    In the other calls updates are zero, and nothing in `tx` changes: no moment, count, schedule,
    decay or average. The mean reaches `tx` in float32 or wider. If the gradient of a leaf is `None`
    in a call, nothing is added to its sum, but the call counts in the mean. If this call takes
    the step, the leaf is left alone and its sum is kept. The gradients of the next
    step's calls are added to that sum, and the total is divided by the number of the next step's
    calls only.

    Row gradients are summed in a dense array, unless `max_rows` bounds the number of distinct rows
    of a table that a step reads; then the step gets a row gradient. If more rows are read, all
    values of this row gradient become NaN. To skip such a step, write
    `accumulate_gradients(skip_not_finite(tx), steps, max_rows)`. A rule with `rows="lazy"` (for
    `adamax` the default) needs `max_rows` for its tables, because a dense sum would move all rows.

    Args:
      tx: the transform that takes the steps, usually a whole optimizer.
      steps: the number of micro-batches in a step, a whole number of at least 1. (If it is an array
        that is traced, or set later by `set_hyperparams`, a value below 1 makes the mean NaN.)
      max_rows: pairs (pattern, rows), or a dictionary {pattern: rows}, for tables that get row
        gradients; each pattern must match a leaf, as in `by_path`. Or one number of rows, for every
        leaf of two or more dimensions. If a table has no more rows than that, its gradients may be
        dense too: they are summed in a dense array, or, if its rule is lazy, in a row gradient with
        a place for every row.

    The state is an `AccumulateGradientsState`.

    Raises:
      ValueError: by `update`: a leaf has more rows than `max_rows`, but a dense gradient. (If
        `max_rows` is one number, the leaf may be a dense kernel. Then give pairs with the patterns
        of the tables instead.) Or a leaf without `max_rows` has a row gradient and a lazy rule.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.accumulate_gradients(adamjax.scale(-1.0), steps=2)
    >>> state = tx.init(jnp.array(0.0))
    >>> for g in (1.0, 3.0):
    ...     update, state = tx.update(jnp.array(g), state)
    ...     print(update)
    0.0
    -2.0
    """

    tx: Transform
    steps: Number
    max_rows: Any = static(default=None)

    goes_around_exact_rows = True

    @property
    def gates_steps(self) -> bool:
        return is_array(self.steps) or self.steps > 1

    @property
    def groupable(self) -> bool:
        # `max_rows` applies to leaves by their shapes and paths.
        return self.max_rows is None and super().groupable

    def __post_init__(self) -> None:
        self.set_fields(tx=as_transform(self.tx))
        self.check_range("steps", COUNT)
        if self.max_rows is not None:
            self.set_fields(max_rows=_checked_max_rows(self.max_rows))

    @property
    def _patterns(self) -> list[str]:
        """The patterns of `max_rows`."""
        return [p for p, _ in self.max_rows] if isinstance(self.max_rows, tuple) else []

    def _max_rows_of(self, path: str, p: Any) -> int | None:
        """How many rows a leaf's sum has room for; `None` if `max_rows` does not apply to it."""
        rows: int | None
        if self.max_rows is None or np.ndim(p) == 0:
            return None
        if isinstance(self.max_rows, int):
            rows = self.max_rows if np.ndim(p) > 1 else None
        else:
            match = first_match(self._patterns, path)
            rows = None if match is None else self.max_rows[match][1]
        return None if rows is None else min(rows, np.shape(p)[0])

    def _expect_max_rows(self, total: Tree) -> None:
        """Refuses a state that was made for another `max_rows`."""
        paths = leaf_paths(total)
        if isinstance(self.max_rows, tuple):
            expect_present("accumulate_gradients: max_rows", self._patterns, total, paths)

        def form(rows: int | None) -> str:
            return "a dense array" if rows is None else f"{rows} rows"

        for path, x in zip(paths, flatten(total)[0], strict=True):
            rows = x.indices.size if isinstance(x, RowGradient) else None
            expected = None if x is None else self._max_rows_of(path, x)
            # With room for all rows, the sum of a leaf is dense unless its rule is lazy.
            if rows != expected and not (rows is None and expected == x.shape[0]):
                raise ValueError(
                    f"accumulate_gradients: the state accumulates {path!r} in {form(rows)}, "
                    f"expected {form(expected)} by max_rows={self.max_rows!r}: use the max_rows "
                    "of the state, or after a whole step put the state's inner into a new state "
                    "from init"
                )

    def init(self, params: Tree) -> AccumulateGradientsState:
        if isinstance(self.max_rows, tuple):
            owner = "accumulate_gradients: max_rows"
            expect_matches(owner, self._patterns, params, first_decides=True)

        def empty(p: chex.Array) -> chex.Array:
            return jnp.zeros_like(p, widened_dtype(p.dtype, compute_dtype(p.dtype)))

        totals, treedef = flatten(new_slots(params, empty))
        leaves, is_lazy = flatten(params)[0], self.tx.lazy_leaves(params)
        for i, path in enumerate(leaf_paths(params)):
            x = totals[i]
            rows = None if x is None else self._max_rows_of(path, x)
            if rows is None:
                continue
            num_rows = x.shape[0]
            ids = jnp.full(rows, num_rows, jnp.int32)
            if rows < num_rows:
                values = jnp.zeros((rows, *x.shape[1:]), x.dtype)
                totals[i] = RowGradient(ids, values, num_rows=num_rows, seal=None)
            elif is_lazy[i]:
                ids = split_like_rows(ids, leaves[i])
                totals[i] = RowGradient(ids, x, num_rows=num_rows, seal=None)
        total = treedef.unflatten(totals)
        return AccumulateGradientsState(jnp.zeros((), jnp.int32), total, self.tx.init(params))

    def _expect_no_dense_sum_of_lazy_rows(self, grads: Tree, total: Tree, params: Tree) -> None:
        """Refuses a row gradient whose dense sum would move rows that are to be left alone."""
        leaves, totals = flatten(grads)[0], flatten(total)[0]
        in_dense = [
            i
            for i, (g, x) in enumerate(zip(leaves, totals, strict=True))
            if isinstance(g, RowGradient) and not isinstance(x, RowGradient)
        ]
        if not in_dense:
            return
        is_lazy = self.tx.lazy_leaves(total if params is None else params)
        moves_all = any(
            part.tx.adds_weights or isinstance(part.tx, Rule | weight_ema) for part in walk(self.tx)
        )
        for i in in_dense:
            path, g = leaf_paths(total)[i], leaves[i]
            if is_lazy[i]:
                has_max_rows = self._max_rows_of(path, g) is not None
                why = "the rule of this leaf leaves alone the rows that were not read"
                advice = (
                    "the state was made for another rule: after a whole step put the state's inner "
                    "into a new state from init"
                    if has_max_rows
                    else f"pass max_rows={{{path!r}: rows}}, the most distinct rows that a step "
                    'reads, or rows="dense" to the rule'
                )
            elif g.lazy and moves_all:
                why = "a rule before this one leaves alone the rows that were not read"
                advice = "put that rule inside, accumulate_gradients(chain(rule, ...), steps, ...)"
            else:
                continue
            raise ValueError(
                f"accumulate_gradients: grads[{path!r}] is a row gradient, summed in a dense "
                f"array, and that would move every row, but {why}: {advice}"
            )

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_state(self, state, AccumulateGradientsState)
        expect_wide("accumulate_gradients", "total", state.total)
        self._expect_max_rows(state.total)
        slots = (state.total,)
        _, total = lift("accumulate_gradients", _add, no_scalars, updates, slots, rows="whole")
        self._expect_no_dense_sum_of_lazy_rows(updates, total, params)
        count = state.micro_count + 1
        steps = as_count("accumulate_gradients: steps", self.steps, count.dtype)
        due = count >= steps

        def step(active: Tree) -> Step:
            def mean(g: Any, x: Any) -> Any:
                if is_left_alone(g):
                    return g
                # Divide by the number of calls. `steps` may have been set to another value since
                # the first of them.
                calls = count.astype(compute_dtype(x.dtype))
                if is_array(self.steps):
                    calls = jnp.where(steps >= 1, calls, jnp.nan)
                x = _mean(g, x, calls)
                # Other libraries' transforms return updates and states in the gradients' dtype.
                return x.astype(g.dtype) if self.tx.has_foreign else x

            def cleared(g: Any, x: Any) -> Any:
                return x if is_left_alone(g) else zero_update(x)

            means = jax.tree.map(mean, active, total, is_leaf=is_leaf)
            updates, inner = self.tx.update(means, state.inner, params, **extra_args)
            new_total = jax.tree.map(cleared, active, total, is_leaf=is_leaf)
            return updates, (new_total, inner)

        updates, (total, inner) = _step_if(
            due, step, updates, (total, state.inner), self.has_wide_updates
        )
        return updates, AccumulateGradientsState(jnp.where(due, 0, count), total, inner)

    def part_states(self, state: Any) -> tuple[Any, ...]:
        expect_state(self, state, AccumulateGradientsState)
        return (state.inner,)


@transform_state()
class SkipNotFiniteState(NamedTuple):
    """State of `skip_not_finite`.

    Attributes:
      skipped: int32, the number of skipped steps; it stops at the largest int32.
      inner: the state of the inner transform.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.skip_not_finite(adamjax.scale(-1.0))
    >>> tx.update(jnp.array(jnp.nan), tx.init(jnp.array(0.0)))[1].skipped
    Array(1, dtype=int32)
    """

    skipped: chex.Array
    inner: Any


def _all_finite(c: None, g: Any) -> tuple[chex.Array]:
    """For `reduce_leaves`: whether all elements of a leaf are finite."""
    return (
        functools.reduce(jnp.logical_and, (jnp.all(jnp.isfinite(x)) for x in nonzero_arrays(g))),
    )


class skip_not_finite(Transform):
    """Takes the step of `tx` only if every gradient is finite.

    Otherwise updates are zero and only a counter changes, which `skipped_steps` reads.

    Args:
      tx: the transform that takes the steps, usually a whole optimizer. `sum_over` is refused in
        it: each device would decide by its own gradients, and one that takes the step would wait
        forever for one that skips it. Write `chain(sum_over(axis), skip_not_finite(tx))`.

    The state is a `SkipNotFiniteState`.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.skip_not_finite(adamjax.adam())
    >>> update, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.ones(1)))
    >>> update, adamjax.skipped_steps(state), adamjax.step_count(state)
    (Array([0.], dtype=float32), Array(1, dtype=int32), Array(0, dtype=int32))
    """

    tx: Transform

    goes_around_exact_rows = True

    @property
    def gates_steps(self) -> bool:
        return True

    def __post_init__(self) -> None:
        self.set_fields(tx=as_transform(self.tx))
        if find(sum_over, self.tx):
            raise ValueError(
                "skip_not_finite: sum_over is inside, so each device would decide by its own "
                "gradients, and wait forever for one that skips the step: write "
                "chain(sum_over(axis), skip_not_finite(...))"
            )

    def init(self, params: Tree) -> SkipNotFiniteState:
        return SkipNotFiniteState(jnp.zeros((), jnp.int32), self.tx.init(params))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_state(self, state, SkipNotFiniteState)
        finite = reduce_leaves(
            "skip_not_finite", _all_finite, jnp.logical_and, updates, empty=jnp.array(True)
        )

        def step(active: Tree) -> Step:
            return self.tx.update(active, state.inner, params, **extra_args)

        updates, inner = _step_if(finite, step, updates, state.inner, self.has_wide_updates)
        skipped = jnp.where(finite, state.skipped, next_count(state.skipped))
        return updates, SkipNotFiniteState(skipped, inner)

    def part_states(self, state: Any) -> tuple[Any, ...]:
        expect_state(self, state, SkipNotFiniteState)
        return (state.inner,)
