"""States from and to optax."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.common import (
    OPTAX,
    RTOL,
    Filling,
    Gathered,
    Kept,
    Ours,
    Said,
    Source,
    Translation,
    as_expected,
    expect_place_to_gather,
    field_names,
    into_ours,
    is_container,
    leaves_by_path,
    mapped,
    new_ours,
    steps_taken,
)
from adamjax.data import Tree
from adamjax.rows import RowGradient

__all__ = ["from_optax", "to_optax"]


# What optax' states are, by class and fields: the fields that each may have, in any version. One
# that has others, or is of another package, is not known.
_STATES: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "ScaleByAdamState": ("rule", (("count", "mu", "nu"),)),
    "ScaleByAmsgradState": ("rule", (("count", "mu", "nu", "nu_max"),)),
    "ScaleByScheduleState": ("count", (("count",),)),
    "WrappedScheduleState": ("count", (("count",),)),
    "InjectHyperparamsState": ("hyperparams", (("count", "hyperparams", "inner_state"),)),
    "InjectStatefulHyperparamsState": (
        "hyperparams",
        (("count", "hyperparams", "hyperparams_states", "inner_state"),),
    ),
    "MultiStepsState": (
        "gathered",
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
    """What a node of an optax state is: one of the known, "items", or `None`, not known."""
    fields = field_names(x)
    if fields is None:
        return "items" if is_container(x) else None
    if type(x).__module__.split(".")[0] != "optax":
        return None
    role, known = _STATES.get(type(x).__name__, (None, ()))
    return role if fields in known else None


# Hyperparameters by the names that optax gives them.
_INJECTED = ("b1", "b2", "eps", "eps_root", "learning_rate", "weight_decay")


def _injected(x: Any, source: Source, scheduled: Mapping[str, Any]) -> dict[str, Any]:
    """What `inject_hyperparams` says of its transform's hyperparameters."""
    facts: dict[str, Any] = {"more": {}, "masks_decay": True}
    for name, value in x.hyperparams.items():
        if name in scheduled:
            if name not in ("learning_rate", "weight_decay"):
                source.doubts.append(
                    f"inject_hyperparams calls a schedule for {name}, which does not change "
                    "between steps here: convert where it has come to its last value, from a "
                    "state in which it is a constant"
                )
        elif name in _INJECTED and np.ndim(value) == 0:
            facts[name] = value
        else:
            facts["more"][name] = value
    return facts


def _read_optax(x: Any, source: Source, facts: dict[str, Any]) -> None:
    role, owner = _role(x), source.owner
    if role == "rule":
        names = [name for name in x._fields if name != "count"]
        trees = {name: leaves_by_path(owner, getattr(x, name)) for name in names}
        kinds = ("amsgrad",) if "nu_max" in names else ("adam", "nadam", "adamax")
        count = steps_taken(owner, repr(next(iter(trees["mu"]), "no leaf")), x.count)
        for path in trees["mu"]:
            slots = {name: tree[path] for name, tree in trees.items() if path in tree}
            source.add(path, Kept(count, slots, kinds, facts=facts))
    elif role == "count":
        source.add_count(steps_taken(owner, type(x).__name__, x.count), None)
    elif role == "hyperparams":
        scheduled = getattr(x, "hyperparams_states", {})
        said = _injected(x, source, scheduled)
        said = _with_facts(facts, said)
        _read_optax(scheduled, source, {})
        rules = sum(map(len, source.kept.values()))
        _read_optax(x.inner_state, source, said)
        if rules == sum(map(len, source.kept.values())):
            if rules and "step_size" in said["more"]:  # of optax.scale, behind the rule
                said["learning_rate"] = -said["more"].pop("step_size")
            source.loose.append(said)
    elif role == "gathered":
        if jax.tree.leaves(getattr(x, "skip_state", ())):
            source.doubts.append(
                "MultiSteps skips some micro-batches (should_skip_update_fn), which "
                "accumulate_gradients does not: leave it out there, or skip whole steps here "
                "(skip_not_finite)"
            )
        micro = steps_taken(owner, "mini_step of MultiSteps", x.mini_step)
        totals = {path: g * micro for path, g in leaves_by_path(owner, x.acc_grads).items()}
        source.gathered.append(Gathered(micro, totals))
        outside, source.gathers = source.gathers, True
        _read_optax(x.inner_opt_state, source, facts)
        source.gathers = outside
    elif role == "skipped":
        source.skipped = (source.skipped or 0) + int(x.total_notfinite)
        _read_optax(x.inner_state, source, facts)
    elif role == "inner":
        # What counts in here is of the leaves in here.
        inner = Source(owner, gathers=source.gathers)
        _read_optax(x[0], inner, facts)
        if inner.kept:
            _give_loose_facts(inner)
        else:
            _pass_loose_facts(inner, source)
        leaves = frozenset(inner.kept) or None
        for path, several in inner.kept.items():
            source.kept.setdefault(path, []).extend(several)
        source.counts += [c if c.leaves else c._replace(leaves=leaves) for c in inner.counts]
        source.others += inner.others
        source.doubts += inner.doubts
        source.gathered += inner.gathered
        source.skipped = inner.skipped if source.skipped is None else source.skipped
    elif role == "items":
        for item in _items(x):
            _read_optax(item, source, facts)
    elif jax.tree.leaves(x):
        source.others.append(x)


