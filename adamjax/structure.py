"""The parts of a transform, their states, and the parameters that each part sees.

This module walks two kinds of trees. A transform may contain other transforms, as `chain` and
`masked` do; `walk` and `find` go through them. A state may contain trees with one array for each
parameter, as Adam's moments are; a state names these fields in `slots`, and `slot_states` and
`map_slots` find them. All code that reads, converts, shards or checks a state uses only the
functions of this module, so it also works for transforms that users write.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from adamjax.buckets import Bucketed, is_bucketed
from adamjax.data import Tree
from adamjax.paths import flatten

__all__ = [
    "Part",
    "find",
    "map_like_params",
    "map_slots",
    "named_slots",
    "replace_parts",
    "rule_slots",
    "slot_states",
    "states_of_class",
    "walk",
]


class Part(NamedTuple):
    """A transform, its state, and the parameters that it sees.

    Attributes:
      tx: the transform.
      state: its state; `None` if not known.
      params: these parameters, with `None` in place of each leaf that it does not see; `None` if
        not known.
    """

    tx: Any
    state: Any
    params: Tree


def walk(tx: Any, state: Any = None, params: Tree = None) -> Iterator[Part]:
    """A transform and all its parts at any depth, in the order of a gradient's route."""
    yield Part(tx, state, params)
    for part in tx.children(state, params):
        yield from walk(*part)


def find(classes: Any, tx: Any, state: Any = None, params: Tree = None) -> list[Part]:
    """The parts that `walk` yields whose transforms are of these classes."""
    return [part for part in walk(tx, state, params) if isinstance(part.tx, classes)]


def replace_parts(tx: Any, function: Callable[[Any], Any]) -> Any:
    """The transform with `function` applied to each of its parts, innermost first, and then to it.

    If `function` changes nothing, the result is the same object. The new transform is not checked.
    """
    parts = tx.parts
    new = [replace_parts(part, function) for part in parts]
    if any(a is not b for a, b in zip(parts, new, strict=True)):
        tx = tx.with_parts(new)
    return function(tx)


def states_of_class(cls: type, state: Any) -> list[Any]:
    """The states of a class anywhere in a state, in order."""

    def is_of_class(x: Any) -> bool:
        return isinstance(x, cls)

    return [x for x in jax.tree.leaves(state, is_leaf=is_of_class) if is_of_class(x)]


def _names_slots(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "slots")


def slot_states(state: Any) -> Iterator[Any]:
    """The states that name their slots, at any depth, inner states before outer ones."""
    for x in jax.tree.leaves(state, is_leaf=_names_slots):
        if _names_slots(x):
            for name in x._fields:
                if name not in x.slots:
                    yield from slot_states(getattr(x, name))
            yield x


def rule_slots(x: Any) -> tuple[str, ...]:
    """The names of the slots of a rule's state; `()` for anything else."""
    # A user's state may have `slots` without `rule_slots`. Then it counts as a rule's state.
    return getattr(x, "rule_slots", getattr(x, "slots", ())) if isinstance(x, tuple) else ()


def map_slots(function: Callable[..., Tree], state: Any, *rest: Any) -> Any:
    """The state with `function(name, slot, *slots_of_rest)` in place of each of its slots.

    `rest` are states of the same structure; their slots are further arguments of the function.
    A slot that `grouped` stores in buckets is not like the parameters, so it stays as it is.
    """

    def mapped(x: Any, *others: Any) -> Any:
        if not _names_slots(x):
            return x
        fields = {}
        for name in x._fields:
            value, *values_of_rest = (getattr(s, name) for s in (x, *others))
            if name not in x.slots:
                fields[name] = map_slots(function, value, *values_of_rest)
            elif not is_bucketed(value):
                fields[name] = function(name, value, *values_of_rest)
        return x._replace(**fields)

    return jax.tree.map(mapped, state, *rest, is_leaf=_names_slots)


def named_slots(state: Any) -> list[tuple[str, Tree]]:
    """Pairs (name, slot) of a state: the slots that `map_slots` maps, in the same order."""
    slots: list[tuple[str, Tree]] = []

    def collect(name: str, slot: Tree) -> Tree:
        slots.append((name, slot))
        return slot

    map_slots(collect, state)
    return slots


def map_like_params(
    params: Tree,
    on_slots: Callable[[Tree], Tree],
    on_others: Callable[[Any], Any],
    state: Any,
    stop: Callable[[Any], bool] = lambda _: False,
) -> Any:
    """The state with a function applied to each tree in it that has the parameters' structure.

    Unlike `map_slots` it finds such trees in the states of other libraries too, which do not name
    their slots.

    Args:
      on_slots: the function for such a tree.
      on_others: the function for everything else: for leaves, and for nodes at which `stop` is
        true.
      stop: a predicate of a node: if it is true, the node is not searched for such trees.
    """
    treedef = flatten(params)[1]

    def is_like_params(x: Any) -> bool:
        return not stop(x) and bool(flatten(x)[1] == treedef)

    def mapped(x: Any) -> Any:
        if isinstance(x, Bucketed):
            return mapped_buckets(x)
        return on_slots(x) if is_like_params(x) else on_others(x)

    def mapped_buckets(x: Bucketed) -> Bucketed:
        # A bucket does not have the shape of a parameter, so it goes to `on_others`. A leaf outside
        # of the buckets has it, so `on_slots` gets a tree with only these leaves.
        leaves: list[Any] = [None] * len(x.plan.avals)
        for i, leaf in zip(x.plan.alone, x.alone, strict=True):
            leaves[i] = leaf
        new_leaves = flatten(on_slots(treedef.unflatten(leaves)))[0]
        alone = tuple(new_leaves[i] for i in x.plan.alone)
        return Bucketed(tuple(map(on_others, x.buckets)), alone, x.plan)

    def is_leaf(x: Any) -> bool:
        return isinstance(x, Bucketed) or stop(x) or is_like_params(x)

    return jax.tree.map(mapped, state, is_leaf=is_leaf)
