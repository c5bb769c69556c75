"""A state of optax, read into the common form."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from adamjax.convert.source import Accumulated, Hyperparams, LeafMoments, Skips, Source
from adamjax.convert.values import (
    SCHEDULE_COUNTS,
    field_names,
    is_container,
    leaves_by_path,
    number_of,
    steps_taken,
)

__all__ = ["read_state", "role_of"]

# The role of each class of states in optax, by its name, and its fields in each version of optax.
# A class with other fields, or of another package, is unknown.
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


# The hyperparameters of rules and rates that optax and adamjax call by the same names.
_NAMES_OF_RULES = {"b1", "b2", "eps", "eps_root"}
_SHARED_NAMES = {*_NAMES_OF_RULES, "learning_rate", "weight_decay"}
# Keys that say how a rate or a decay applies, not its value. Two places of a state may differ in
# them without a doubt.
_HOW_APPLIED = (
    *("has_schedule", "schedule_accumulates", "has_schedule_before", "masks_decay", "decoupled"),
    *("has_decay_schedule", "decay_accumulates", "num_schedules", "places"),
)
# Keys of rates and weight decays.
_RATES = ("learning_rate", "has_schedule", "weight_decay", "has_decay_schedule")
# The two strings of `has_schedule`, for errors: what shows that there is a schedule, and a note.
_HAS_SCHEDULE = (
    "the state counts its steps",
    "the state does not contain the schedule, so its values are not compared",
)


def _rate_schedule(source: Source) -> Hyperparams:
    """The hyperparameters of a leaf whose rate follows a schedule in this place of a state."""
    return {
        "has_schedule": _HAS_SCHEDULE,
        "num_schedules": 1,
        "schedule_accumulates": source.accumulates,
    }


def _decay_schedule(source: Source) -> Hyperparams:
    """The hyperparameters of a leaf whose weight decay follows a schedule in this place."""
    return {"has_decay_schedule": True, "decay_accumulates": source.accumulates}


def _injected_hyperparams(x: Any, source: Source, scheduled: Mapping[str, Any]) -> Hyperparams:
    """The hyperparameters in a state of `inject_hyperparams`; see `HyperparameterCheck`."""
    hyperparams: Hyperparams = {"more": {}, "masks_decay": "unknown"}
    for name, value in x.hyperparams.items():
        # flax.nnx wraps each array.
        value = next(iter(jax.tree.leaves(value)), value)
        if name in scheduled:
            if name == "learning_rate":
                hyperparams |= _rate_schedule(source)
            elif name == "weight_decay":
                hyperparams |= _decay_schedule(source)
            else:
                source.unseen.append(
                    f"inject_hyperparams calls a schedule for {name}, and the state does not show "
                    "what it does with it"
                )
        elif name in _SHARED_NAMES and np.ndim(value) == 0:
            what = f"{name} of inject_hyperparams"
            hyperparams[name] = number_of(source.owner, what, value)
            # An `inject_hyperparams` around MultiSteps may state a decay that is inside of it, so
            # if `source.accumulates` is false, nothing is known.
            if name == "weight_decay" and source.accumulates:
                hyperparams["decay_accumulates"] = True
        else:
            hyperparams["more"][name] = value
    return hyperparams


def _read(x: Any, source: Source, hyperparams: Hyperparams) -> None:
    """Reads a node of an optax state; `hyperparams` are those of `inject_hyperparams` around it."""
    role = role_of(x)
    if role == "rule":
        _read_rule(x, source, hyperparams)
    elif role == "count":
        source.add_count(steps_taken(source.owner, type(x).__name__, x.count), None)
        if type(x).__name__ == "ScaleByScheduleState":
            _add_unowned(source, _rate_schedule(source))
        elif type(x).__name__ == "WeightDecaySchedule":
            _add_unowned(source, {**_decay_schedule(source), "masks_decay": "unknown"})
    elif role == "hyperparams":
        _read_hyperparams(x, source, hyperparams)
    elif role == "accumulated":
        _read_accumulated(x, source, hyperparams)
    elif role == "skipped":
        skipped = steps_taken(source.owner, "total_notfinite", x.total_notfinite)
        source.skipped = (source.skipped or 0) + skipped
        num_rules = {path: len(several) for path, several in source.moments.items()}
        outer, source.in_skips = source.in_skips, True
        _read(x.inner_state, source, hyperparams)
        source.in_skips = outer
        inside = [p for p, x in source.moments.items() if len(x) > num_rules.get(p, 0)]
        source.skips.append(Skips(frozenset(inside), source.accumulates))
    elif role == "inner":
        _read_inner(x[0], source, hyperparams)
    elif role == "parts":
        _read_parts(x[0], source, hyperparams)
    elif role == "items":
        if isinstance(x, Mapping):
            _read_mapping(x, source, hyperparams)
        else:
            for item in x:
                _read(item, source, hyperparams)
    elif jax.tree.leaves(x):
        if type(x).__module__.split(".")[0] == "adamjax":
            source.doubts.append(
                f"it has a {type(x).__name__} of adamjax: a state of adamjax needs no conversion"
            )
        source.other_states.append(x)


def _add_unowned(source: Source, hyperparams: Hyperparams) -> None:
    """Adds hyperparameters outside of a rule; `before` says whether they are before all rules."""
    source.unowned_hyperparams.append({"more": {}, "before": not source.moments, **hyperparams})


def _read_mapping(x: Mapping[Any, Any], source: Source, hyperparams: Hyperparams) -> None:
    """Reads a dictionary, as of `named_chain` and `multi_transform`; JAX loses its order."""
    has_rule: set[str] = set()
    num_unowned, num_others = len(source.unowned_hyperparams), len(source.other_states)
    for item in _items(x):
        num_rules = {path: len(several) for path, several in source.moments.items()}
        _read(item, source, hyperparams)
        own = {p for p, several in source.moments.items() if len(several) > num_rules.get(p, 0)}
        if own & has_rule:
            source.doubts.append(
                f"the leaf {min(own & has_rule)!r} has several rules in a dictionary with the keys "
                f"{list(x)} (of optax.named_chain), whose order JAX loses: make it a tuple in the "
                "order of the chain, tuple(state[key] for key in keys)"
            )
        has_rule |= own
    source.has_sorted_states |= len(source.other_states) > num_others

    # A part may have been read before the rule that it follows.
    for unowned in source.unowned_hyperparams[num_unowned:]:
        unowned["before"] = None
        if unowned["more"]:
            source.unseen.append(
                f"inject_hyperparams states {min(unowned['more'])} in a dictionary with the keys "
                f"{list(x)} (of optax.named_chain), whose order JAX loses"
            )


def _read_rule(x: Any, source: Source, hyperparams: Hyperparams) -> None:
    names = [name for name in x._fields if name != "count"]
    trees = {name: leaves_by_path(source.owner, getattr(x, name)) for name in names}
    kinds = ("amsgrad",) if "nu_max" in trees else ("adam", "nadam", "adamax")
    count = steps_taken(source.owner, repr(next(iter(trees["mu"]), "no leaf")), x.count)
    for path in trees["mu"]:
        slots = {name: tree[path] for name, tree in trees.items() if path in tree}
        source.add(path, LeafMoments(count, slots, kinds, hyperparams=hyperparams))


def _read_hyperparams(x: Any, source: Source, hyperparams: Hyperparams) -> None:
    """Reads a state of `inject_hyperparams` and the state inside it."""
    scheduled = getattr(x, "hyperparams_states", {})
    own_hyperparams = _injected_hyperparams(x, source, scheduled)
    if "weight_decay" in own_hyperparams and _begins_with_rule(x.inner_state):
        own_hyperparams["decoupled"] = True
    _read(scheduled, source, {})
    num_rules = sum(map(len, source.moments.values()))
    _read(x.inner_state, source, _with_hyperparams(source, hyperparams, own_hyperparams))
    has_rule_inside = sum(map(len, source.moments.values())) > num_rules
    if not has_rule_inside:
        # After a rule, the step_size of optax.scale is a rate.
        if num_rules and "step_size" in own_hyperparams["more"]:
            own_hyperparams["learning_rate"] = -own_hyperparams["more"].pop("step_size")
        if "weight_decay" in own_hyperparams:
            own_hyperparams["decay_accumulates"] = source.accumulates
        for name in sorted(_NAMES_OF_RULES & own_hyperparams.keys()):
            del own_hyperparams[name]
            source.unseen.append(f"inject_hyperparams states {name} of a transform without a rule")
        _add_unowned(source, {**own_hyperparams, "before": not num_rules})


def _begins_with_rule(x: Any) -> bool:
    """Whether the first transform of a chain is a rule, so that no decay comes before it."""
    while role_of(x) == "items" and not isinstance(x, Mapping) and x:
        x = next(iter(x))
    return role_of(x) == "rule"


def _read_accumulated(x: Any, source: Source, hyperparams: Hyperparams) -> None:
    """Reads a state of `MultiSteps` and the state inside it."""
    if jax.tree.leaves(getattr(x, "skip_state", ())):
        source.doubts.append(
            "MultiSteps skips some micro-batches (should_skip_update_fn), and "
            "accumulate_gradients does not: leave it out there, or skip whole steps here "
            "(skip_not_finite)"
        )
    micro = steps_taken(source.owner, "mini_step of MultiSteps", x.mini_step)
    totals = {path: g * micro for path, g in leaves_by_path(source.owner, x.acc_grads).items()}
    source.accumulated.append(Accumulated(micro, totals))
    outer, source.accumulates = source.accumulates, True
    _read(x.inner_opt_state, source, hyperparams)
    source.accumulates = outer


def _read_inner(x: Any, source: Source, hyperparams: Hyperparams) -> None:
    """Reads a state inside a mask: its counts are those of its leaves."""
    inner = _read_apart(x, source, hyperparams)
    if inner.moments:
        _give_to_last_rules(inner)
        source.has_masked_rules = True
    else:
        _pass_to_outer(inner, source)
    _merge(source, inner, leaves=frozenset(inner.moments) or None)


def _read_parts(x: Mapping[Any, Any], source: Source, hyperparams: Hyperparams) -> None:
    """Reads the states of `multi_transform`, of which each has leaves of its own."""
    parts = [_read_apart(part, source, hyperparams) for part in _items(x)]
    with_rules = frozenset(path for part in parts for path in part.moments)
    for part in parts:
        if part.moments:
            _give_to_last_rules(part)
            source.has_masked_rules = True
            _merge(source, part, leaves=frozenset(part.moments))
        elif with_rules:
            # What it states is not that of the other parts.
            _note_unknown_leaves(part.unowned_hyperparams, source)
            _merge(source, part, leaves=None, excluded=with_rules)
        else:
            _pass_to_outer(part, source)
            _merge(source, part, leaves=None)
        source.has_sorted_states |= bool(part.other_states)


def _read_apart(x: Any, source: Source, hyperparams: Hyperparams) -> Source:
    """Reads a state inside a mask or a part on its own."""
    inner = Source(source.owner, accumulates=source.accumulates, in_skips=source.in_skips)
    _read(x, inner, hyperparams)
    if inner.moments and _has_rate(hyperparams):
        source.unseen.append(
            "inject_hyperparams states a rate or a weight decay of a mask or a part, and not what "
            f"it does with it for {min(inner.moments)!r}"
        )
        _drop_rates(inner.moments.values())
    return inner


def _merge(
    source: Source,
    inner: Source,
    leaves: frozenset[str] | None,
    excluded: frozenset[str] = frozenset(),
) -> None:
    """Adds what was read of a mask or a part; `leaves` and `excluded` are those of its counts."""
    for path, several in inner.moments.items():
        source.moments.setdefault(path, []).extend(several)
    source.counts += [
        c if c.leaves or c.excluded else c._replace(leaves=leaves, excluded=excluded)
        for c in inner.counts
    ]
    source.other_states += inner.other_states
    source.has_sorted_states |= inner.has_sorted_states
    source.doubts += inner.doubts
    source.unseen += inner.unseen
    source.has_masked_rules |= inner.has_masked_rules
    source.has_rates_without_rules |= inner.has_rates_without_rules
    source.accumulated += inner.accumulated
    source.skips += inner.skips
    source.skipped = inner.skipped if source.skipped is None else source.skipped


def _with_hyperparams(source: Source, hyperparams: Hyperparams, added: Hyperparams) -> Hyperparams:
    """Both dictionaries of hyperparameters, without those that both have."""

    def both(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        merged = {**a, **b}
        for name in sorted(set(a) & set(b) - {"more", *_HOW_APPLIED}):
            source.unseen.append(
                f"inject_hyperparams states {name} of a leaf twice, {a[name]} and {b[name]}, and "
                "not what it does with each"
            )
            del merged[name]
        return merged

    merged = both(hyperparams, added)
    merged["more"] = both(hyperparams.get("more", {}), added.get("more", {}))
    merged["places"] = {**hyperparams.get("places", {}), **added.get("places", {})}
    num_schedules = [x["num_schedules"] for x in (hyperparams, added) if "num_schedules" in x]
    return {**merged, "num_schedules": sum(num_schedules)} if num_schedules else merged


def _give_to_last_rules(source: Source) -> None:
    """Adds the hyperparameters that belong to no rule to each leaf's last rule."""
    if source.has_masked_rules and any(_has_rate(x) for x in source.unowned_hyperparams):
        source.has_rates_without_rules = True
    for moments in (several[-1] for several in source.moments.values()):
        for unowned in map(_named_by_place, source.unowned_hyperparams):
            if "rate_before" in unowned:
                source.unseen.append(
                    f"a rate of {unowned['rate_before']:g} scales the gradients before the rule"
                )
            rates = [
                x["learning_rate"] for x in (moments.hyperparams, unowned) if "learning_rate" in x
            ]
            others = {name: x for name, x in unowned.items() if name != "learning_rate"}
            hyperparams = _with_hyperparams(source, moments.hyperparams, others)
            if rates:  # Each multiplies a step by minus the rate.
                hyperparams["learning_rate"] = -math.prod(-np.asarray(rate) for rate in rates)
            moments.hyperparams = hyperparams
        if {"has_schedule", "has_schedule_before"} <= moments.hyperparams.keys():
            source.unseen.append(
                "there are schedules before the rule and after it, and the state does not show "
                "which is which"
            )
        if "has_schedule" in moments.hyperparams:
            # The rate of a step is the product of the constant and the schedule, which is unknown.
            moments.hyperparams.pop("learning_rate", None)
    source.unowned_hyperparams = []


