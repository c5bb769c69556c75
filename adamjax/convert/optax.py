"""States from and to optax."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import (
    AdamjaxState,
    expect_foreign_state,
    expect_state_argument,
    initial_state,
)
from adamjax.convert.differences import Translation, expect_slots
from adamjax.convert.filling import ACCUMULATED
from adamjax.convert.into_adamjax import into_adamjax
from adamjax.convert.optax_state import read_state, role_of
from adamjax.convert.schedules import has_schedule
from adamjax.convert.source import Count, LeafMoments, SkippingTransform, Source
from adamjax.convert.steps import expect_made_by, expect_optimizer, expect_same_steps
from adamjax.convert.systems import OPTAX, RTOL
from adamjax.convert.values import leaves_by_path, map_items
from adamjax.data import Tree
from adamjax.guard import skip_not_finite
from adamjax.leaves import is_left_alone
from adamjax.structure import walk
from adamjax.transform import Rule

__all__ = ["from_optax", "to_optax"]


def _doubt_skips(theirs: Source, ours: AdamjaxState) -> None:
    """Adds a doubt if optax and `tx` skip different steps, or differ in counting skipped steps."""
    if not theirs.skipping_transforms:
        return
    both_accumulate = bool(theirs.accumulated) and bool(ours.accumulations)
    skipping = [part for part in ours.parts if isinstance(part.tx, skip_not_finite)]
    our_skips = [
        SkippingTransform(
            frozenset(leaves_by_path(ours.owner, p.params)), ours.num_accumulations(p) > 0
        )
        for p in skipping
    ]
    for path in theirs.moments:
        # For each skipping transform around this leaf: whether it skips whole steps of several
        # micro-batches.
        they_skip_steps, we_skip_steps = (
            {x.in_accumulating and both_accumulate for x in skips if path in x.leaves}
            for skips in (theirs.skipping_transforms, our_skips)
        )
        if they_skip_steps == {True}:  # They skip whole steps, but no micro-batches.
            theirs.doubts.append(
                f"for the leaf {path!r}, apply_if_finite is inside MultiSteps, whose sum keeps a "
                "NaN, so no later step moves the weights. In adamjax a run goes on after a NaN. If "
                "gradients are always finite, put skip_not_finite inside accumulate_gradients, and "
                "pass check=False"
            )
            return
        if they_skip_steps == we_skip_steps:
            continue
        if not they_skip_steps:
            theirs.doubts.append(
                f"tx skips steps of the leaf {path!r} with gradients that are not finite, and "
                "optax does not: remove skip_not_finite from around this leaf"
            )
            return
        unit, fix = "steps", "wrap tx in skip_not_finite, or the part for this leaf"
        if both_accumulate:
            unit, fix = "micro-batches", "put skip_not_finite outside of accumulate_gradients"
        theirs.doubts.append(
            f"optax skips {unit} of the leaf {path!r} with gradients that are not finite "
            f"(apply_if_finite), and tx does not do the same: {fix}"
        )
        return
    ids_inside = {id(inner.tx) for part in skipping for inner in walk(part.tx.tx)}
    scheduled = [
        (id(p.tx) in ids_inside, leaves_by_path(ours.owner, p.params))
        for p in ours.parts
        if has_schedule(p.tx)
    ]
    for path in theirs.moments:
        our_schedules_inside = {inside for inside, leaves in scheduled if path in leaves}
        their_schedules_inside = {
            count.in_skipping for count in theirs.counts if count.is_for(frozenset({path}))
        }
        if not our_schedules_inside or not their_schedules_inside:
            continue
        if our_schedules_inside != their_schedules_inside:
            place = "inside" if True in their_schedules_inside else "outside of"
            theirs.doubts.append(
                f"optax and tx differ in whether the schedule of the leaf {path!r} counts the "
                f"steps that are skipped: put its scale_by_learning_rate {place} skip_not_finite"
            )
            return


def _expect_means(source: Source, optimizer: Any, params: Tree) -> None:
    """Refuses `MultiSteps(use_grad_mean=False)` in the middle of a step.

    Its state has the sum of the gradients, and does not show that this is no mean. So it is tried
    on two micro-batches.
    """
    if all(accumulated.micro < 2 for accumulated in source.accumulated):
        return
    grads = jax.tree.map(lambda p: p if is_left_alone(p) else jnp.ones_like(p), params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    after_each = []
    for _ in range(2):
        try:
            _, state = update(grads, state, params)
        except TypeError:
            return  # `expect_same_steps` raises the error, with the reason.
        after_each.append(read_state(source.owner, state).accumulated)
    for first, second in zip(*after_each, strict=True):
        for path in first.totals.keys() & second.totals.keys():
            # `read_state` multiplies means by the number of micro-batches. From a sum, it computes
            # 4 times the first gradient.
            largest = [float(np.max(np.abs(x.totals[path]), initial=0)) for x in (first, second)]
            if second.micro == 2 and largest[1] > 3 * largest[0]:
                raise ValueError(
                    f"{source.owner}: MultiSteps(use_grad_mean=False) in the middle of a step "
                    "cannot be converted: convert after a step"
                )


class _OptaxFiller(Translation):
    """Fills a state of optax, and the states inside it."""

    def filled_state(self, target: Any, counts: Sequence[Count]) -> Any:
        self.counts = iter(counts)
        self.paths = frozenset(leaves_by_path(self.owner, self.ours.params))
        # The leaves of the mask or part that is being filled; `None` outside of these.
        self.leaves: frozenset[str] | None = None
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
            count = self.schedule_count(self.leaves, x.count)
            return x._replace(inner_state=self.fill(x.inner_state), count=count)
        if role == "accumulated":
            return self._fill_accumulated(x)
        if role == "skipped":
            skipped = jnp.asarray(self.source.skipped_of(self.leaves), x.total_notfinite.dtype)
            return x._replace(total_notfinite=skipped, inner_state=self.fill(x.inner_state))
        if role == "inner":
            return type(x)(self._fill_part(x[0], self._leaves_of_rules(x[0])))
        if role == "parts":
            with_rules = self._leaves_of_rules(x[0])
            without_rules = (self.paths if self.leaves is None else self.leaves) - with_rules
            return type(x)(
                map_items(
                    lambda part: self._fill_part(
                        part, self._leaves_of_rules(part) or without_rules
                    ),
                    x[0],
                )
            )
        if role == "items":
            return map_items(self.fill, x)
        return self.other_state(x) if jax.tree.leaves(x) else x

    def _leaves_of_rules(self, x: Any) -> frozenset[str]:
        """The paths of the leaves that have a rule in a node of the state."""
        return frozenset(read_state(self.owner, x).moments)

    def _fill_part(self, x: Any, leaves: frozenset[str]) -> Any:
        """Fills the state of a mask or part.

        A state of `inject_hyperparams` in it counts the steps of these leaves; if there are none,
        of those of the state around it.
        """
        outer, self.leaves = self.leaves, leaves or self.leaves
        filled = self.fill(x)
        self.leaves = outer
        return filled

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
            means = {path: total / micro for path, total in totals.items()}
            mean = self.tree(ACCUMULATED, means, mean)
        outer, self.in_accumulating = self.in_accumulating, True
        filled = x._replace(
            mini_step=jnp.asarray(micro, x.mini_step.dtype),
            gradient_step=self.schedule_count(leaves, x.gradient_step),
            inner_opt_state=self.fill(x.inner_opt_state),
            acc_grads=mean,
        )
        self.in_accumulating = outer
        return filled


def from_optax(
    source_state: Any,
    tx: Any,
    params: Tree,
    optimizer: Any = None,
    *,
    average: Tree = None,
    check: bool = True,
    rtol: float = RTOL,
) -> Any:
    """The state of `tx` that goes on from a state of an optax transform.

    The conversion finds moments by the paths of their leaves, at any depth of optax' `chain`,
    `masked`, `multi_transform` (`partition`), `inject_hyperparams`, `MultiSteps` and
    `apply_if_finite`. So `tx` may be composed differently, with `masked`, `partition`,
    `exact_rows` (whose rows are then all up to date), `accumulate_gradients` or `skip_not_finite`.
    If a leaf goes through several rules, they correspond in their order. `tx` may also contain
    transforms of optax.

    A state of optax does not contain the optimizer's hyperparameters. So `optimizer` and `tx` both
    take some steps on random gradients, at the present count and at later counts of their
    schedules. If both states contain a rate or a decay, they also take steps with half of it, and
    with rates 10 and 1,000 times as large. If `tx` moves a weight differently, or if its moments
    become different, it is refused. Of a leaf with more than 16,384 elements, a sample takes all
    these steps, and the whole leaf takes a few. (If one of the optimizers may depend on the size of
    a leaf, whole leaves take all steps.) If there are very many leaves, only some of them take
    steps with a NaN and with large gradients. On a CPU this takes seconds for a small model, about
    a minute for 300 leaves, and ten to twenty seconds for a table of 5 million rows and 16 columns.
    If that is too long, compare a small copy of the model, and pass `check=False` for the large
    one.

    A difference may go unnoticed if it shows only at particular values of weights or gradients, or
    only in a few of very many steps. Counts are compared near the whole numbers in the programs of
    both optimizers, such as the boundaries of their schedules, near sums and products of two of
    them, and between these at intervals of 3%. For a model with hundreds of leaves, or many
    micro-batches, an interval may grow to a factor of 3.
    Optional arguments of `update` are left out, and a `sum_over` in `tx` is too: the sums are taken
    as those of one replica. Of counts of other transforms in a state, only single integers are
    advanced.
    Where weights are bfloat16 or float16, optax rounds m and v, so its run drifts away from that of
    adamjax. Then both take the steps in float32, unless `inject_hyperparams` has rounded
    hyperparameters to such a dtype, or masks depend on the dtypes of leaves. In these two cases
    updates may differ by 10%, and with `mu_dtype` inside `apply_if_finite` (in older releases of
    optax also inside `MultiSteps`) by 3%.

    Args:
      source_state: the state that `init` or `update` of the optax transform returned. Its rules
        must be those of `adam`, `adamw`, `nadam`, `amsgrad` or `adamax`. A state is recognized by
        its class.
      tx: a transform of adamjax. optax' epsilon, 1e-8 by default, is `eps` here. The default weight
        decay is 1e-4 in `optax.adamw`, and 0.004 in `adamjax.adamw`.
      params: the parameters at that step.
      optimizer: the optax transform that made the state. Required, unless `check` is false.
      average: for a `weight_ema` in `tx`, the average so far, a tree like `params`. optax' states
        have none.
      check: whether to refuse a state with which the run would not go on as before; see
        `adamjax.convert`. If false, no steps are compared.
      rtol: how much the steps of both may differ, relatively, where optax'
        rule has another form (AMSGrad, Nadam, Adamax). At least 0. For a leaf of Adamax that has
        had no gradient, the difference is that for gradients of 0.01.

    Returns:
      A state like that of `tx.init(params)`. Its arrays are copies. Schedules go on from the count
      of optax' schedules or, where a rate was constant, from the count of the rule.

    Raises:
      TypeError: `optimizer` is missing, is no transform, or needs more than gradients, state and
        parameters for an update.
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
    owner = "from_optax"
    expect_state_argument(owner, "source_state", source_state)
    if check:
        expect_optimizer(owner, optimizer)
    source = read_state(owner, source_state)
    ours = initial_state(owner, tx, params)
    _doubt_skips(source, ours)
    state = into_adamjax(source, OPTAX, ours, average, check, rtol)
    if check:
        expect_made_by(owner, optimizer, source_state, params)
        _expect_means(source, optimizer, params)
        _expect_same(ours.with_state(state), optimizer, source_state, rtol)
    return state


