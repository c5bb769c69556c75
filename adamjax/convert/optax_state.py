"""Reads a state of optax into a `Source`, the form that all systems share."""

from collections.abc import Mapping
from typing import Any

import jax

from adamjax.convert.source import Accumulated, LeafMoments, SkippingTransform, Source
from adamjax.convert.values import (
    SCHEDULE_COUNTS,
    field_names,
    is_container,
    leaves_by_path,
    steps_taken,
)

__all__ = ["read_state", "role_of"]

# The role of each known class of states in optax, by its name, and its fields in each version of
# optax. A class with other fields, or of another package, is unknown.
_STATES: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "ScaleByAdamState": ("rule", (("count", "mu", "nu"),)),
    "ScaleByAmsgradState": ("rule", (("count", "mu", "nu", "nu_max"),)),
    **dict.fromkeys(SCHEDULE_COUNTS, ("count", (("count",),))),
    "InjectHyperparamsState": ("hyperparams", (("count", "hyperparams", "inner_state"),)),
    "InjectStatefulHyperparamsState": (
        "hyperparams",
        (("count", "hyperparams", "hyperparams_states", "inner_state"),),
    ),
    "MultiStepsState": (
        "accumulated",
        (
            ("mini_step", "gradient_step", "inner_opt_state", "acc_grads"),
            ("mini_step", "gradient_step", "inner_opt_state", "acc_grads", "skip_state"),
        ),
    ),
    "ApplyIfFiniteState": (
        "skipped",
        (("notfinite_count", "last_finite", "total_notfinite", "inner_state"),),
    ),
    "MaskedState": ("inner", (("inner_state",),)),
    "PartitionState": ("parts", (("inner_states",),)),
    "MultiTransformState": ("parts", (("inner_states",),)),
}


def role_of(x: Any) -> str | None:
    """The role of a node of an optax state: one of `_STATES`, "items", or `None` if unknown."""
    fields = field_names(x)
    if fields is None:
        return "items" if is_container(x) else None
    if type(x).__module__.split(".")[0] != "optax":
        return None
    role, fields_of_versions = _STATES.get(type(x).__name__, (None, ()))
    return role if fields in fields_of_versions else None


def read_state(owner: str, state: Any) -> Source:
    source = Source(owner)
    _read(state, source)
    return source


def _read(x: Any, source: Source) -> None:
    """Reads a node of an optax state."""
    role = role_of(x)
    if role == "rule":
        _read_rule(x, source)
    elif role == "count":
        source.add_count(steps_taken(source.owner, type(x).__name__, x.count), None)
    elif role == "hyperparams":
        _read(getattr(x, "hyperparams_states", ()), source)
        _read(x.inner_state, source)
    elif role == "accumulated":
        _read_accumulated(x, source)
    elif role == "skipped":
        skipped = steps_taken(source.owner, "total_notfinite", x.total_notfinite)
        num_rules = {path: len(moments_of_leaf) for path, moments_of_leaf in source.moments.items()}
        outer, source.in_skipping = source.in_skipping, True
        _read(x.inner_state, source)
        source.in_skipping = outer
        inside = [
            path
            for path, moments_of_leaf in source.moments.items()
            if len(moments_of_leaf) > num_rules.get(path, 0)
        ]
        source.num_skipped.update(dict.fromkeys(inside, skipped))
        source.skipping_transforms.append(
            SkippingTransform(frozenset(inside), source.in_accumulating)
        )
    elif role == "inner":
        inner = _read_apart(x[0], source)
        _merge(source, inner, leaves=frozenset(inner.moments) or None)
    elif role == "parts":
        _read_parts(x[0], source)
    elif role == "items":
        if isinstance(x, Mapping):
            _read_mapping(x, source)
        else:
            for item in x:
                _read(item, source)
    elif jax.tree.leaves(x):
        if type(x).__module__.split(".")[0] == "adamjax":
            source.doubts.append(
                f"the state of optax contains a {type(x).__name__} of adamjax, which is not "
                "converted: convert a state that optax' own transforms made"
            )
        source.other_states.append(x)


