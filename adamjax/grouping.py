"""A transform that stores the state of small leaves in flat buckets, for faster steps.

A step over thousands of small leaves spends little time on arithmetic. Each array that goes into or
comes out of a jitted function costs microseconds, and so does each loop that writes an array. So
the state of small leaves is stored in buckets; parameters and gradients are trees as usual.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from adamjax.buckets import Plan, as_tree, is_bucketed
from adamjax.data import Tree, static
from adamjax.encoding import SCALED8, SLOT_DTYPE_FIELDS
from adamjax.leaves import (
    dtype_of,
    expect_like,
    is_arraylike,
    is_left_alone,
    joined_leaves,
    match_leaves,
)
from adamjax.paths import flatten, leaf_paths
from adamjax.rows import RowGradient
from adamjax.structure import map_slots, walk
from adamjax.transform import Step, Transform, as_transform

__all__ = ["grouped"]

# The most leaves of a bucket. XLA's time to compile a concatenation grows with the square of the
# number of its operands, and a few more buckets cost almost nothing.
_MAX_LEAVES = 32


def _fits_bucket(leaf: Any, max_size: int) -> bool:
    if not is_arraylike(leaf) or isinstance(leaf, RowGradient) or is_left_alone(leaf):
        return False
    if isinstance(leaf, jax.core.Tracer):
        return bool(leaf.size <= max_size)
    # A bucket of leaves that are split over devices would have to be gathered.
    sharding = getattr(leaf, "sharding", None)
    is_split = sharding is not None and not sharding.is_fully_replicated
    return bool(np.size(leaf) <= max_size and not is_split)


def _make_plan(tree: Tree, max_size: int) -> Plan:
    leaves, treedef = flatten(tree)
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if _fits_bucket(leaf, max_size):
            groups.setdefault(dtype_of(leaf), []).append(i)
    buckets = []
    for indices in groups.values():
        # Sorted, so that more buckets have the same shapes: these are compiled once.
        indices.sort(key=lambda i: (np.size(leaves[i]), np.shape(leaves[i])))
        starts = range(0, len(indices), _MAX_LEAVES)
        buckets += [tuple(indices[start : start + _MAX_LEAVES]) for start in starts]
    avals = tuple((np.shape(x), dtype_of(x)) if is_arraylike(x) else None for x in leaves)
    return Plan(treedef, avals, tuple(bucket for bucket in buckets if len(bucket) > 1))


def _plan_of(state: Any) -> Plan | None:
    """The plan of the buckets in a state; `None` if the state has no tree in buckets.

    Refuses buckets that do not fit their plan.
    """
    plan = None
    for path, x in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_bucketed)[0]:
        if is_bucketed(x):
            x.expect_whole(jax.tree_util.keystr(path[-1:], simple=True))
            plan = x.plan if plan is None else plan
    return plan


def _with_structure_of(plan: Plan, params: Tree) -> Plan:
    """The plan with the structure of params, if they have the same leaves in other nodes.

    With nnx.Optimizer of Flax, `init` sees Variables, and `update` sees only their arrays.
    """
    if params is None:
        return plan
    treedef = flatten(params)[1]
    if treedef == plan.treedef or leaf_paths(params) != leaf_paths(plan.shape_tree):
        return plan
    return Plan(treedef, plan.avals, plan.buckets)


def _regroup(state: Any, plan: Plan) -> Any:
    """The state with its trees in the buckets of another plan."""

    def regroup(x: Any) -> Any:
        return plan.join(x.leaves()) if is_bucketed(x) and x.plan is not plan else x

    return jax.tree.map(regroup, state, is_leaf=is_bucketed)


def _are_arrays_of_one_dtype(leaves: list[Any]) -> bool:
    """Whether leaves can be concatenated: none is absent or a row gradient, and dtypes agree."""
    if any(isinstance(x, RowGradient) or is_left_alone(x) for x in leaves):
        return False
    return len({dtype_of(x) for x in leaves}) == 1


def _ungroupable(tx: Transform) -> Iterator[Transform]:
    """The innermost of a transform's parts that cannot be grouped."""
    if not tx.groupable:
        inner = [part for child in tx.parts for part in _ungroupable(child)]
        yield from inner or [tx]


