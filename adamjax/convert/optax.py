"""States from and to optax."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState, initial_state
from adamjax.convert.differences import Translation, expect_slots
from adamjax.convert.filling import ACCUMULATED
from adamjax.convert.hyperparameters import HyperparameterCheck
from adamjax.convert.into_adamjax import into_adamjax
from adamjax.convert.source import Accumulated, Count, Hyperparams, LeafMoments, Source
from adamjax.convert.steps import expect_same_steps
from adamjax.convert.systems import OPTAX, RTOL
from adamjax.convert.values import (
    SCHEDULE_COUNTS,
    field_names,
    is_container,
    leaves_by_path,
    map_items,
    number_of,
    same_value,
    steps_taken,
)
from adamjax.data import Tree
from adamjax.guard import skip_not_finite
from adamjax.rows import RowGradient

__all__ = ["from_optax", "to_optax"]


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
    "PartitionState": ("inner", (("inner_states",),)),
    "MultiTransformState": ("inner", (("inner_states",),)),
}


def _role(x: Any) -> str | None:
    """The role of a node of an optax state: one of `_STATES`, "items", or `None` if unknown."""
    fields = field_names(x)
    if fields is None:
        return "items" if is_container(x) else None
    if type(x).__module__.split(".")[0] != "optax":
        return None
    role, fields_of_versions = _STATES.get(type(x).__name__, (None, ()))
    return role if fields in fields_of_versions else None


# The hyperparameters of rules and rates that optax and adamjax call by the same names.
_SHARED_NAMES = ("b1", "b2", "eps", "eps_root", "learning_rate", "weight_decay")
# Keys that say how a rate or a decay applies, not its value. Two places of a state may differ in
# them without a doubt.
_HOW_APPLIED = (
    *("has_schedule", "schedule_accumulates", "has_schedule_before", "masks_decay", "decoupled"),
    *("has_decay_schedule", "decay_accumulates"),
)
# The two strings of `has_schedule`, for errors: what shows that there is a schedule, and a note.
_HAS_SCHEDULE = (
    "the state counts its steps",
    "the state does not contain the schedule, so its values are not compared",
)


def _rate_schedule(source: Source) -> Hyperparams:
    """The hyperparameters of a leaf whose rate follows a schedule in this place of a state."""
    return {"has_schedule": _HAS_SCHEDULE, "schedule_accumulates": source.accumulates}


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
                source.doubts.append(
                    f"inject_hyperparams calls a schedule for {name}, and here {name} is the same "
                    "in each step: convert when the schedule has reached its last value, from a "
                    "state in which it is a constant"
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
    role = _role(x)
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
        _read(x.inner_state, source, hyperparams)
    elif role == "inner":
        _read_inner(x[0], source, hyperparams)
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
        _add_unowned(source, {**own_hyperparams, "before": not num_rules})


def _begins_with_rule(x: Any) -> bool:
    """Whether the first transform of a chain is a rule, so that no decay comes before it."""
    while _role(x) == "items" and not isinstance(x, Mapping) and x:
        x = next(iter(x))
    return _role(x) == "rule"


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
    """Reads a state inside a mask or a partition: its counts are those of its leaves."""
    inner = Source(source.owner, accumulates=source.accumulates)
    _read(x, inner, hyperparams)
    if inner.moments:
        _give_to_last_rules(inner)
    else:
        _pass_to_outer(inner, source)
    leaves = frozenset(inner.moments) or None
    for path, several in inner.moments.items():
        source.moments.setdefault(path, []).extend(several)
    source.counts += [c if c.leaves else c._replace(leaves=leaves) for c in inner.counts]
    source.other_states += inner.other_states
    source.has_sorted_states |= inner.has_sorted_states
    source.doubts += inner.doubts
    source.accumulated += inner.accumulated
    source.skipped = inner.skipped if source.skipped is None else source.skipped


def _with_hyperparams(source: Source, hyperparams: Hyperparams, added: Hyperparams) -> Hyperparams:
    """Both dictionaries of hyperparameters. Another value of the same name is a doubt."""

    def both(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        for name in set(a) & set(b) - {"more", *_HOW_APPLIED}:
            if np.ndim(a[name]) or np.ndim(b[name]) or not same_value(a[name], b[name]):
                source.doubts.append(
                    f"inject_hyperparams states {name} of a leaf twice, {a[name]} and {b[name]}, "
                    "and not what it does with each: make sure that tx does the same"
                )
        return {**a, **b}

    more = both(hyperparams.get("more", {}), added.get("more", {}))
    return {**both(hyperparams, added), "more": more}


def _give_to_last_rules(source: Source) -> None:
    """Adds the hyperparameters that belong to no rule to each leaf's last rule."""
    for moments in (several[-1] for several in source.moments.values()):
        for unowned in map(_named_by_place, source.unowned_hyperparams):
            if "rate_before" in unowned:
                source.doubts.append(
                    f"a rate of {unowned['rate_before']:g} scales the gradients before the rule: "
                    "convert a run without it"
                )
            rates = [
                x["learning_rate"] for x in (moments.hyperparams, unowned) if "learning_rate" in x
            ]
            others = {name: x for name, x in unowned.items() if name != "learning_rate"}
            hyperparams = _with_hyperparams(source, moments.hyperparams, others)
            if rates:  # Each multiplies a step by minus the rate.
                hyperparams["learning_rate"] = -math.prod(-np.asarray(rate) for rate in rates)
            moments.hyperparams = hyperparams
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
    if "weight_decay" in hyperparams or "has_decay_schedule" in hyperparams:
        hyperparams["decoupled"] = None if before is None else not before
    if before and hyperparams.pop("has_schedule", None):
        hyperparams["has_schedule_before"] = True
    if before and "learning_rate" in hyperparams:
        hyperparams["rate_before"] = hyperparams.pop("learning_rate")
    return hyperparams