def _with_facts(facts: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """What is said of hyperparameters, and what is said besides."""
    both = {**facts.get("more", {}), **more.get("more", {})}
    return {**facts, **more, "more": both}


def _give_loose_facts(source: Source) -> None:
    """Gives what is said outside of any rule to the rules of the leaves that go through it."""
    for facts in source.loose:
        for several in source.kept.values():
            several[-1].facts = _with_facts(several[-1].facts, facts)
    source.loose = []


def _pass_loose_facts(inner: Source, source: Source) -> None:
    """Passes on what is said within a mask of no rule, whose leaves the state does not say."""
    for facts in inner.loose:
        if "learning_rate" in facts or "step_size" in facts["more"]:
            source.doubts.append(
                "inject_hyperparams holds a rate within a mask or a part that has no rule, and "
                "the state does not say for which leaves: see that tx has this rate for them"
            )
        rates = ("learning_rate", "step_size")
        more = {name: x for name, x in facts["more"].items() if name not in rates}
        rest = {name: x for name, x in facts.items() if name not in rates}
        source.loose.append({**rest, "more": more})


def _read_state(owner: str, state: Any) -> Source:
    source = Source(owner)
    _read_optax(state, source, {})
    _give_loose_facts(source)
    return source


def _items(x: Any) -> list[Any]:
    return [x[key] for key in sorted(x, key=str)] if isinstance(x, Mapping) else list(x)


class _IntoOptax:
    """Fills a state of optax."""

    def __init__(self, ours: Ours, target: Source, check: bool, rtol: float) -> None:
        self.ours, self.source, self.owner = ours, ours.read(), ours.owner
        # Whether what is being filled counts steps, and not calls.
        self.gathers = False
        self.filling = Filling(self.source, check)
        self.translation = Translation(self.filling, OPTAX, rtol)
        self.counts = iter(target.counts)

    def _count(self, leaves: frozenset[str] | None, like: Any) -> Any:
        calls = None if self.gathers else self.ours.calls(self.source, leaves)
        return jnp.asarray(self.source.count_of(leaves, calls), like.dtype)

    def fill(self, x: Any) -> Any:
        role = _role(x)
        if role == "rule":
            return self._rule(x, x._fields)
        if role == "count":
            return x._replace(count=self._count(next(self.counts).leaves, x.count))
        if role == "hyperparams":
            kept = {k: self.fill(getattr(x, k)) for k in x._fields if k == "hyperparams_states"}
            kept["count"] = self._count(None, x.count)
            return x._replace(inner_state=self.fill(x.inner_state), **kept)
        if role == "gathered":
            return self._gathering(x)
        if role == "skipped":
            skipped = jnp.asarray(self.source.skipped or 0, x.total_notfinite.dtype)
            return x._replace(total_notfinite=skipped, inner_state=self.fill(x.inner_state))
        if role == "inner":
            return type(x)(self.fill(x[0]))
        if role == "items":
            return mapped(self.fill, x)
        return self.filling.other(x) if jax.tree.leaves(x) else x

    def _rule(self, x: Any, fields: tuple[str, ...]) -> Any:
        values: dict[str, dict[str, Any]] = {name: {} for name in fields if name != "count"}
        found: dict[str, Kept] = {}
        for path in leaves_by_path(self.owner, x.mu):
            kind, found[path], slots = self.translation.to_theirs(path)
            as_expected(self.owner, OPTAX, kind, path, Kept(0, dict.fromkeys(values)))
            for name, array in slots.items():
                values[name][path] = array
        trees = {k: self.filling.tree(k, v, getattr(x, k)) for k, v in values.items()}
        return x._replace(count=jnp.asarray(self.filling.counted(found), x.count.dtype), **trees)

    def _gathering(self, x: Any) -> Any:
        mean: Any = x.acc_grads
        leaves = frozenset(leaves_by_path(self.owner, mean))
        micro, totals = self.source.gathered_of(leaves) or (0, {})
        if micro:
            dense = {
                p: t.to_dense() if isinstance(t, RowGradient) else t for p, t in totals.items()
            }
            means = {p: t / micro for p, t in dense.items()}
            mean = self.filling.tree("the gathered gradient", means, mean)
        outside, self.gathers = self.gathers, True
        made = x._replace(
            mini_step=jnp.asarray(micro, x.mini_step.dtype),
            gradient_step=self._count(leaves, x.gradient_step),
            inner_opt_state=self.fill(x.inner_opt_state),
            acc_grads=mean,
        )
        self.gathers = outside
        return made


def from_optax(
    source_state: Any,
    tx: Any,
    params: Tree,
    *,
    average: Tree = None,
    check: bool = True,
    rtol: float = RTOL,
) -> Any:
    """The state of `tx` that goes on from a state of an optax transform.

    Moments are found at any depth of optax' `chain`, `masked`, `multi_transform` (`partition`),
    `inject_hyperparams`, `MultiSteps` and `apply_if_finite`, by the path of their leaf, so `tx`
    may be put together in another way: through `masked`, `partition`, `exact_rows` (where all rows
    are then up to date), `accumulate_gradients` or `skip_not_finite`. If a leaf goes through
    several rules, they correspond in their order.

    Args:
      source_state: what the optax transform's `init` or `update` returned, of `adam`, `adamw`,
        `nadam`, `amsgrad`, `adamax` and the transforms they are made of. A state is known by its
        class. One class serves optax's `adam`, `nadam`, `adamax`, `radam`, `lamb`, `yogi` and
        `contrib.adopt`: which of them a state is of, only `tx` says.
      tx: a transform of ours, with the hyperparameters of the optax transform. Those that
        `inject_hyperparams` holds are compared; else a state says nothing of b1, b2, `eps`
        (optax's epsilon, 1e-8 by default), `eps_root` (which must be 0), the rate, and the weight
        decay (1e-4 by default in `optax.adamw`, 0.004 here) and its mask. Nor does that of
        `MultiSteps` say whether it takes the mean of its micro-batches, as it does by default and
        `accumulate_gradients` does, or their sum.
      params: the parameters at that step.
      average: for a `weight_ema` in `tx`, the average so far, a tree like `params`: optax' states
        hold none.
      check: whether to refuse what would not go on as before; see the module.
      rtol: how much of a step may differ where the rule has another form there (AMSGrad, Nadam,
        Adamax), at least 0.

    Returns:
      A state like that of `tx.init(params)`; its arrays are copies. Schedules go on from the
      count of optax' schedules, or that of the rule where a rate was constant.

    Raises:
      ValueError: something does not fit or would not go on as before. The message names the leaf.

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
    new = new_ours("from_optax", tx, params)
    return into_ours(source, OPTAX, new, average, check, rtol)


def to_optax(
    state: Any, tx: Any, params: Tree, target: Any, *, check: bool = True, rtol: float = RTOL
) -> Any:
    """The state of an optax transform that goes on from a state of `tx`.

    Args:
      state: a state of `tx`. Rows of `exact_rows` must be up to date: `flush` both first.
      tx: the transform of ours.
      params: the parameters at that step.
      target: a state as the optax transform's `init(params)` gives it; its dtypes are kept, and
        the hyperparameters that `inject_hyperparams` holds.
      check, rtol: as for `from_optax`.

    Returns:
      A state like `target`; its arrays are copies. An average of the weights has no place in it:
      read it with `averaged_weights`.

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
    ours, wanted = Ours("to_optax", tx, state, params), _read_state("to_optax", target)
    wanted.refuse_doubts(check)
    into = _IntoOptax(ours, wanted, check, rtol)
    expect_place_to_gather("to_optax", into.source, wanted)
    made = into.fill(target)
    into.filling.finish()
    if check:
        Said(ours, OPTAX).check(wanted.kept)
    return made