def _named_by_place(unowned: Hyperparams) -> Hyperparams:
    """Hyperparameters outside of a rule, under the names for their place.

    Rates and schedules that come before all rules scale the gradients, and have other names.
    """
    hyperparams = dict(unowned)
    before = hyperparams.pop("before")
    hyperparams["places"] = dict.fromkeys(hyperparams["more"], before)
    if "weight_decay" in hyperparams or "has_decay_schedule" in hyperparams:
        hyperparams["decoupled"] = None if before is None else not before
    if before and hyperparams.pop("has_schedule", None):
        hyperparams["has_schedule_before"] = True
        del hyperparams["num_schedules"]
    if before and "learning_rate" in hyperparams:
        hyperparams["rate_before"] = hyperparams.pop("learning_rate")
    return hyperparams


def _pass_to_outer(inner: Source, source: Source) -> None:
    """Passes on the weight decay of a mask that has no rule; others may not be those of all leaves.

    Without a rule, nothing in the state shows which leaves the mask has.
    """
    _note_unknown_leaves(inner.unowned_hyperparams, source)
    decays = ("weight_decay", "has_decay_schedule", "decay_accumulates", "masks_decay")
    for hyperparams in inner.unowned_hyperparams:
        decay = {name: x for name, x in hyperparams.items() if name in decays}
        _add_unowned(source, {**decay, "before": not source.moments})