def _pass_to_outer(inner: Source, source: Source) -> None:
    """Passes on the hyperparameters of a mask that has no rule.

    Without a rule, nothing in the state shows which leaves the mask has.
    """
    rates = ("learning_rate", "step_size", "has_schedule")
    for hyperparams in inner.unowned_hyperparams:
        if any(name in hyperparams or name in hyperparams["more"] for name in rates):
            source.doubts.append(
                "a rate or a schedule is within a mask or a part that has no rule, and the state "
                "does not say for which leaves: make sure that tx has this rate for them"
            )
        more = {name: x for name, x in hyperparams["more"].items() if name not in rates}
        others = {name: x for name, x in hyperparams.items() if name not in rates}
        _add_unowned(source, {**others, "more": more, "before": not source.moments})


def _read_state(owner: str, state: Any) -> Source:
    source = Source(owner)
    _read(state, source, {})
    _give_to_last_rules(source)
    return source


def _items(x: Mapping[Any, Any]) -> list[Any]:
    """The values in the order in which JAX flattens them."""
    return [x[key] for key in sorted(x, key=str)]


def _doubt_skips(source: Source, ours: AdamjaxState) -> None:
    """Adds a doubt if optax skips steps and adamjax does not."""
    skips = any(isinstance(part.tx, skip_not_finite) for part in ours.parts)
    if source.skipped is not None and not skips:
        source.doubts.append(
            "optax skips steps with gradients that are not finite (apply_if_finite), and tx does "
            "not: wrap tx in skip_not_finite"
        )


