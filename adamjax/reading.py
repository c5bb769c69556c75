"""Reading a state: slots, counts, rates, averages, through chains and wrappers, optax's too."""

from typing import Any, TypeVar, overload

import chex
import jax
import jax.numpy as jnp

from adamjax.average import WeightEmaState
from adamjax.buckets import as_tree
from adamjax.data import Tree
from adamjax.guard import SkipNotFiniteState
from adamjax.leaves import expect_array, is_left_alone
from adamjax.paths import flatten, leaf_paths
from adamjax.scaling import scale_by_learning_rate
from adamjax.schedule import rate_at
from adamjax.structure import find, slot_states
from adamjax.transform import as_transform

__all__ = [
    "averaged_weights",
    "get_slot",
    "learning_rate",
    "skipped_steps",
    "slot_names",
    "step_count",
]

T = TypeVar("T")


def _of_kind(kind: type, state: Any) -> list[Any]:
    """The states of a class anywhere in a state, in order."""

    def wanted(x: Any) -> bool:
        return isinstance(x, kind)

    return [x for x in jax.tree.leaves(state, is_leaf=wanted) if wanted(x)]


def _is_empty(x: Any) -> bool:
    return not jax.tree.leaves(x)


def _merged(what: str, trees: list[Tree]) -> Tree:
    """One tree of several that have no leaf in common, as the parts of a partition have."""
    there = [tree for tree in trees if not _is_empty(tree)]
    if len(there) < 2:
        return there[0] if there else trees[0]
    if jax.tree_util.all_leaves(there):
        raise ValueError(
            f"{what} is kept more than once for the same leaf: read it from the part of the "
            "state that is meant"
        )
    # One level down, where a part may have nothing at all.
    top = there[0]
    return jax.tree.map(lambda *xs: _merged(what, list(xs)), *there, is_leaf=lambda x: x is not top)


def _rule_slots(state: Any) -> tuple[str, ...]:
    # A state that names its slots without saying whose they are is that of a rule.
    return getattr(state, "rule_slots", state.slots)


def slot_names(state: Any) -> tuple[str, ...]:
    """The names that `get_slot` knows for a state, such as `("m", "v")`.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.slot_names(adamjax.amsgrad().init(jnp.zeros(3)))
    ('m', 'v', 'v_max')
    """
    return tuple(dict.fromkeys(name for s in slot_states(state) for name in _rule_slots(s)))


def get_slot(state: Any, name: str) -> Tree:
    """A slot of the rule in a state, through chains, wrappers and partitions.

    Args:
      state: the state of any transform.
      name: `"m"`, `"v"`, `"v_max"` (AMSGrad), `"u"` (Adamax), or a slot of a rule of your own.

    Returns:
      A tree like the parameters, `None` for leaves without this slot.

    Raises:
      KeyError: the state has no such slot; the message lists those it has.
      ValueError: two rules of a chain keep this slot for the same leaf.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.get_slot(adamjax.adam().init({"w": jnp.zeros(2)}), "m")
    {'w': Array([0., 0.], dtype=float32)}
    """
    trees = [as_tree(getattr(s, name)) for s in slot_states(state) if name in _rule_slots(s)]
    if not trees:
        raise KeyError(f"the state has no slot {name!r}; it has {list(slot_names(state))}")
    return _merged(f"slot {name!r}", trees)


def step_count(state: Any) -> chex.Array:
    """The number of steps taken: of the first rule in a state or, without one, of what counts.

    Micro-batches that are being gathered and skipped steps are not counted.

    Returns:
      An int32 scalar, 0 before the first step.

    Raises:
      ValueError: nothing in the state counts steps.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.step_count(adamjax.adam().init(jnp.zeros(3)))
    Array(0, dtype=int32)
    """
    counting = [s for s in slot_states(state) if "count" in s._fields]
    if not counting:
        raise ValueError("nothing in this state counts steps: it has no rule, rate or average")
    return next((s for s in counting if _rule_slots(s)), counting[0]).count