def _note_unknown_leaves(unowned_hyperparams: list[Hyperparams], source: Source) -> None:
    """Notes that a mask or a part without a rule has rates or clips."""
    for hyperparams in unowned_hyperparams:
        names = [x for x in ("learning_rate", "has_schedule") if x in hyperparams]
        if names or hyperparams["more"]:
            what = "a rate or a schedule" if names else min(hyperparams["more"])
            source.unseen.append(
                f"{what} is within a mask or a part that has no rule, and the state does not show "
                "for which leaves"
            )


def read_state(owner: str, state: Any) -> Source:
    source = Source(owner)
    _read(state, source, {})
    _give_to_last_rules(source)
    _drop_rates_of_several_rules(source)
    return source


def _has_rate(hyperparams: Hyperparams) -> bool:
    return any(name in hyperparams for name in _RATES)


def _drop_rates_of_several_rules(source: Source) -> None:
    """Drops the rates and weight decays of leaves with several rules: nothing shows their order."""
    for path, several in source.moments.items():
        if len(several) > 1 and any(_has_rate(moments.hyperparams) for moments in several):
            source.unseen.append(
                f"the leaf {path!r} has several rules, and the state does not show which of them "
                "its rates and weight decays follow"
            )
            _drop_rates([several])


def _drop_rates(moments_of_leaves: Iterable[list[LeafMoments]]) -> None:
    for moments in (moments for several in moments_of_leaves for moments in several):
        moments.hyperparams = {
            name: x for name, x in moments.hyperparams.items() if name not in _RATES
        }


def _items(x: Mapping[Any, Any]) -> list[Any]:
    """The values in the order in which JAX flattens them."""
    return [x[key] for key in sorted(x, key=str)]
