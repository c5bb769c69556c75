"""Reads slots, counts, rates and weights from a state, also inside optax's wrappers."""

from typing import Any, TypeVar, overload

import chex
import jax
import jax.numpy as jnp

from adamjax.average import WeightEmaState
from adamjax.buckets import as_tree
from adamjax.data import Tree
from adamjax.encoding import Scaled8, decode
from adamjax.exact.state import ExactRowsState, expect_flushed
from adamjax.guard import SkipNotFiniteState
from adamjax.leaves import expect_array, is_left_alone
from adamjax.master import MasterWeightsState
from adamjax.paths import flatten, is_leaf, leaf_paths
from adamjax.scaling import scale_by_learning_rate
from adamjax.schedule import rate_at
from adamjax.structure import find, rule_slots, slot_states, states_of_class
from adamjax.transform import as_transform, short_repr

__all__ = [
    "averaged_weights",
    "float32_weights",
    "get_slot",
    "learning_rate",
    "skipped_steps",
    "slot_names",
    "step_count",
]

T = TypeVar("T")


def _expect_all_flushed(owner: str, state: Any) -> None:
    for exact in states_of_class(ExactRowsState, state):
        expect_flushed(owner, exact)


def _is_empty(x: Any) -> bool:
    return not jax.tree.leaves(x)


def _merge(what: str, trees: list[Tree]) -> Tree:
    """Merges trees without a common leaf, such as those of the parts of a partition."""
    non_empty = [tree for tree in trees if not _is_empty(tree)]
    if len(non_empty) < 2:
        return non_empty[0] if non_empty else trees[0]
    if jax.tree_util.all_leaves(non_empty):
        raise ValueError(
            f"the state has {what} more than once for the same leaf: read it from the part of the "
            "state that you mean"
        )
    # `is_leaf` makes a leaf of every node but the top, so `tree.map` goes down by one level. Some
    # of the subtrees there may be empty.
    top = non_empty[0]
    return jax.tree.map(
        lambda *xs: _merge(what, list(xs)), *non_empty, is_leaf=lambda x: x is not top
    )


def slot_names(state: Any) -> tuple[str, ...]:
    """The names of slots that `get_slot` accepts for a state, such as `("m", "v")`.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.slot_names(adamjax.amsgrad().init(jnp.zeros(3)))
    ('m', 'v', 'v_max')
    """
    return tuple(dict.fromkeys(name for s in slot_states(state) for name in rule_slots(s)))


def get_slot(state: Any, name: str) -> Tree:
    """A slot of the rule in a state, through chains, wrappers and partitions.

    Under `exact_rows` rows may lag behind. Then this is refused: call `flush` first, or read
    `state.inner`, whose slots of tables lag behind. Within `jit` adamjax cannot detect this.

    Args:
      state: the state of any transform.
      name: `"m"`, `"v"`, `"v_max"` (AMSGrad), `"u"` (Adamax), or a slot of a rule of your own.

    Returns:
      A tree like the parameters, `None` for leaves without this slot. Slots that are stored in 8
      bits are returned as float32.

    Raises:
      KeyError: the state has no such slot; the error lists the slots that it has.
      ValueError: two rules of a chain have this slot for the same leaf, or rows lag behind.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.get_slot(adamjax.adam().init({"w": jnp.zeros(2)}), "m")
    {'w': Array([0., 0.], dtype=float32)}
    """
    _expect_all_flushed("get_slot", state)
    slots = [as_tree(getattr(s, name)) for s in slot_states(state) if name in rule_slots(s)]
    if not slots:
        raise KeyError(f"the state has no slot {name!r}; it has {list(slot_names(state))}")
    return _merge(f"slot {name!r}", [jax.tree.map(_decoded, x, is_leaf=is_leaf) for x in slots])


def _decoded(x: Any) -> Any:
    return decode(x) if isinstance(x, Scaled8) else x


def step_count(state: Any) -> chex.Array:
    """The number of steps taken: the count of the first rule, or else of the first rate or average.

    Skipped steps and micro-batches of an unfinished step are not counted.

    Returns:
      An int32 scalar, 0 before the first step.

    Raises:
      ValueError: nothing in the state counts steps.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.step_count(adamjax.adam().init(jnp.zeros(3)))
    Array(0, dtype=int32)
    """
    with_count = [s for s in slot_states(state) if "count" in s._fields]
    if not with_count:
        raise ValueError("nothing in this state counts steps: it has no rule, rate or average")
    return next((s for s in with_count if rule_slots(s)), with_count[0]).count


def skipped_steps(state: Any) -> chex.Array:
    """The number of steps that `skip_not_finite` has skipped.

    Returns:
      An int32 scalar; the sum, if the state has several `skip_not_finite`.

    Raises:
      ValueError: the state has no `skip_not_finite`.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.skipped_steps(adamjax.skip_not_finite(adamjax.adam()).init(jnp.zeros(3)))
    Array(0, dtype=int32)
    """
    states = states_of_class(SkipNotFiniteState, state)
    if not states:
        raise ValueError("the state has no skip_not_finite: wrap the optimizer in it to count")
    return sum((s.skipped for s in states[1:]), states[0].skipped)


@overload
def averaged_weights(state: Any, params: None = None) -> Any: ...


@overload
def averaged_weights(state: Any, params: T) -> T: ...