class grouped(Transform):
    """Stores small leaves in flat buckets: faster steps for models with thousands of leaves.

    The result is that of `tx`, but a global norm is summed in another order. Leaves of one dtype
    with at most `max_size` elements are stored end to end, up to 32 in a bucket. The state has
    buckets in place of these leaves, so a step reads, writes and returns fewer arrays. Gradients
    and updates are trees as usual. With 2,000 leaves of at most 256 elements, a step on CPU takes
    less than half the time; larger leaves gain less.

    If the gradient of a leaf in a bucket is `None`, a `RowGradient` or of another dtype than the
    other gradients, that step splits the bucket into its leaves: the result is the same, but the
    step is slower.

    If `init` sees that a leaf is split over devices, the leaf never goes into a bucket. Within
    `jit`, `init` sees no shardings: then split leaves go into buckets too, and each step has to
    gather them.

    Args:
      tx: a transform that treats all elements alike: rules, scalings, decay, `clip_by_value`,
        `clip_by_global_norm`, `weight_ema`, chains of these, `skip_not_finite` and
        `accumulate_gradients` around these, and transforms of your own with `groupable = True`.
        Transforms that depend on a leaf's path or on a leaf as a whole stay outside:
        `chain(clip_by_norm(1.0), grouped(scale_by_adam()), ...)`,
        `accumulate_gradients(grouped(adam(0.1)), 4, max_rows=64)`, or
        `partition([("bias$", grouped(adam(0.1)))], default=grouped(adamw(0.1)))`.
      max_size: the most elements of a leaf in a bucket, a whole number of at least 1.

    The state is that of `tx`, with a `Bucketed` for each tree like the parameters.

    Raises:
      ValueError: a part of `tx` does not treat all elements alike; the error names it.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.grouped(adamjax.adam(0.5))
    >>> params = {"bias": jnp.ones(2), "gain": jnp.ones(())}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates["gain"].round(3), adamjax.get_slot(state, "m")["bias"].round(3)
    (Array(-0.5, dtype=float32), Array([0.1, 0.1], dtype=float32))
    """

    tx: Transform
    max_size: int = static(default=4096, kw_only=True)

    groupable = False

    def __post_init__(self) -> None:
        self.set_fields(tx=as_transform(self.tx))
        # `max_size` is part of the structure, so it cannot be an array.
        is_int = isinstance(self.max_size, int) and not isinstance(self.max_size, bool)
        if not is_int or self.max_size < 1:
            raise ValueError(
                "grouped: max_size must be a whole number of at least 1, an int, got "
                f"{self.max_size!r}"
            )
        for part in walk(self.tx):
            names = [name for name in SLOT_DTYPE_FIELDS if getattr(part.tx, name, None) == SCALED8]
            if names:
                raise ValueError(
                    f"grouped: {part.tx!r} keeps moments in {SCALED8!r} ({', '.join(names)}), with "
                    "an exponent for each block, so leaves of one bucket would share exponents: "
                    "keep them in bfloat16, or leave this part outside of grouped"
                )
        ungroupable = next(_ungroupable(self.tx), None)
        if ungroupable is not None:
            raise ValueError(
                f"grouped: {ungroupable!r} cannot take leaves in buckets, because its update of an "
                "element may depend on the leaf's path or on the leaf as a whole. Leave it outside "
                "of grouped: in the chain around it, or with grouped inside masked or partition"
                " (set `groupable = True` in your own transform if it treats all elements alike)"
            )

    def init(self, params: Tree) -> Any:
        plan = _make_plan(params, self.max_size)
        return self.tx.init(plan.join(flatten(params)[0]))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        state_plan, plan_name = self._plan_for(updates, state, params)
        plan = _with_structure_of(state_plan, params)
        like = plan.shape_tree
        leaves = match_leaves("grouped", "grads", updates, like, plan_name)
        inputs = [leaves]
        if params is not None:
            inputs.append(match_leaves("grouped", "params", params, like, plan_name, grads=leaves))

        to_split = [
            i
            for i, bucket in enumerate(plan.buckets)
            if not all(_are_arrays_of_one_dtype([x[j] for j in bucket]) for x in inputs)
        ]
        step_plan = plan.without(to_split)
        grads, *params_if_given = map(step_plan.join, inputs)
        with joined_leaves(bool(step_plan.buckets)):
            new_updates, new_state = self.tx.update(
                grads, _regroup(state, step_plan), *params_if_given, **extra_args
            )
        return as_tree(new_updates), _regroup(new_state, state_plan)

    def _plan_for(self, updates: Tree, state: Any, params: Tree) -> tuple[Plan, str]:
        """The plan of this step, and the name of the tree that it comes from."""
        plan = _plan_of(state)
        if plan is not None:
            return plan, "the state"
        self._expect_buckets(state)
        if params is None:
            return _make_plan(updates, self.max_size), "grads"
        return _make_plan(params, self.max_size), "params"

    def _expect_buckets(self, state: Any) -> None:
        """Refuses a state of the inner transform that has slots, none of them in buckets."""

        # `map_slots` calls this for each slot. A state without slots needs no buckets.
        def refuse(name: str, tree: Tree) -> Tree:
            raise ValueError(
                f"grouped: the state's {name} is not in buckets, so this is a state of "
                f"{self.tx!r}: convert it with tx.join(state, params)"
            )

        map_slots(refuse, state)

    def join(self, state: Any, params: Tree) -> Any:
        """Converts a state of the inner transform, such as a checkpoint's, to one with buckets.

        Args:
          state: a state of the inner transform, without buckets.
          params: the parameters of that state.

        Raises:
          ValueError: the inner transform has no such state for these parameters; the error names
            the leaf.

        >>> import adamjax, jax.numpy as jnp
        >>> tx, params = adamjax.grouped(adamjax.adam()), [jnp.ones(2), jnp.ones(3)]
        >>> tx.join(tx.tx.init(params), params)[0].m.buckets
        (Array([0., 0., 0., 0., 0.], dtype=float32),)
        """
        expected = jax.eval_shape(self.tx.init, params)
        advice = f"pass a state of {self.tx!r} for these parameters"
        expect_like("grouped.join", "state", state, expected, advice)
        plan = _make_plan(params, self.max_size)

        def group(like: Any, x: Any) -> Any:
            return plan.join(flatten(x)[0]) if is_bucketed(like) else x

        return jax.tree.map(group, jax.eval_shape(self.init, params), state, is_leaf=is_bucketed)

    def split(self, state: Any) -> Any:
        """Converts a state with buckets to a state of the inner transform: the inverse of `join`.

        >>> import adamjax, jax.numpy as jnp
        >>> tx, params = adamjax.grouped(adamjax.adam()), [jnp.ones(2), jnp.ones(3)]
        >>> tx.split(tx.init(params))[0].m
        [Array([0., 0.], dtype=float32), Array([0., 0., 0.], dtype=float32)]
        """
        return jax.tree.map(as_tree, state, is_leaf=is_bucketed)
