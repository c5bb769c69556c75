"""Small leaves joined into flat buckets: an optimizer's step over thousands of them, for less.

What a step over thousands of small leaves costs is not arithmetic. Each array that goes into or
comes out of a jitted function costs microseconds, and so does each loop that writes one. So the
state of small leaves is kept joined, and only parameters and gradients stay apart.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from adamjax.buckets import Plan, as_tree, is_joined
from adamjax.data import Tree, static
from adamjax.leaves import dtype_of, expect_like, is_arraylike, is_left_alone, matched
from adamjax.paths import flatten, leaf_paths
from adamjax.rows import RowGradient
from adamjax.structure import map_slots
from adamjax.transform import Step, Transform, as_transform

__all__ = ["grouped"]

# Leaves of a bucket at most. XLA's time to compile a concatenation grows with the square of its
# operands, and a few more buckets cost next to nothing.
_LEAVES = 32


def _can_be_joined(leaf: Any, max_size: int) -> bool:
    if not is_arraylike(leaf) or isinstance(leaf, RowGradient) or is_left_alone(leaf):
        return False
    if isinstance(leaf, jax.core.Tracer):
        return bool(leaf.size <= max_size)
    # A bucket of leaves that lie in pieces on several devices would have to be gathered.
    sharding = getattr(leaf, "sharding", None)
    whole = sharding is None or sharding.is_fully_replicated
    return bool(np.size(leaf) <= max_size and whole)


def _planned(tree: Tree, max_size: int) -> Plan:
    leaves, treedef = flatten(tree)
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if _can_be_joined(leaf, max_size):
            groups.setdefault(dtype_of(leaf), []).append(i)
    buckets = []
    for found in groups.values():
        # Buckets of the same sizes share their code: compiled once.
        found.sort(key=lambda i: (np.size(leaves[i]), np.shape(leaves[i])))
        starts = range(0, len(found), _LEAVES)
        buckets += [tuple(found[start : start + _LEAVES]) for start in starts]
    avals = tuple((np.shape(x), dtype_of(x)) if is_arraylike(x) else None for x in leaves)
    return Plan(treedef, avals, tuple(bucket for bucket in buckets if len(bucket) > 1))


def _plan_of(state: Any) -> Plan | None:
    """The plan by which a state is joined; one that keeps no tree has none."""
    found = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_joined)[0]
    joined = [(path, x) for path, x in found if is_joined(x)]
    for path, x in joined:
        x.expect_whole(jax.tree_util.keystr(path[-1:], simple=True))
    return joined[0][1].plan if joined else None


def _seen_in(plan: Plan, params: Tree) -> Plan:
    """The plan for a tree of the same leaves: nnx.Optimizer unwraps its variables after `init`."""
    treedef = flatten(params)[1]
    if params is None or treedef == plan.treedef or leaf_paths(params) != leaf_paths(plan.like):
        return plan
    return Plan(treedef, plan.avals, plan.buckets)


def _by_plan(state: Any, plan: Plan) -> Any:
    """The state with its trees joined by another plan."""

    def one(x: Any) -> Any:
        return plan.join(x.leaves()) if is_joined(x) and x.plan is not plan else x

    return jax.tree.map(one, state, is_leaf=is_joined)


def _is_ready(leaves: list[Any]) -> bool:
    """Whether leaves can be joined as they came: all are there, arrays of one dtype."""
    if any(isinstance(x, RowGradient) or is_left_alone(x) for x in leaves):
        return False
    return len({dtype_of(x) for x in leaves}) == 1


def _ungroupable(tx: Transform) -> Iterator[Transform]:
    """The innermost parts of a transform that cannot be grouped."""
    if not tx.groupable:
        inner = [part for child in tx.parts for part in _ungroupable(child)]
        yield from inner or [tx]


class grouped(Transform):
    """Applies a transform with small leaves joined, a faster step where there are thousands.

    The result is that of `tx`, but for the order in which a global norm is summed. Leaves of one
    dtype and at most `max_size` elements are joined end to end, up to 32 to a bucket; the state
    keeps them joined, so a step has that many fewer arrays to take, write and return. Gradients
    and updates are trees as always. With 2,000 leaves of at most 256 elements, a step on CPU
    takes less than half the time; the larger the leaves, the less there is to gain.

    A gradient that is `None`, a `RowGradient`, or of another dtype than those beside it takes the
    bucket of its leaf apart in that step: right, but slower. A leaf that `init` sees to lie in
    pieces on several devices is never joined; `init` within `jit` sees no shardings, so there
    joined leaves must be replicated, or each step gathers them.

    Args:
      tx: a transform that treats all elements alike: rules, scalings, decay, `clip_by_value`,
        `clip_by_global_norm`, `weight_ema`, chains and guards of these, and transforms of your
        own whose attribute `groupable` says so. What depends on a leaf's path or on a leaf as a
        whole stays outside: `chain(clip_by_norm(1.0), grouped(scale_by_adam()), ...)`,
        `accumulate_gradients(grouped(adam(0.1)), 4, max_rows=64)`, or
        `partition([("bias$", grouped(adam(0.1)))], default=grouped(adamw(0.1)))`.
      max_size: elements of the largest leaf that is joined, a whole number of at least 1.

    The state is that of `tx`, with a `Joined` for each tree like the parameters.

    Raises:
      ValueError: something in `tx` does not treat all elements alike; the message names it.

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
        # Part of the structure: no array.
        whole = isinstance(self.max_size, int) and not isinstance(self.max_size, bool)
        if not whole or self.max_size < 1:
            raise ValueError(
                "grouped: max_size must be a whole number of at least 1, an int, got "
                f"{self.max_size!r}"
            )
        for part in _ungroupable(self.tx):
            raise ValueError(
                f"grouped: {part!r} cannot take leaves that are joined, as what it does to an "
                "element may depend on the leaf's path or on the leaf as a whole. Leave it outside "
                "of grouped: in the chain around it, or with grouped inside of masked or partition"
                " (a transform of your own says `groupable = True` if it treats all elements alike)"
            )

    def init(self, params: Tree) -> Any:
        plan = _planned(params, self.max_size)
        return self.tx.init(plan.join(flatten(params)[0]))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        plan, like_name = _plan_of(state), "the state"
        if plan is None:
            self._expect_joined(state)
            like, like_name = (updates, "grads") if params is None else (params, "params")
            plan = _planned(like, self.max_size)
        kept, plan = plan, _seen_in(plan, params)
        leaves = matched("grouped", "grads", updates, plan.like, like_name)
        columns = [leaves]
        if params is not None:
            beside = matched("grouped", "params", params, plan.like, like_name, grads=leaves)
            columns.append(beside)

        broken = [
            i
            for i, bucket in enumerate(plan.buckets)
            if not all(_is_ready([column[j] for j in bucket]) for column in columns)
        ]
        now = plan.without(broken)
        updates, new_state = self.tx.update(
            *(now.join(leaves), _by_plan(state, now), *map(now.join, columns[1:])), **extra_args
        )
        return as_tree(updates), _by_plan(new_state, kept)

    def _expect_joined(self, state: Any) -> None:
        """Refuses a state of the inner transform, where that has slots."""

        def refuse(name: str, tree: Tree) -> Tree:
            raise ValueError(
                f"grouped: the state's {name} is not joined, it is one of {self.tx!r}: go on with "
                "tx.join(state, params)"
            )

        map_slots(refuse, state)

    def join(self, state: Any, params: Tree) -> Any:
        """The state that goes on from one of `tx` alone, such as one from a checkpoint.

        Args:
          state: a state of `tx`, which is not joined.
          params: the parameters that it is of.

        Raises:
          ValueError: the state is none of `tx` for these parameters; the message names the leaf.

        >>> import adamjax, jax.numpy as jnp
        >>> tx, params = adamjax.grouped(adamjax.adam()), [jnp.ones(2), jnp.ones(3)]
        >>> tx.join(tx.tx.init(params), params)[0].m.joined
        (Array([0., 0., 0., 0., 0.], dtype=float32),)
        """
        expected = jax.eval_shape(self.tx.init, params)
        mend = f"pass a state of {self.tx!r} for these parameters"
        expect_like("grouped.join", "state", state, expected, mend)
        plan = _planned(params, self.max_size)

        def one(like: Any, x: Any) -> Any:
            return plan.join(flatten(x)[0]) if is_joined(like) else x

        return jax.tree.map(one, jax.eval_shape(self.init, params), state, is_leaf=is_joined)

    def split(self, state: Any) -> Any:
        """The state of `tx` alone that goes on from a state: each tree like the parameters.

        >>> import adamjax, jax.numpy as jnp
        >>> tx, params = adamjax.grouped(adamjax.adam()), [jnp.ones(2), jnp.ones(3)]
        >>> tx.split(tx.init(params))[0].m
        [Array([0., 0.], dtype=float32), Array([0., 0., 0.], dtype=float32)]
        """
        return jax.tree.map(as_tree, state, is_leaf=is_joined)
