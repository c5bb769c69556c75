"""Steps that are taken only when it is time, or only when the gradients are sound."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import COUNT, Number, Tree, is_array, static, transform_state
from adamjax.leaves import at_rest, expect_wide, is_left_alone, lift, new_slots, no_scalars, reduced
from adamjax.moments import accumulator, as_count, next_count, widened
from adamjax.paths import (
    checked_rules,
    expect_matches,
    expect_present,
    first_match,
    flatten,
    is_leaf,
    leaf_paths,
)
from adamjax.rows import RowGradient, parts, sealed, unsealed, whole
from adamjax.transform import Step, Transform, as_transform, expect_state

__all__ = [
    "AccumulateGradientsState",
    "SkipNotFiniteState",
    "accumulate_gradients",
    "skip_not_finite",
]


def _conditional(
    due: chex.Array, step: Callable[[Tree], Step], grads: Tree, state: Any, wide: bool
) -> Step:
    """`step(grads)` where `due`, else zero updates and the state as it is.

    The step sees `None` for float0, which no branch of a `cond` can return.

    Args:
      wide: whether updates stay wider than the gradients; else they are cast to their dtypes.
    """
    leaves, treedef = flatten(grads)
    passed = [g is None or getattr(g, "dtype", None) == jax.dtypes.float0 for g in leaves]
    pairs = list(zip(leaves, passed, strict=True))
    alive = treedef.unflatten(
        [
            None if rests else g if isinstance(g, RowGradient) else jnp.asarray(g)
            for g, rests in pairs
        ]
    )

    def taken() -> Step:
        updates, new_state = step(alive)
        # Seals that come out of a `cond` would be traced, and have to be compared.

        def result(g: Any, u: Any) -> Any:
            return unsealed(u if wide else u.astype(g.dtype))

        return _each_leaf(result, alive, updates), new_state

    def rested() -> Step:
        # Updates may have other leaves than the gradients: all rows of a table may move.
        return _each_leaf(_still, jax.eval_shape(taken)[0]), state

    updates, state = jax.lax.cond(due, taken, rested)
    moves = zip(flatten(updates)[0], pairs, strict=True)
    return treedef.unflatten([g if rests else sealed(u) for u, (g, rests) in moves]), state


def _each_leaf(function: Callable[..., Any], *trees: Tree) -> Any:
    """A function of leaves mapped over trees, `None` left as it is."""

    def alive(*leaves: Any) -> Any:
        return None if leaves[0] is None else function(*leaves)

    return jax.tree.map(alive, *trees, is_leaf=is_leaf)


def _still(shape: Any) -> Any:
    """The update of this shape that moves nothing."""
    return at_rest(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape))


@transform_state()
class AccumulateGradientsState(NamedTuple):
    """State of `accumulate_gradients`.

    Attributes:
      micro_count: int32, the micro-batches taken in since the last step.
      total: tree like the parameters, the sum of their gradients, in float32 at least.
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
    if not isinstance(total, RowGradient):
        return g, total + g.astype(total.dtype)
    if not isinstance(g, RowGradient):
        raise ValueError(
            f"accumulate_gradients: max_rows makes room for row gradients of this table of shape "
            f"{total.shape}, but a dense one came; leave the table out of max_rows"
        )
    room, found = total.indices.size, total + g.astype(total.dtype)
    full = jnp.any(found.indices[room:] < found.num_rows)
    # Rows that have no place cannot be left out unseen.
    values = jnp.where(full, jnp.nan, found.values[:room])
    return g, found.replace(indices=found.indices[:room], values=values)


