"""States from and to optax."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adamjax.convert.common import (
    OPTAX,
    RTOL,
    Count,
    Filling,
    Kept,
    Ours,
    Said,
    Source,
    Translation,
    as_expected,
    field_names,
    into_ours,
    is_container,
    leaves_by_path,
    mapped,
    new_ours,
    no_place_to_gather,
    steps_taken,
)
from adamjax.data import Tree
from adamjax.rows import RowGradient

__all__ = ["from_optax", "to_optax"]


# By the classes of optax' states: others, such as AdaBelief's, have the same fields.
_RULES = {
    "ScaleByAdamState": ("count", "mu", "nu"),
    "ScaleByAmsgradState": ("count", "mu", "nu", "nu_max"),
}


def _is_optax_rule(x: Any) -> bool:
    kind = type(x)
    return kind.__module__.split(".")[0] == "optax" and field_names(x) == _RULES.get(kind.__name__)


_INJECTED = ("b1", "b2", "eps", "eps_root", "learning_rate", "weight_decay")


def _read_optax(x: Any, source: Source, facts: dict[str, Any]) -> None:
    fields = field_names(x)
    if fields is not None and _is_optax_rule(x):
        trees = {name: leaves_by_path(getattr(x, name)) for name in fields if name != "count"}
        kinds = ("amsgrad",) if "nu_max" in fields else ("adam", "nadam", "adamax")
        for path in trees["mu"]:
            slots = {name: tree[path] for name, tree in trees.items()}
            count = steps_taken(source.owner, repr(path), x.count)
            source.add(path, Kept(count, slots, kinds, facts=facts))
    elif fields == ("count",):
        source.counts.append(Count(steps_taken(source.owner, type(x).__name__, x.count), None))
    elif fields is not None and {"hyperparams", "inner_state"} <= set(fields):
        scheduled = getattr(x, "hyperparams_states", {})
        found = {k: v for k, v in x.hyperparams.items() if k in _INJECTED and k not in scheduled}
        _read_optax(scheduled, source, {})
        _read_optax(x.inner_state, source, {**facts, **found})
    elif fields is not None and {"mini_step", "inner_opt_state", "acc_grads"} <= set(fields):
        micro = int(x.mini_step)
        source.gathered = micro, {p: g * micro for p, g in leaves_by_path(x.acc_grads).items()}
        _read_optax(x.inner_opt_state, source, facts)
    elif fields is not None and {"total_notfinite", "inner_state"} <= set(fields):
        source.skipped = int(x.total_notfinite)
        _read_optax(x.inner_state, source, facts)
    elif fields is not None and fields in (("inner_state",), ("inner_states",)):
        # What counts in here is of the leaves in here.
        inner = Source(source.owner)
        _read_optax(x[0], inner, facts)
        leaves = frozenset(inner.kept) or None
        for path, several in inner.kept.items():
            source.kept.setdefault(path, []).extend(several)
        source.counts += [c if c.leaves else Count(c.steps, leaves) for c in inner.counts]
        source.others += inner.others
        source.gathered = inner.gathered or source.gathered
        source.skipped = inner.skipped if source.skipped is None else source.skipped
    elif fields is None and is_container(x):
        for item in _items(x):
            _read_optax(item, source, facts)
    elif jax.tree.leaves(x):
        source.others.append(x)


def _items(x: Any) -> list[Any]:
    return [x[key] for key in sorted(x, key=str)] if isinstance(x, Mapping) else list(x)


class _IntoOptax:
    """Fills a state of optax."""

    def __init__(self, ours: Ours, target: Source, check: bool, rtol: float) -> None:
        self.source, self.owner = ours.read(), ours.owner
        self.filling = Filling(self.source, check)
        self.translation = Translation(self.filling, OPTAX, rtol)
        self.counts = iter(target.counts)

    def fill(self, x: Any) -> Any:
        fields = field_names(x)
        if fields is not None and _is_optax_rule(x):
            return self._rule(x, fields)
        if fields == ("count",):
            steps = self.source.count_of(next(self.counts).leaves)
            return x._replace(count=jnp.asarray(steps, x.count.dtype))
        if fields is not None and {"hyperparams", "inner_state"} <= set(fields):
            kept = {k: self.fill(getattr(x, k)) for k in fields if k == "hyperparams_states"}
            kept["count"] = jnp.asarray(self.source.count_of(None), x.count.dtype)
            return x._replace(inner_state=self.fill(x.inner_state), **kept)
        if fields is not None and {"mini_step", "inner_opt_state", "acc_grads"} <= set(fields):
            return self._gathering(x)
        if fields is not None and {"total_notfinite", "inner_state"} <= set(fields):
            skipped = jnp.asarray(self.source.skipped or 0, x.total_notfinite.dtype)
            return x._replace(total_notfinite=skipped, inner_state=self.fill(x.inner_state))
        if fields is not None and fields in (("inner_state",), ("inner_states",)):
            return type(x)(self.fill(x[0]))
        if fields is None and is_container(x):
            return mapped(self.fill, x)
        return self.filling.other(x) if jax.tree.leaves(x) else x

    def _rule(self, x: Any, fields: tuple[str, ...]) -> Any:
        values: dict[str, dict[str, Any]] = {name: {} for name in fields if name != "count"}
        found: dict[str, Kept] = {}
        for path in leaves_by_path(x.mu):
            kind, found[path], slots = self.translation.to_theirs(path)
            as_expected(self.owner, OPTAX, kind, path, Kept(0, dict.fromkeys(values)))
            for name, array in slots.items():
                values[name][path] = array
        trees = {k: self.filling.tree(k, v, getattr(x, k)) for k, v in values.items()}
        return x._replace(count=jnp.asarray(self.filling.counted(found), x.count.dtype), **trees)

    def _gathering(self, x: Any) -> Any:
        micro, totals = self.source.gathered or (0, {})
        mean: Any = x.acc_grads
        if micro:
            dense = {
                p: t.to_dense() if isinstance(t, RowGradient) else t for p, t in totals.items()
            }
            means = {p: t / micro for p, t in dense.items()}
            mean = self.filling.tree("the gathered gradient", means, mean)
        return x._replace(
            mini_step=jnp.asarray(micro, x.mini_step.dtype),
            gradient_step=jnp.asarray(self.source.count_of(None), x.gradient_step.dtype),
            inner_opt_state=self.fill(x.inner_opt_state),
            acc_grads=mean,
        )


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
        `nadam`, `amsgrad`, `adamax` and the transforms they are made of. (States of `radam` and
        `lamb` are of the same class as Adam's, and cannot be told from it.)
      tx: a transform of ours, with the hyperparameters of the optax transform, of which its state
        says nothing: b1, b2, the rate, `eps` (optax's epsilon, 1e-8 by default), and the weight
        decay (1e-4 by default in `optax.adamw`, 0.004 here).
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
    source = Source("from_optax")
    _read_optax(source_state, source, {})
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
    ours, wanted = Ours("to_optax", tx, state, params), Source("to_optax")
    _read_optax(target, wanted, {})
    into = _IntoOptax(ours, wanted, check, rtol)
    if wanted.gathered is None:
        no_place_to_gather("to_optax", into.source)
    made = into.fill(target)
    into.filling.finish()
    if check:
        Said(ours, OPTAX).check(wanted.kept)
    return made