def skipped_steps(state: Any) -> chex.Array:
    """The number of steps that `skip_not_finite` has skipped.

    Returns:
      An int32 scalar; the sum, if there are several.

    Raises:
      ValueError: the state holds no `skip_not_finite`.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.skipped_steps(adamjax.skip_not_finite(adamjax.adam()).init(jnp.zeros(3)))
    Array(0, dtype=int32)
    """
    states = _of_kind(SkipNotFiniteState, state)
    if not states:
        raise ValueError("the state has no skip_not_finite: wrap the optimizer in it to count")
    return sum((s.skipped for s in states[1:]), states[0].skipped)


@overload
def averaged_weights(state: Any, params: None = None) -> Any: ...


@overload
def averaged_weights(state: Any, params: T) -> T: ...


def averaged_weights(state: Any, params: Any = None) -> Any:
    """The average of the weights that `weight_ema` keeps; before the first step the weights.

    Args:
      state: a state with a `weight_ema` anywhere in it.
      params: if given, the result has their dtypes, and their values where there is no average
        (integer leaves, leaves of another part): ready to be used in their place.

    Returns:
      A tree like the parameters, in float32 at least where `params` is not given.

    Raises:
      ValueError: the state holds no `weight_ema`, or one of other parameters.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.chain(adamjax.adam(), adamjax.weight_ema(0.99))
    >>> adamjax.averaged_weights(tx.init({"w": jnp.ones(2)}))
    {'w': Array([1., 1.], dtype=float32)}
    """
    states = _of_kind(WeightEmaState, state)
    if not states:
        raise ValueError("the state has no weight_ema: put one last in the chain")
    average = _merged("the average", [as_tree(s.average) for s in states])
    if params is None:
        return average

    def like(name: str, x: Any, p: Any) -> Any:
        if _is_empty(x) or is_left_alone(p):
            return p
        what = f"averaged_weights: the average of {name!r}"
        expect_array(what, x, jnp.shape(p), "pass the parameters that it is of")
        # A copy: a step may donate both the weights and the state.
        return jnp.array(x, jnp.asarray(p).dtype, copy=True)

    # What has no average may be a whole part of the tree.
    there, structure = jax.tree_util.tree_flatten_with_path(average, is_leaf=_is_empty)
    treedef: Any = structure
    try:
        given = treedef.flatten_up_to(params)
    except ValueError:
        given = None
    if given is None or any(
        not _is_empty(x) and p is not None and not jax.tree_util.all_leaves([p])
        for (_, x), p in zip(there, given, strict=True)
    ):
        raise ValueError(
            f"averaged_weights: params has the leaves {leaf_paths(params)} in a tree like "
            f"{flatten(params)[1]!s:.200}, the average those of {leaf_paths(average)} in one like "
            f"{flatten(average)[1]!s:.200}: pass the parameters that it is of"
        )
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in there]
    pairs = zip(names, there, given, strict=True)
    return treedef.unflatten([like(name, x, p) for name, (_, x), p in pairs])


def learning_rate(tx: Any, state: Any) -> Any:
    """The learning rate that the next step will use.

    Args:
      tx: the transform that made the state.
      state: its state.

    Returns:
      A number or scalar array; a `by_path` with the numbers, if there is one rate a leaf.

    Raises:
      ValueError: there is no `scale_by_learning_rate`, or more than one.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.adam(adamjax.cosine_decay(0.5, decay_steps=100))
    >>> float(adamjax.learning_rate(tx, tx.init(jnp.zeros(3))))
    0.5
    """
    scalings = find(scale_by_learning_rate, as_transform(tx), state)
    if len(scalings) != 1:
        raise ValueError(
            f"expected one scale_by_learning_rate, there are {len(scalings)} in {tx!r}; call "
            "learning_rate with the part that is meant and its state"
        )
    ((scaling, own, _),) = scalings
    scaling.check_state(own)
    return rate_at(scaling.learning_rate, own.count)