def _read_rule(x: Any, source: Source) -> None:
    names = [name for name in x._fields if name != "count"]
    trees = {name: leaves_by_path(source.owner, getattr(x, name)) for name in names}
    possible_kinds = ("amsgrad",) if "nu_max" in trees else ("adam", "nadam", "adamax")
    count = steps_taken(source.owner, repr(next(iter(trees["mu"]), "no leaf")), x.count)
    for path in trees["mu"]:
        slots = {name: tree[path] for name, tree in trees.items() if path in tree}
        source.add(path, LeafMoments(count, slots, possible_kinds))


def _read_accumulated(x: Any, source: Source) -> None:
    """Reads a state of `MultiSteps` and the state inside it."""
    if jax.tree.leaves(getattr(x, "skip_state", ())):
        source.doubts.append(
            "MultiSteps skips some micro-batches (should_skip_update_fn), and "
            "accumulate_gradients does not: build MultiSteps without should_skip_update_fn, or in "
            "adamjax skip whole steps with skip_not_finite"
        )
    micro = steps_taken(source.owner, "mini_step of MultiSteps", x.mini_step)
    # `acc_grads` has the mean over the micro-batches so far.
    totals = {path: g * micro for path, g in leaves_by_path(source.owner, x.acc_grads).items()}
    source.accumulated.append(Accumulated(micro, totals))
    outer, source.in_accumulating = source.in_accumulating, True
    _read(x.inner_opt_state, source)
    source.in_accumulating = outer


def _read_mapping(x: Mapping[Any, Any], source: Source) -> None:
    """Reads a dictionary, as `named_chain` makes it; JAX loses its order."""
    paths_with_rule: set[str] = set()
    num_others = len(source.other_states)
    for item in _items(x):
        num_rules = {path: len(moments_of_leaf) for path, moments_of_leaf in source.moments.items()}
        _read(item, source)
        new_paths = {
            path
            for path, moments_of_leaf in source.moments.items()
            if len(moments_of_leaf) > num_rules.get(path, 0)
        }
        if new_paths & paths_with_rule:
            source.doubts.append(
                f"the leaf {min(new_paths & paths_with_rule)!r} has several rules in a dictionary "
                f"with the keys {list(x)} (of optax.named_chain), whose order JAX loses: make it a "
                "tuple in the order of the chain, tuple(state[key] for key in keys), and pass an "
                "optax.chain"
            )
        paths_with_rule |= new_paths
    source.other_states_lost_order |= len(source.other_states) > num_others


def _read_parts(x: Mapping[Any, Any], source: Source) -> None:
    """Reads the states of the parts of `multi_transform`, each of which has its own leaves."""
    parts = [_read_apart(part, source) for part in _items(x)]
    with_rules = frozenset(path for part in parts for path in part.moments)
    for part in parts:
        if part.moments:
            _merge(source, part, leaves=frozenset(part.moments))
        else:
            _merge(source, part, leaves=None, excluded=with_rules)
        source.other_states_lost_order |= bool(part.other_states)


def _read_apart(x: Any, source: Source) -> Source:
    """Reads the state of a mask or a part into its own `Source`, for `_merge`."""
    inner = Source(
        source.owner, in_accumulating=source.in_accumulating, in_skipping=source.in_skipping
    )
    _read(x, inner)
    return inner


def _merge(
    source: Source,
    inner: Source,
    leaves: frozenset[str] | None,
    excluded: frozenset[str] = frozenset(),
) -> None:
    """Adds the `Source` of a mask or a part; its counts are for `leaves` without `excluded`."""
    for path, moments_of_leaf in inner.moments.items():
        source.moments.setdefault(path, []).extend(moments_of_leaf)
    source.counts += [
        c if c.leaves or c.excluded else c._replace(leaves=leaves, excluded=excluded)
        for c in inner.counts
    ]
    source.other_states += inner.other_states
    source.other_states_lost_order |= inner.other_states_lost_order
    source.doubts += inner.doubts
    source.accumulated += inner.accumulated
    source.skipping_transforms += inner.skipping_transforms
    source.num_skipped += inner.num_skipped


def _items(x: Mapping[Any, Any]) -> list[Any]:
    """The values in the order in which JAX flattens them."""
    return [x[key] for key in sorted(x, key=str)]