class accumulate_gradients(Transform):
    """Takes a step of `tx` every `steps` calls, with the mean of the gradients of these calls.

    In the calls between, updates are zero and nothing of `tx` moves: neither moments, counts and
    schedules nor decay and average. The mean reaches `tx` in float32 at least. A leaf whose
    gradient is `None` in a call is left alone in that call, also where that is the real step:
    what it has gathered then waits for the next one, where each gradient still counts one part in
    the calls of a step.

    Row gradients are gathered in a dense array, unless `max_rows` says how many distinct rows of
    a table at most are touched in a step; the step then gets a row gradient. Should there be
    more, the gradient of the rows becomes NaN: the fault is seen, and `skip_not_finite` inside
    can tell.

    Args:
      tx: the transform that takes the steps, usually a whole optimizer.
      steps: micro-batches a step, a whole number of at least 1. (Of an array that is traced or
        set, a value below 1 makes NaN of the mean.)
      max_rows: pairs (pattern, rows), or a dictionary {pattern: rows}, for tables that get row
        gradients; each pattern must match a leaf, as in `by_path`. Or a number, for every leaf of
        two or more dimensions that has more rows than that.

    The state is an `AccumulateGradientsState`.

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

    @property
    def groupable(self) -> bool:
        # Which leaves have room for rows depends on their shapes and paths.
        return self.max_rows is None and super().groupable

    def __post_init__(self) -> None:
        self.set_fields(tx=as_transform(self.tx))
        self.check_range("steps", COUNT)
        if self.max_rows is None:
            return
        rules: Any = self.max_rows
        wrong = False
        if isinstance(rules, list | tuple | Mapping):
            rules = tuple(checked_rules("accumulate_gradients: max_rows", rules))
            wrong = not rules
        try:
            if isinstance(rules, tuple):
                rules = tuple((pattern, whole("", rows)) for pattern, rows in rules)
            else:
                rules = whole("", rules)
        except ValueError:
            wrong = True
        if wrong:
            raise ValueError(
                f"accumulate_gradients: max_rows must be a whole number of at least 1, or "
                f"pairs (pattern, number) or a dictionary of them; got {self.max_rows!r}"
            )
        self.set_fields(max_rows=rules)

    def _room(self, path: str, p: Any) -> int | None:
        """The rows to make room for in a leaf, `None` for a dense array."""
        rows: int | None
        if self.max_rows is None or np.ndim(p) == 0:
            return None
        if isinstance(self.max_rows, int):
            rows = self.max_rows if np.ndim(p) > 1 else None
        else:
            found = first_match([pattern for pattern, _ in self.max_rows], path)
            rows = None if found is None else self.max_rows[found][1]
        return rows if rows is not None and rows < np.shape(p)[0] else None

    def _expect_room(self, total: Tree) -> None:
        """Refuses a state that makes room for other rows."""
        paths = leaf_paths(total)
        if isinstance(self.max_rows, tuple):
            patterns = [pattern for pattern, _ in self.max_rows]
            expect_present("accumulate_gradients: max_rows", patterns, total, paths)
        for path, x in zip(paths, flatten(total)[0], strict=True):
            came = x.indices.size if isinstance(x, RowGradient) else None
            room = None if x is None else self._room(path, x)
            if came != room:
                raise ValueError(
                    f"accumulate_gradients: the state gathers {path!r} in "
                    f"{'a dense array' if came is None else f'{came} rows'}, expected "
                    f"{'a dense array' if room is None else f'{room} rows'} by max_rows="
                    f"{self.max_rows!r}: build it as it was, or put the state's inner into a new "
                    "one from init after a whole step"
                )

    def init(self, params: Tree) -> AccumulateGradientsState:
        if isinstance(self.max_rows, tuple):
            patterns = [pattern for pattern, _ in self.max_rows]
            expect_matches("accumulate_gradients: max_rows", patterns, params, first_decides=True)

        def empty(p: chex.Array) -> chex.Array:
            return jnp.zeros_like(p, widened(p.dtype, accumulator(p.dtype)))

        total, treedef = flatten(new_slots(params, empty))
        for i, path in enumerate(leaf_paths(params)):
            x = total[i]
            rows = None if x is None else self._room(path, x)
            if rows is not None:
                ids = jnp.full(rows, x.shape[0], jnp.int32)
                values = jnp.zeros((rows, *x.shape[1:]), x.dtype)
                total[i] = RowGradient(ids, values, num_rows=x.shape[0], seal=None)
        total = treedef.unflatten(total)
        return AccumulateGradientsState(jnp.zeros((), jnp.int32), total, self.tx.init(params))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_state(self, state, AccumulateGradientsState)
        expect_wide("accumulate_gradients", "total", state.total)
        self._expect_room(state.total)
        slots = (state.total,)
        _, total = lift("accumulate_gradients", _add, no_scalars, updates, slots, rows="whole")
        count = state.micro_count + 1
        steps = as_count("accumulate_gradients: steps", self.steps, count.dtype)
        due = count >= steps

        def step(alive: Tree) -> Step:
            def mean(g: Any, x: Any) -> Any:
                if is_left_alone(g):
                    return g
                # Not by `steps`, which may be another one since the first of these calls.
                calls = count.astype(accumulator(x.dtype))
                if is_array(self.steps):
                    calls = jnp.where(steps >= 1, calls, jnp.nan)
                x = sealed(x / calls)
                return x.astype(g.dtype) if self.tx.has_foreign else x

            def emptied(g: Any, x: Any) -> Any:
                return x if is_left_alone(g) else at_rest(x)

            means = jax.tree.map(mean, alive, total, is_leaf=is_leaf)
            updates, inner = self.tx.update(means, state.inner, params, **extra_args)
            rest = jax.tree.map(emptied, alive, total, is_leaf=is_leaf)
            return updates, (rest, inner)

        updates, (total, inner) = _conditional(
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
      skipped: int32, the steps that were skipped; it stays at the largest int32.
      inner: the state of the inner transform.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.skip_not_finite(adamjax.scale(-1.0))
    >>> tx.update(jnp.array(jnp.nan), tx.init(jnp.array(0.0)))[1].skipped
    Array(1, dtype=int32)
    """

    skipped: chex.Array
    inner: Any


def _all_finite(c: None, g: Any) -> tuple[chex.Array]:
    return (functools.reduce(jnp.logical_and, (jnp.all(jnp.isfinite(x)) for x in parts(g))),)


class skip_not_finite(Transform):
    """Takes the step of `tx` only if every gradient is finite.

    Otherwise updates are zero and nothing changes but a counter, which `skipped_steps` reads.

    Args:
      tx: the transform that takes the steps, usually a whole optimizer.

    The state is a `SkipNotFiniteState`.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.skip_not_finite(adamjax.adam())
    >>> update, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.ones(1)))
    >>> update, adamjax.skipped_steps(state), adamjax.step_count(state)
    (Array([0.], dtype=float32), Array(1, dtype=int32), Array(0, dtype=int32))
    """

    tx: Transform

    def __post_init__(self) -> None:
        self.set_fields(tx=as_transform(self.tx))

    def init(self, params: Tree) -> SkipNotFiniteState:
        return SkipNotFiniteState(jnp.zeros((), jnp.int32), self.tx.init(params))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_state(self, state, SkipNotFiniteState)
        finite = reduced(
            "skip_not_finite", _all_finite, jnp.logical_and, updates, empty=jnp.array(True)
        )

        def step(alive: Tree) -> Step:
            return self.tx.update(alive, state.inner, params, **extra_args)

        updates, inner = _conditional(finite, step, updates, state.inner, self.has_wide_updates)
        skipped = jnp.where(finite, state.skipped, next_count(state.skipped))
        return updates, SkipNotFiniteState(skipped, inner)

    def part_states(self, state: Any) -> tuple[Any, ...]:
        expect_state(self, state, SkipNotFiniteState)
        return (state.inner,)