def to_optax(
    state: Any,
    tx: Any,
    params: Tree,
    optimizer: Any,
    *,
    check: bool = True,
    rtol: float = RTOL,
) -> Any:
    """The state of an optax transform that goes on from a state of `tx`.

    Args:
      state: a state of `tx`. The rows of `exact_rows` must be up to date: call `flush` first.
      tx: a transform of adamjax.
      params: the parameters at that step.
      optimizer: the optax transform. Steps of both are compared, as in `from_optax`. Build one of
        `inject_hyperparams` with the learning rate that `tx` has at the step of `state`.
      check, rtol: as for `from_optax`.

    Returns:
      A state like that of `optimizer.init(params)`. Its arrays are copies. It has no place for an
      average of the weights: read that with `averaged_weights`.

    Raises:
      TypeError, ValueError: as for `from_optax`.

    >>> import adamjax, jax.numpy as jnp, optax
    >>> params, grads = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, -2.0])}
    >>> tx = adamjax.adam(0.1, eps=1e-8)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> new_state = adamjax.convert.to_optax(state, tx, params, optax.adam(0.1))
    >>> new_state[0].mu["w"]
    Array([ 0.1, -0.2], dtype=float32)
    """
    owner = "to_optax"
    expect_state_argument(owner, "state", state)
    expect_optimizer(owner, optimizer)
    ours = AdamjaxState(owner, tx, state, params)
    expect_foreign_state(owner, tx, state, params)
    target = optimizer.init(params)
    target_source = read_state(owner, target)
    _doubt_skips(target_source, ours)
    source = ours.read_for(target_source, check)
    filler = _OptaxFiller(source, ours, OPTAX, check, rtol)
    new_state = filler.filled_state(target, target_source.counts)
    if check:
        _expect_means(source, optimizer, params)
        _expect_same(ours, optimizer, new_state, rtol)
    return new_state


def _expect_same(ours: AdamjaxState, optimizer: Any, state: Any, rtol: float) -> None:
    """Refuses a transform that does not move weights as optax' optimizer does."""
    for part in ours.parts:
        if isinstance(part.tx, Rule) and part.tx.eps is None:  # the most frequent difference
            leaves = leaves_by_path(ours.owner, part.params)
            raise ValueError(
                f"{ours.owner}: {next(iter(leaves), 'a leaf')!r}: optax has epsilon added "
                f"to the bias-corrected root (eps), tx has eps_hat={part.tx.eps_hat}: build tx "
                f"with eps= and the value of optax' eps. {OPTAX.not_stated}"
            )
    expect_same_steps(ours, optimizer, state, rtol)