class _OptaxFilling(Translation):
    """Fills a state of optax, and the states inside it."""

    def filled_state(self, target: Any, counts: Sequence[Count]) -> Any:
        self.counts = iter(counts)
        state = self.fill(target)
        self.finish()
        return state

    def fill(self, x: Any) -> Any:
        role = _role(x)
        if role == "rule":
            return self._fill_rule(x)
        if role == "count":
            return x._replace(count=self.schedule_count(next(self.counts).leaves, x.count))
        if role == "hyperparams":
            if "hyperparams_states" in x._fields:
                x = x._replace(hyperparams_states=self.fill(x.hyperparams_states))
            count = self.schedule_count(None, x.count)
            return x._replace(inner_state=self.fill(x.inner_state), count=count)
        if role == "accumulated":
            return self._fill_accumulated(x)
        if role == "skipped":
            skipped = jnp.asarray(self.source.skipped or 0, x.total_notfinite.dtype)
            return x._replace(total_notfinite=skipped, inner_state=self.fill(x.inner_state))
        if role == "inner":
            return type(x)(self.fill(x[0]))
        if role == "items":
            return map_items(self.fill, x)
        return self.other_state(x) if jax.tree.leaves(x) else x

    def _fill_rule(self, x: Any) -> Any:
        values: dict[str, dict[str, Any]] = {name: {} for name in x._fields if name != "count"}
        moments: dict[str, LeafMoments] = {}
        for path in leaves_by_path(self.owner, x.mu):
            kind, moments[path], slots = self.from_adamjax(path)
            # Only the names of the slots are compared.
            named = LeafMoments(0, dict.fromkeys(values))
            expect_slots(self.owner, OPTAX, kind, path, named)
            for name, array in slots.items():
                values[name][path] = array
        trees = {k: self.tree(k, v, getattr(x, k)) for k, v in values.items()}
        count = self.common_count(moments)
        return x._replace(count=jnp.asarray(count, x.count.dtype), **trees)

    def _fill_accumulated(self, x: Any) -> Any:
        mean: Any = x.acc_grads
        leaves = frozenset(leaves_by_path(self.owner, mean))
        micro, totals = self.source.accumulated_of(leaves) or (0, {})
        if micro:
            means = {
                path: (total.to_dense() if isinstance(total, RowGradient) else total) / micro
                for path, total in totals.items()
            }
            mean = self.tree(ACCUMULATED, means, mean)
        outer, self.accumulates = self.accumulates, True
        filled = x._replace(
            mini_step=jnp.asarray(micro, x.mini_step.dtype),
            gradient_step=self.schedule_count(leaves, x.gradient_step),
            inner_opt_state=self.fill(x.inner_opt_state),
            acc_grads=mean,
        )
        self.accumulates = outer
        return filled


