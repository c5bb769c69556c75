"""States from and to optax."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamjax.convert.adamjax_state import AdamjaxState, initial_state
from adamjax.convert.differences import Translation, expect_slots
from adamjax.convert.filling import ACCUMULATED
from adamjax.convert.hyperparameters import HyperparameterCheck, has_schedule
from adamjax.convert.into_adamjax import into_adamjax
from adamjax.convert.optax_state import read_state, role_of
from adamjax.convert.source import Count, LeafMoments, Skips, Source
from adamjax.convert.steps import expect_same_steps
from adamjax.convert.systems import OPTAX, RTOL
from adamjax.convert.values import leaves_by_path, map_items
from adamjax.data import Tree
from adamjax.guard import skip_not_finite
from adamjax.rows import RowGradient
from adamjax.scaling import set_to_zero
from adamjax.structure import walk

__all__ = ["from_optax", "to_optax"]


def _add_doubts(source: Source, ours: AdamjaxState, optimizer: Any) -> None:
    """Adds doubts about what optax' state and `tx` do, unless steps of the optimizer show it."""
    _doubt_skips(source, ours)
    if optimizer is None:
        _note_leaves_without_rules(source, ours)
        source.doubt_unseen("pass optimizer=, the transform of optax, so that steps are compared")


def _doubt_skips(source: Source, ours: AdamjaxState) -> None:
    """Adds a doubt if optax skips other steps than adamjax, or counts those it skips otherwise."""
    if not source.skips:
        return
    both_accumulate = bool(source.accumulated) and bool(ours.accumulations)
    skipping = [part for part in ours.parts if isinstance(part.tx, skip_not_finite)]
    our_skips = [
        Skips(frozenset(leaves_by_path(ours.owner, p.params)), id(p.tx) in ours.in_accumulated)
        for p in skipping
    ]
    for path in source.moments:
        theirs, own = (
            {x.accumulates and both_accumulate for x in skips if path in x.leaves}
            for skips in (source.skips, our_skips)
        )
        if theirs != own:
            what, mend = "no steps", "leave skip_not_finite out there"
            if theirs and both_accumulate:
                what, place = "micro-batches", "outside of"
                if True in theirs:
                    what, place = "whole steps", "inside"
                mend = f"put skip_not_finite {place} accumulate_gradients"
            elif theirs:
                what, mend = "steps", "wrap tx in skip_not_finite, or the part for this leaf"
            source.doubts.append(
                f"of the leaf {path!r} optax skips {what} with gradients that are not finite "
                f"(apply_if_finite), and tx does not do the same: {mend}"
            )
            return
    in_skips = {id(inner.tx) for part in skipping for inner in walk(part.tx.tx)}
    ours_skip = {id(p.tx) in in_skips for p in ours.parts if has_schedule(p.tx)}
    they_skip = {count.skips for count in source.counts}
    if ours_skip and they_skip and ours_skip != they_skip:
        place = "inside" if True in they_skip else "outside of"
        source.doubts.append(
            "optax and tx differ in whether a schedule counts the steps that are skipped: put "
            f"scale_by_learning_rate {place} skip_not_finite"
        )


def _note_leaves_without_rules(source: Source, ours: AdamjaxState) -> None:
    """Notes leaves without a rule that move, if the state does not show by how much."""
    if not source.has_rates_without_rules:
        return
    frozen: set[str] = set()
    for part in ours.parts:
        if isinstance(part.tx, set_to_zero):
            frozen |= set(leaves_by_path(ours.owner, part.params))
    for path in leaves_by_path(ours.owner, ours.params):
        if path not in source.moments and path not in frozen:
            source.unseen.append(
                f"the leaf {path!r} has no rule, and the state does not show whether its rates "
                "and weight decays are those of this leaf too"
            )
            return


class _OptaxFilling(Translation):
    """Fills a state of optax, and the states inside it."""

    def filled_state(self, target: Any, counts: Sequence[Count]) -> Any:
        self.counts = iter(counts)
        self.paths = frozenset(leaves_by_path(self.owner, self.ours.params))
        state = self.fill(target)
        self.finish()
        return state

    def fill(self, x: Any) -> Any:
        role = role_of(x)
        if role == "rule":
            return self._fill_rule(x)
        if role == "count":
            count = next(self.counts)
            leaves = self.paths - count.excluded if count.excluded else count.leaves
            return x._replace(count=self.schedule_count(leaves, x.count))
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
        if role in ("inner", "parts"):
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
        of `inject_hyperparams` are compared. A state without it does not contain b1, b2, `eps`
        (optax' epsilon, 1e-8 by default), `eps_root` (which must be 0), the rate, and the weight
        decay (1e-4 by default in `optax.adamw`, 0.004 here) and its mask. A state that counts the
        steps of a schedule of the rate needs a schedule in `tx`. Transforms without a state, such
        as clips, leave no trace. If one `inject_hyperparams` contains several transforms, the state
        does not show their order. The state of `MultiSteps` does not show how many micro-batches
        make a step. Nor does it show whether gradients are summed or averaged: `MultiSteps`
        averages by default, `accumulate_gradients` always. `tx` may have transforms of optax
        inside. A rule of adamjax inside a transform of optax is hidden: it is refused if there are
        hyperparameters to compare.
      params: the parameters at that step.
      average: for a `weight_ema` in `tx`, the average so far, a tree like `params`. optax' states
        have none.
      optimizer: the optax transform itself. If it is given, both take some steps on random
        gradients, and a `tx` that moves weights differently is refused, now or at later counts of
        its schedules. This shows almost all that the state does not. If the state contains rates
        that belong to no single rule, it is required. The steps take the time and the memory of
        dense steps.
      check: whether to refuse a state with which the run would not go on as before; see
        `adamjax.convert`. With `optimizer`, steps are compared in place of hyperparameters, also
        with `check=False`.
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
    >>> state = adamjax.convert.from_optax(old_state, tx, params, optimizer=old)
    >>> adamjax.step_count(state), adamjax.get_slot(state, "m")["w"]
    (Array(1, dtype=int32), Array([ 0.1, -0.2], dtype=float32))
    """
    source = read_state("from_optax", source_state)
    new = initial_state("from_optax", tx, params)
    _add_doubts(source, new, optimizer)
    state = into_adamjax(source, OPTAX, new, average, check, rtol, compare=optimizer is None)
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
    target_source = read_state("to_optax", target)
    _add_doubts(target_source, ours, optimizer)
    source = ours.read_for(target_source, check)
    filling = _OptaxFilling(source, ours, OPTAX, check, rtol)
    new_state = filling.filled_state(target, target_source.counts)
    if check and optimizer is None:
        HyperparameterCheck(ours, OPTAX).check(target_source.moments)
    if optimizer is not None:
        expect_same_steps(ours, optimizer, new_state, rtol)
    return new_state