def averaged_weights(state: Any, params: Any = None) -> Any:
    """The average of `weight_ema`; before the first step, the weights.

    Under `exact_rows` rows may lag behind. Then this is refused: call `flush` first, or use
    `eval_step(averaged=True)`. Within `jit` adamjax cannot detect this, so call `flush` there too.

    Args:
      state: a state with a `weight_ema` anywhere in it.
      params: if given, the result can be used in their place: it has their dtypes, and their values
        for leaves without an average (integer leaves, and leaves that a mask or `partition` keeps
        from `weight_ema`).

    Returns:
      A tree like the parameters, in float32 or wider if `params` is not given.

    Raises:
      ValueError: the state has no `weight_ema`, or one for other parameters; or rows lag behind.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.chain(adamjax.adam(), adamjax.weight_ema(0.99))
    >>> adamjax.averaged_weights(tx.init({"w": jnp.ones(2)}))
    {'w': Array([1., 1.], dtype=float32)}
    """
    _expect_all_flushed("averaged_weights", state)
    return unchecked_averaged_weights(state, params)


def unchecked_averaged_weights(state: Any, params: Any = None) -> Any:
    """`averaged_weights`, but rows may lag behind: the caller must bring them up to date itself."""
    states = states_of_class(WeightEmaState, state)
    if not states:
        raise ValueError("the state has no weight_ema: put one last in the chain")
    average = _merge("the average", [as_tree(s.average) for s in states])
    if params is None:
        return average

    def averaged_or_own(name: str, x: Any, p: Any) -> Any:
        if _is_empty(x) or is_left_alone(p):
            return p
        what = f"averaged_weights: the average of {name!r}"
        expect_array(what, x, jnp.shape(p), "pass the parameters that were averaged")
        # A copy: a step may donate both the weights and the state.
        return jnp.array(x, jnp.asarray(p).dtype, copy=True)

    def average_fits(x: Any, subtree: Any) -> bool:
        # An empty average fits any subtree.
        return _is_empty(x) or subtree is None or jax.tree_util.all_leaves([subtree])

    # A whole subtree may have no average; it counts as one empty leaf.
    flattened: Any = jax.tree_util.tree_flatten_with_path(average, is_leaf=_is_empty)
    averages_with_paths, treedef = flattened
    averages = [x for _, x in averages_with_paths]
    try:
        subtrees = treedef.flatten_up_to(params)
    except ValueError:
        subtrees = None
    if subtrees is None or not all(map(average_fits, averages, subtrees)):
        raise ValueError(
            f"averaged_weights: params has the leaves {leaf_paths(params)} in a tree like "
            f"{flatten(params)[1]!s:.200}, but the average has the leaves {leaf_paths(average)} in "
            f"a tree like {flatten(average)[1]!s:.200}: pass the parameters that were averaged"
        )
    paths = [path for path, _ in averages_with_paths]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return treedef.unflatten(map(averaged_or_own, names, averages, subtrees))


def float32_weights(state: Any, params: T) -> T:
    """The parameters, with the float32 weights of `master_weights` in place of narrow ones.

    Under `exact_rows` rows may lag behind. Then this is refused: call `flush` first.

    Args:
      state: a state with a `master_weights` anywhere in it.
      params: the parameters.

    Returns:
      A tree like `params`: a copy of the state's weight for each leaf that has one there, and the
      parameter itself for the others.

    Raises:
      ValueError: the state has no `master_weights`, or one for other parameters; or rows lag
        behind.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.master_weights(adamjax.adam(0.001))
    >>> params = {"w": jnp.ones(1, jnp.bfloat16)}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> adamjax.apply_updates(params, updates), adamjax.float32_weights(state, params)
    ({'w': Array([1], dtype=bfloat16)}, {'w': Array([0.999], dtype=float32)})
    """
    _expect_all_flushed("float32_weights", state)
    states = states_of_class(MasterWeightsState, state)
    if not states:
        raise ValueError(
            "float32_weights: the state has no master_weights: wrap the optimizer in it, or use "
            "the parameters themselves"
        )
    leaves, treedef = flatten(params)
    advice = "pass the parameters that belong to the state"
    for weights, weights_treedef in (flatten(s.weights) for s in states):
        if weights_treedef != treedef:
            raise ValueError(
                f"float32_weights: params has the leaves {leaf_paths(params)}, and the state has "
                f"weights in a tree like {weights_treedef!s:.200}: {advice}"
            )
        for i, w in enumerate(weights):
            if w is not None:
                what = f"float32_weights: the weight of {leaf_paths(params)[i]!r}"
                expect_array(what, w, jnp.shape(leaves[i]), advice)
                # A copy: a step may donate the state.
                leaves[i] = jnp.array(w, copy=True)
    return treedef.unflatten(leaves)


def learning_rate(tx: Any, state: Any) -> Any:
    """The learning rate that the next step will use.

    A `scale` in the same chain multiplies the step as well; its factor is not in this number.

    Args:
      tx: the transform that made the state.
      state: its state.

    Returns:
      A number or scalar array. If leaves have different rates, a `by_path` with these rates; its
      method `at(path)` returns the rate of one leaf.

    Raises:
      ValueError: `tx` has no `scale_by_learning_rate`, or several.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.adam(adamjax.cosine_decay(0.5, decay_steps=100))
    >>> float(adamjax.learning_rate(tx, tx.init(jnp.zeros(3))))
    0.5
    """
    scalings = find(scale_by_learning_rate, as_transform(tx), state)
    if len(scalings) != 1:
        raise ValueError(
            f"expected one scale_by_learning_rate, there are {len(scalings)} in "
            f"{short_repr(tx)}; call learning_rate with the part that you mean and its state"
        )
    ((scaling, own_state, _),) = scalings
    scaling.check_state(own_state)
    return rate_at(scaling.learning_rate, own_state.count)