def from_optax(
    source_state: Any,
    tx: Any,
    params: Tree,
    *,
    average: Tree = None,
    optimizer: Any = None,
    check: bool = True,
    rtol: float = RTOL,
) -> Any:
    """The state of `tx` that goes on from a state of an optax transform.

    The conversion finds moments by the paths of their leaves, at any depth of optax' `chain`,
    `masked`, `multi_transform` (`partition`), `inject_hyperparams`, `MultiSteps` and
    `apply_if_finite`. So `tx` may be composed in another way, with `masked`, `partition`,
    `exact_rows` (whose rows are then all up to date), `accumulate_gradients` or `skip_not_finite`.
    If a leaf goes through several rules, they correspond in their order.

    Args:
      source_state: the state that the optax transform's `init` or `update` returned, of `adam`,
        `adamw`, `nadam`, `amsgrad`, `adamax` and the transforms they consist of. A state is
        recognized by its class. optax' `adam`, `nadam`, `adamax`, `radam`, `lamb`, `yogi` and
        `contrib.adopt` share one class, so only `tx` shows which of them made the state.
      tx: a transform of adamjax, with the hyperparameters of the optax transform. Those in a state
        of `inject_hyperparams` are compared. A state that counts the steps of a schedule of the
        rate needs a schedule in `tx`. Other states do not contain b1, b2, `eps` (optax'
        epsilon, 1e-8 by default), `eps_root` (which must be 0), the rate, and the weight decay
        (1e-4 by default in `optax.adamw`, 0.004 here) and its mask. Transforms without a state,
        such as clips, leave no trace. The state of `MultiSteps` does not show how many
        micro-batches make a step. Nor does it show whether gradients are summed or averaged:
        `MultiSteps` averages by default, `accumulate_gradients` always. `tx` may have transforms of
        optax inside. A rule of adamjax inside a transform of optax is hidden: it is refused if
        there are hyperparameters to compare.
      params: the parameters at that step.
      average: for a `weight_ema` in `tx`, the average so far, a tree like `params`. optax' states
        have none.
      optimizer: the optax transform itself. If it is given, both take some steps on random
        gradients, and a `tx` that moves weights otherwise is refused. This shows almost all that
        the state does not. It does not show what a schedule does later, or which steps are skipped
        while gradients accumulate. The steps take the time and the memory of dense steps.
      check: whether to refuse a state with which the run would not go on as before; see
        `adamjax.convert`. (With `check=False` and `optimizer`, only the steps are compared.)
      rtol: the relative difference that a step may have where optax' rule has another form
        (AMSGrad, Nadam, Adamax). At least 0.

    Returns:
      A state like that of `tx.init(params)`. Its arrays are copies. Schedules go on from the count
      of optax' schedules or, where a rate was constant, from the count of the rule.

    Raises:
      ValueError: something does not fit, or the run would not go on as before. The message names
        the leaf.

    >>> import adamjax, jax.numpy as jnp, optax
    >>> params, grads = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, -2.0])}
    >>> old = optax.adamw(0.1)
    >>> updates, old_state = old.update(grads, old.init(params), params)
    >>> tx = adamjax.adamw(0.1, eps=1e-8, weight_decay=1e-4)
    >>> state = adamjax.convert.from_optax(old_state, tx, params)
    >>> adamjax.step_count(state), adamjax.get_slot(state, "m")["w"]
    (Array(1, dtype=int32), Array([ 0.1, -0.2], dtype=float32))
    """
    source = _read_state("from_optax", source_state)
    new = initial_state("from_optax", tx, params)
    _doubt_skips(source, new)
    state = into_adamjax(source, OPTAX, new, average, check, rtol)
    if optimizer is not None:
        filled = AdamjaxState("from_optax", tx, state, params)
        expect_same_steps(filled, optimizer, source_state, rtol)
    return state


def to_optax(
    state: Any,
    tx: Any,
    params: Tree,
    target: Any,
    *,
    optimizer: Any = None,
    check: bool = True,
    rtol: float = RTOL,
) -> Any:
    """The state of an optax transform that goes on from a state of `tx`.

    Args:
      state: a state of `tx`. The rows of `exact_rows` must be up to date: call `flush` first.
      tx: a transform of adamjax.
      params: the parameters at that step.
      target: the state of the optax transform's `init(params)`. Its dtypes are kept, and so are the
        hyperparameters in a state of `inject_hyperparams`.
      optimizer, check, rtol: as for `from_optax`.

    Returns:
      A state like `target`. Its arrays are copies. It has no place for an average of the weights:
      read that with `averaged_weights`.

    Raises:
      ValueError: as for `from_optax`.

    >>> import adamjax, jax.numpy as jnp, optax
    >>> params, grads = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, -2.0])}
    >>> tx = adamjax.adam(0.1, eps=1e-8)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> new = optax.adam(0.1)
    >>> new_state = adamjax.convert.to_optax(state, tx, params, new.init(params))
    >>> new_state[0].mu["w"]
    Array([ 0.1, -0.2], dtype=float32)
    """
    ours = AdamjaxState("to_optax", tx, state, params)
    target_source = _read_state("to_optax", target)
    _doubt_skips(target_source, ours)
    source = ours.read_for(target_source, check)
    filling = _OptaxFilling(source, ours, OPTAX, check, rtol)
    new_state = filling.filled_state(target, target_source.counts)
    if check:
        HyperparameterCheck(ours, OPTAX).check(target_source.moments)
    if optimizer is not None:
        expect_same_steps(ours, optimizer, new_state, rtol)
    return new_state
